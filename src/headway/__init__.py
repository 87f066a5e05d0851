"""Headway schedules LLM serving: one pure policy core, the same in simulation and in production.

    import headway
    result = headway.compare(workload="azure-code", policies=["staggered", "least-tokens"], load=[0.5, 0.8])
    result.rows()                       # one record per run, ready for a DataFrame
    headway.capacity(cluster="llama8b-h100", batch=["fair", "stall-free"]).rows()

Names are imported when first used, so that `import headway.core` stays free of third parties.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.hosts.sim.capacity import CapacityResult, capacity
    from headway.hosts.sim.compare import Comparison, compare
    from headway.hosts.sim.simulate import SimResult, simulate
    from headway.hosts.sim.sweep import SweepResult, sweep
    from headway.model.presets import load_cluster
    from headway.workload import Item, Workload, load_trace, make_items, parametric

__version__ = "0.1.0"

__all__ = [
    "CapacityResult",
    "Comparison",
    "Item",
    "SimResult",
    "SweepResult",
    "Workload",
    "__version__",
    "capacity",
    "compare",
    "load_cluster",
    "load_trace",
    "make_items",
    "parametric",
    "simulate",
    "sweep",
]

_HOMES = {
    "CapacityResult": "headway.hosts.sim.capacity",
    "Comparison": "headway.hosts.sim.compare",
    "Item": "headway.workload",
    "SimResult": "headway.hosts.sim.simulate",
    "SweepResult": "headway.hosts.sim.sweep",
    "Workload": "headway.workload",
    "capacity": "headway.hosts.sim.capacity",
    "compare": "headway.hosts.sim.compare",
    "load_cluster": "headway.model.presets",
    "load_trace": "headway.workload",
    "make_items": "headway.workload",
    "parametric": "headway.workload",
    "simulate": "headway.hosts.sim.simulate",
    "sweep": "headway.hosts.sim.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headway' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
