"""How much a policy carries: the highest rate at which a given share of requests meets both SLOs.

Attainment falls with the rate, but not smoothly: a finite sample is noisy. So each seed is searched on its
own (bracket by doubling from nominal capacity, then bisect), and the seeds' answers are averaged with an
interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from headway.core.errors import ConfigError
from headway.hosts.sim.compare import default_batch, default_policies
from headway.hosts.sim.jobs import Job, Kept, Progress, run_jobs
from headway.hosts.sim.setup import Setup, Task, check_policies, command_line, names, prepare, seed_range
from headway.hosts.sim.workers import Where
from headway.model.cluster import ClusterSpec
from headway.report.confidence import estimate
from headway.report.metrics import Run
from headway.report.results import CapacityResult, CapacityRun
from headway.report.results_file import results_file

__all__ = ["CapacityResult", "CapacityRun", "Metric", "capacity", "highest_rate"]

Metric = Literal["slo", "envelope"]

#: Beyond these multiples of nominal capacity the search gives up: nothing is that far off.
_LOWEST, _HIGHEST = 1 / 64, 16


def capacity(
    *,
    trace: str | Path | None = None,
    workload: str | None = None,
    cluster: str | Path | ClusterSpec = "dsv3-h200-pd",
    policies: Sequence[str] | None = None,
    batch: Sequence[str] | None = None,
    attainment: float = 0.99,
    metric: Metric = "slo",
    tolerance: float = 0.02,
    arrivals: str | None = None,
    requests: int | None = None,
    seed: int = 0,
    seeds: int = 3,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    workers: int | None = None,
    backend: str = "processes",
    address: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> CapacityResult:
    """Search, for each policy × batch policy, the highest rate with at least `attainment` of requests in
    time.

    `metric`: "slo" asks for TTFT and mean TPOT after the first token, "envelope" for FairBatching's deadline
    line. `tolerance` is the relative width at which the bisection stops. A policy that never gets there has
    capacity 0. Other arguments, and errors, as in `compare`.
    """
    where = Where(backend, address, workers)
    _check(attainment, metric, tolerance)
    setup = prepare(
        trace=trace,
        workload=workload,
        cluster=cluster,
        arrivals=arrivals,
        requests=requests,
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
    )
    policies = names(policies) if policies is not None else default_policies(setup.cluster)
    batch = names(batch) if batch is not None else default_batch(setup.cluster)
    check_policies(setup.cluster, policies, batch)
    seed_list = seed_range(seed, seeds)
    pairs = [(p, b) for p in policies for b in batch]
    searches = [_Search(p, b, s, attainment, metric, tolerance) for p, b in pairs for s in seed_list]
    jobs = [Job(search, setup.about() | asdict(search)) for search in searches]
    with results_file(out, resume=resume) as file:
        kept = Kept(file, _to_record, _from_record) if file else None
        found = run_jobs(_search, setup, jobs, where=where, progress=progress, kept=kept)
    runs = [
        _condense(setup, pair, attainment, metric, found[i * seeds : (i + 1) * seeds])
        for i, pair in enumerate(pairs)
    ]
    count = requests or len(setup.workload.items)
    provenance = setup.provenance(command or command_line(), seed_list, count)
    return CapacityResult(setup.cluster.name, setup.workload.name, runs, provenance)


def highest_rate(meets: Callable[[float], bool], start_rps: float, tolerance: float) -> float:
    """The highest rate that `meets`, to a relative `tolerance`, searched from `start_rps`; 0 if none does.

    Assumes that once a rate fails, higher ones fail: noise near the edge costs accuracy of its own size, no
    more.
    """
    low, high = start_rps, start_rps
    if meets(start_rps):
        while meets(high := 2 * low):
            low = high
            if high >= _HIGHEST * start_rps:
                return high
    else:
        while not meets(low := high / 2):
            high = low
            if low <= _LOWEST * start_rps:
                return 0.0
    while high > low * (1 + tolerance):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


@dataclass(frozen=True, slots=True)
class _Search:
    """One policy with one seed: searched in one piece, in one process."""

    policy: str
    batch: str
    seed: int
    attainment: float
    metric: Metric
    tolerance: float


def _check(attainment: float, metric: str, tolerance: float) -> None:
    if not 0.0 < attainment <= 1.0:
        raise ConfigError(f"attainment must be above 0 and at most 1, got {attainment!r}")
    if not 0.0 < tolerance < 1.0:
        raise ConfigError(f"tolerance must be between 0 and 1, got {tolerance!r}")
    if metric not in ("slo", "envelope"):
        raise ConfigError(f"metric must be slo or envelope, got {metric!r}")


def _search(setup: Setup, search: _Search) -> float:
    def meets(rps: float) -> bool:
        task = Task(search.policy, search.batch, None, rps, search.seed)
        return _attained(task.summarise(setup.simulate(task)), search.metric) >= search.attainment

    return highest_rate(meets, setup.nominal_rps, search.tolerance)


def _to_record(rate_rps: float) -> dict[str, Any]:
    return {"capacity_rps": rate_rps}


def _from_record(record: dict[str, Any]) -> float:
    return float(record["capacity_rps"])


def _attained(run: Run, metric: Metric) -> float:
    return run.slo_attainment if metric == "slo" else run.envelope_attainment


def _condense(
    setup: Setup, pair: tuple[str, str], attainment: float, metric: Metric, rates: Sequence[float]
) -> CapacityRun:
    over_seeds = estimate(rates)
    return CapacityRun(
        policy=pair[0],
        batch=pair[1],
        capacity_rps=over_seeds.mean,
        ci95=over_seeds.interval,
        slo_ttft_s=setup.slo.ttft_s,
        slo_tpot_s=setup.slo.tpot_s,
        attainment=attainment,
        metric=metric,
        per_seed_rps=tuple(rates),
    )
