"""Policies side by side: every policy, batch policy, load and seed is one simulation.

import headway
result = headway.compare(workload="azure-code", policies=["staggered", "least-tokens"], load=[0.5, 0.8])
result.rows()      # one record per run, for a DataFrame
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.hosts.sim.jobs import Job, Kept, Progress, run_jobs
from headway.hosts.sim.setup import (
    DEFAULT_LOADS,
    Setup,
    Task,
    check_policies,
    command_line,
    names,
    prepare,
    rates,
    seed_range,
)
from headway.hosts.sim.workers import Where
from headway.model.cluster import ClusterSpec
from headway.report.metrics import Distribution, PassRecord, Run, distribution
from headway.report.results import Comparison, Provenance
from headway.report.results_file import results_file, run_from_record, run_to_record

__all__ = ["DEFAULT_LOADS", "Comparison", "Provenance", "Run", "compare", "default_batch", "default_policies"]

#: The load whose passes are drawn: busy enough that bubbles matter, not yet a queue without end.
_TIMELINE_LOAD = 0.75
#: Where in the run the drawn stretch begins, how many passes it should show, and how long it may be.
_TIMELINE_START = 0.4
_TIMELINE_PASSES = 12
_TIMELINE_MOST_S = 10.0

_Result = tuple[Run, Distribution, list[PassRecord]]


def default_policies(cluster: ClusterSpec) -> list[str]:
    """What is compared when nothing is named: ours against the strongest and the plainest baselines."""
    if cluster.disaggregated:
        return ["staggered", "triage", "least-tokens", "round-robin"]
    if sum(pool.instances * pool.ranks for pool in cluster.pools) == 1:
        return ["least-tokens"]  # there is but one place to send a request to
    return ["pab", "least-tokens", "round-robin"]


def default_batch(cluster: ClusterSpec) -> list[str]:
    """What runs in the engines when nothing is named: on a single engine, what is to be compared."""
    if cluster.disaggregated:
        return ["vllm-v1"]
    if default_policies(cluster) == ["least-tokens"]:
        return ["vllm-v1", "stall-free:token_budget=2048", "fair:anchor=first-token", "triage"]
    return ["fair:anchor=first-token"]  # which tells its admission budget, as `pab` needs


def compare(
    *,
    trace: str | Path | None = None,
    workload: str | None = None,
    cluster: str | Path | ClusterSpec = "dsv3-h200-pd",
    policies: Sequence[str] | None = None,
    batch: Sequence[str] | None = None,
    load: Sequence[float] | None = None,
    rps: Sequence[float] | None = None,
    arrivals: str | None = None,
    requests: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    workers: int | None = None,
    backend: str = "processes",
    address: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    timeline: bool = False,
    command: str | None = None,
) -> Comparison:
    """Simulate every policy × batch policy × rate × seed and return what each did to latency.

    `load` is a fraction of nominal capacity; `rps` gives rates in requests per second instead. `arrivals`:
    "recorded" (default for a trace), "poisson" (default otherwise) or "gamma:CV". `requests`: None takes the
    whole trace. SLOs in seconds; None takes the cluster's. `timeline` keeps the passes of a window in
    mid-run. `backend`: "processes" of this machine or "ray", at `address` (None: a Ray of its own); `workers`
    simulations at a time. `out`: write each result to this file as it comes (`ResultsFile`); `resume` takes
    those that are there. Raises ConfigError, before any simulation, for whatever is wrong with the input.
    """
    where = Where(backend, address, workers)
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
    pairs = rates(setup, load, rps)
    seed_list = seed_range(seed, seeds)
    tasks = [Task(p, b, x, r, s) for x, r in pairs for p in policies for b in batch for s in seed_list]
    shown = min(pairs, key=lambda rate: abs((rate[0] or rate[1] / setup.nominal_rps) - _TIMELINE_LOAD))
    drawn = [timeline and task.rps == shown[1] and task.seed == seed for task in tasks]
    jobs = [_job(setup, task, keep_passes) for task, keep_passes in zip(tasks, drawn, strict=True)]
    with results_file(out, resume=resume) as file:
        kept = Kept(file, _to_record, _from_record) if file else None
        results = run_jobs(_run, setup, jobs, where=where, progress=progress, kept=kept)
    runs = [run for run, _, _ in results]
    comparison = Comparison(
        cluster=setup.cluster.name,
        workload=setup.workload.name,
        runs=runs,
        provenance=setup.provenance(command or command_line(), seed_list, runs[0].requests),
        distributions=[distribution for _, distribution, _ in results],
    )
    for index, passes in _common_window(results).items():
        comparison.timelines[comparison.label(runs[index].policy, runs[index].batch)] = passes
    return comparison


def _job(setup: Setup, task: Task, keep_passes: bool) -> Job[tuple[Task, bool]]:
    """Passes are not on file: where they are to be drawn, the simulation runs again."""
    return Job((task, keep_passes), setup.about() | task.about(), fresh=keep_passes)


def _to_record(result: _Result) -> dict[str, Any]:
    return run_to_record(result[0], result[1])


def _from_record(record: dict[str, Any]) -> _Result:
    return (*run_from_record(record), [])


def _run(setup: Setup, work: tuple[Task, bool]) -> _Result:
    task, keep_passes = work
    result = setup.simulate(task, keep_passes=keep_passes)
    start_s = _TIMELINE_START * result.outcomes[-1].arrival_s
    passes = _between(result.passes, start_s, start_s + _TIMELINE_MOST_S)
    return task.summarise(result), distribution(result.outcomes), passes


def _common_window(results: Sequence[_Result]) -> dict[int, list[PassRecord]]:
    """Cut the kept passes, by index of result, to one stretch with several prefills in it."""
    kept = {index: passes for index, (_, _, passes) in enumerate(results) if passes}
    every = [p for passes in kept.values() for p in passes]
    prompts_s = [p.end_s - p.start_s for p in every if any(p.prefill_tokens)]
    start_s = min((p.end_s for p in every), default=0.0)
    end_s = start_s + min(_TIMELINE_MOST_S, _TIMELINE_PASSES * statistics.fmean(prompts_s or [0.1]))
    return {index: _between(passes, start_s, end_s) for index, passes in kept.items()}


def _between(passes: Sequence[PassRecord], start_s: float, end_s: float) -> list[PassRecord]:
    return [p for p in passes if p.end_s > start_s and p.start_s < end_s]
