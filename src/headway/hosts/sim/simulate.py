"""`simulate`: one policy, one workload, one cluster, in virtual time.

Same seed, same decisions, byte for byte.
"""

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from headway.core.batch.contract import BatchPolicy, batch_policies
from headway.core.cluster.compose import create_cluster
from headway.core.decision_log import DecisionLog
from headway.core.request import Slo
from headway.hosts.sim.cluster import SimCluster
from headway.hosts.sim.driver import Observer
from headway.hosts.sim.faults import Fault
from headway.model.cluster import ClusterSpec
from headway.report.metrics import Outcome, PassRecord
from headway.workload.items import Item

__all__ = ["SimResult", "simulate"]

#: How often `progress` is called, at most.
PROGRESS_CALLS = 100


@dataclass(slots=True)
class SimResult:
    """What a simulation gave.

    `outcomes`: one per request, in order of arrival. `passes`: every forward pass, if kept. `steps`: how
    many there were. `duration_s` is simulated, `wall_s` real time. Utilisation, bubble and imbalance as in
    `PassCounters`.
    """

    outcomes: list[Outcome] = field(repr=False)
    passes: list[PassRecord] = field(repr=False)
    steps: int
    duration_s: float
    wall_s: float
    chunk_utilisation: float
    bubble: float
    decode_batch_imbalance: float
    log: DecisionLog | None = field(default=None, repr=False)


def simulate(
    cluster: ClusterSpec,
    items: Sequence[Item],
    policy: str,
    batch: str,
    *,
    seed: int = 0,
    slo: Slo | None = None,
    faults: Iterable[Fault] = (),
    keep_passes: bool = False,
    keep_log: bool = False,
    observers: Sequence[Observer] = (),
    progress: Callable[[float], None] | None = None,
) -> SimResult:
    """Serve `items` on `cluster`, placed by the cluster policy `policy` and run by the batch policy `batch`.

    `slo` replaces the cluster's own. Every random stream derives from `seed` and its own name, so that the
    engines of two policies jitter alike. `observers` see each event with the actions it led to. `progress`
    is given the share of requests that are resolved, now and then.

    Raises ConfigError for a policy, setting or fault that is not known and for arrivals that go backwards.
    """
    log = DecisionLog() if keep_log else None
    started_s = time.perf_counter()
    sim = SimCluster(
        cluster,
        create_cluster(policy, disaggregated=cluster.disaggregated, rng=random.Random(f"{seed}/policy")),
        _batch_maker(batch, seed),
        seed=seed,
        slo=slo,
        faults=faults,
        observers=[*observers, log] if log else observers,
        keep_passes=keep_passes,
        on_resolved=_counter(progress, len(items)),
    )
    sim.run(items)
    return SimResult(
        sim.outcomes,
        sim.passes,
        sim.counters.steps,
        sim.kernel.now,
        time.perf_counter() - started_s,
        sim.counters.chunk_utilisation,
        sim.counters.bubble,
        sim.counters.decode_batch_imbalance,
        log,
    )


def _batch_maker(spec: str, seed: int) -> Callable[[str], BatchPolicy]:
    """Parse the spec once; clusters have thousands of ranks."""
    cls, settings = batch_policies.find(spec)

    def make(rank: str) -> BatchPolicy:
        made: BatchPolicy = cls(settings, random.Random(f"{seed}/batch/{rank}"))
        return made

    return make


def _counter(progress: Callable[[float], None] | None, requests: int) -> Callable[[], None]:
    """Count resolved requests and call `progress` at every hundredth of them."""
    resolved = 0
    every = -(-requests // PROGRESS_CALLS)

    def count() -> None:
        nonlocal resolved
        resolved += 1
        if progress and (resolved % every == 0 or resolved == requests):
            progress(resolved / requests)

    return count
