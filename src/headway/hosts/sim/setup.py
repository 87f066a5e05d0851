"""Many simulations at once: what they share, and what tells them apart.

Every name is checked before the first simulation starts. Equal seeds see equal requests under every policy
(common random numbers). A task is told from all others by `about`, which names everything its result depends
on.
"""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from headway.core.batch.contract import batch_policies
from headway.core.cluster import check_cluster
from headway.core.errors import ConfigError
from headway.core.request import Slo
from headway.hosts.sim.simulate import SimResult, simulate
from headway.model.cluster import ClusterSpec
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.report.metrics import Run, summarise
from headway.report.results import Provenance
from headway.workload import Workload, load_trace, make_items, parametric

__all__ = [
    "DEFAULT_LOADS",
    "DEFAULT_WORKLOAD",
    "Setup",
    "Task",
    "check_policies",
    "check_positive",
    "command_line",
    "names",
    "prepare",
    "rates",
    "seed_range",
]

DEFAULT_WORKLOAD = "azure-code"
DEFAULT_LOADS = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True, slots=True)
class Setup:
    """What all simulations of a sweep share. `requests`: None takes the whole trace."""

    cluster: ClusterSpec
    workload: Workload
    arrivals: str
    requests: int | None
    slo: Slo
    workload_sha: str

    @property
    def nominal_rps(self) -> float:
        """The rate called load 1: the tighter pool runs full, all its ranks equal, at mean lengths."""
        return nominal_capacity_rps(
            self.cluster, self.workload.mean_prompt_tokens, self.workload.mean_output_tokens
        )

    def simulate(self, task: "Task", *, keep_passes: bool = False) -> SimResult:
        """Run one simulation."""
        items = make_items(
            self.workload, rps=task.rps, arrivals=self.arrivals, requests=self.requests, seed=task.seed
        )
        return simulate(
            self.cluster,
            items,
            task.policy,
            task.batch,
            seed=task.seed,
            slo=self.slo,
            keep_passes=keep_passes,
        )

    def about(self) -> dict[str, Any]:
        """Name everything a simulation of this setup depends on but its task, in values that JSON has.

        Cluster and workload are told by digests of their contents beside their names, so that an edited file
        is another one; the version of Headway stands for its code.
        """
        from headway import __version__

        return {
            "version": __version__,
            "cluster": self.cluster.name,
            "cluster_sha": _sha(self.cluster.model_dump_json().encode()),
            "workload": self.workload.name,
            "workload_sha": self.workload_sha,
            "arrivals": self.arrivals,
            "requests": self.requests or len(self.workload),
            "slo_ttft_s": self.slo.ttft_s,
            "slo_tpot_s": self.slo.tpot_s,
        }

    def provenance(self, command: str, seeds: Sequence[int], requests: int) -> Provenance:
        """Describe what results of this setup rest on."""
        from headway import __version__

        return Provenance(
            version=__version__,
            command=command,
            cluster_source=self.cluster.source,
            workload_source=self.workload.source,
            arrivals=self.arrivals,
            requests=requests,
            seeds=tuple(seeds),
            slo_ttft_s=self.slo.ttft_s,
            slo_tpot_s=self.slo.tpot_s,
            nominal_rps=self.nominal_rps,
            mean_prompt_tokens=self.workload.mean_prompt_tokens,
            mean_output_tokens=self.workload.mean_output_tokens,
        )


@dataclass(frozen=True, slots=True)
class Task:
    """One simulation: these policies, at this rate, with this seed."""

    policy: str
    batch: str
    load: float | None
    rps: float
    seed: int

    def about(self) -> dict[str, Any]:
        """Name what tells this simulation from others of its setup."""
        return asdict(self)

    def summarise(self, result: SimResult) -> Run:
        """Condense a result into the record that is reported."""
        return summarise(
            result.outcomes,
            policy=self.policy,
            batch=self.batch,
            load=self.load,
            rps=self.rps,
            seed=self.seed,
            chunk_utilisation=result.chunk_utilisation,
            bubble=result.bubble,
            decode_batch_imbalance=result.decode_batch_imbalance,
            sim_steps=result.steps,
            wall_s=result.wall_s,
        )


def prepare(
    *,
    trace: str | Path | None,
    workload: str | None,
    cluster: str | Path | ClusterSpec,
    arrivals: str | None,
    requests: int | None,
    slo_ttft_s: float | None,
    slo_tpot_s: float | None,
) -> Setup:
    """Load and check what a sweep needs. Raises ConfigError naming the option, file, row or key at fault."""
    if trace is not None and workload is not None:
        raise ConfigError("give a trace or a workload, not both")
    if requests is not None and requests < 1:
        raise ConfigError(f"requests must be at least 1, got {requests}")
    spec = cluster if isinstance(cluster, ClusterSpec) else load_cluster(str(cluster))
    source = load_trace(Path(trace)) if trace is not None else parametric(workload or DEFAULT_WORKLOAD)
    changes = {"ttft_s": slo_ttft_s, "tpot_s": slo_tpot_s}
    slo = replace(spec.slo, **{name: value for name, value in changes.items() if value is not None})
    arrivals = arrivals or ("recorded" if trace is not None else "poisson")
    make_items(source, rps=1.0, arrivals=arrivals, requests=requests, seed=0)  # speak up now, not in a worker
    return Setup(spec, source, arrivals, requests, slo, _workload_sha(source))


def names(given: Sequence[str]) -> list[str]:
    """Return names as a list. A text is one name, and not (as Python has it) a sequence of letters."""
    return [given] if isinstance(given, str) else list(given)


def check_policies(cluster: ClusterSpec, policies: Sequence[str], batch: Sequence[str]) -> None:
    """Raise ConfigError for a policy, batch policy or setting that is unknown or does not fit the cluster."""
    for what, specs in (("policy", policies), ("batch policy", batch)):
        if not specs:
            raise ConfigError(f"name at least one {what}")
        if len(set(specs)) < len(specs):
            raise ConfigError(f"{what} {next(s for s in specs if specs.count(s) > 1)!r} is named twice")
    for spec in policies:
        check_cluster(spec, disaggregated=cluster.disaggregated)
    for spec in batch:
        batch_policies.find(spec)


def check_positive(what: str, values: Sequence[float]) -> None:
    """Raise ConfigError unless there is a value and all are positive and finite."""
    if not values:
        raise ConfigError(f"give at least one {what}")
    for value in values:
        if not 0.0 < value < math.inf:
            raise ConfigError(f"{what} must be a positive number, got {value!r}")


def rates(
    setup: Setup, load: Sequence[float] | None, rps: Sequence[float] | None
) -> list[tuple[float | None, float]]:
    """Pairs (load, requests per second); load is None where the rate was given itself."""
    if load is not None and rps is not None:
        raise ConfigError("give load or rps, not both")
    if rps is not None:
        check_positive("rps", rps)
        return [(None, rate) for rate in rps]
    load = DEFAULT_LOADS if load is None else load
    check_positive("load", load)
    return [(fraction, fraction * setup.nominal_rps) for fraction in load]


def seed_range(seed: int, seeds: int) -> list[int]:
    """The seeds from `seed` on. Raises ConfigError for none."""
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    return list(range(seed, seed + seeds))


def command_line() -> str:
    """The command that started this process, as one would type it."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _workload_sha(workload: Workload) -> str:
    items = workload.items
    columns = (items.arrivals_s, items.prompt_tokens, items.output_tokens)
    prefixes = (repr(prefix).encode() for prefix in items.prefixes)
    return _sha(*(column.tobytes() for column in columns), b"%d" % items.prefix_block_tokens, *prefixes)


def _sha(*parts: bytes) -> str:
    """A digest short enough to read and long enough never to meet another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
