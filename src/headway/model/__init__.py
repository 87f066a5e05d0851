"""What is true in a simulation: engines, what their passes cost, what their memory holds, which clusters
there are.

No policy sees any of this; a policy has `core.estimate`, what it learned from reports.

    spec = load_cluster("llama8b-h100")
    engine = Engine(spec.pools[0], [policy], random.Random(0))
    engine.submit(Work(request, output_tokens=100), rank=0, now=0.0)
    now = engine.start_pass(0.0)
    outcome = engine.end_pass(now)

`instance` (what it reports) over `engine` (passes), over `rank` (what one rank runs), `decodes` (lazy
progress), `kv` (blocks and prefix cache), `lateness`, `work`; `costs` and `fits` (seconds per pass);
`cluster` (TOML) and `presets`.
"""

from headway.model.cluster import ClusterSpec, MemorySpec, NetworkSpec, PoolSpec
from headway.model.costs import Costs, DenseCosts, LockstepCosts, PhaseCosts
from headway.model.engine import Engine, PassOutcome
from headway.model.presets import PRESETS, load_cluster, nominal_capacity_rps
from headway.model.work import Work

__all__ = [
    "PRESETS",
    "ClusterSpec",
    "Costs",
    "DenseCosts",
    "Engine",
    "LockstepCosts",
    "MemorySpec",
    "NetworkSpec",
    "PassOutcome",
    "PhaseCosts",
    "PoolSpec",
    "Work",
    "load_cluster",
    "nominal_capacity_rps",
]
