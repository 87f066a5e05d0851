"""Topologies for a workload and its targets: every one that fits the GPUs is simulated at every rate.

import headway
result = headway.sweep(workload="azure-conv", gpus=64, ep=[8, 16, 32], pd=["1:1", "3:1"], requests=2000)
result.front()     # the points that nothing beats: goodput per GPU against latency

A simulation that fails does not end a sweep: it stands in the result with its reason.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from headway.core.errors import ConfigError
from headway.hosts.sim.jobs import Failure, Job, Kept, Progress, try_jobs
from headway.hosts.sim.setup import (
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
from headway.model.topology import Refusal, Topology, topologies
from headway.report.metrics import Distribution, Run, distribution
from headway.report.results import Cell, Provenance
from headway.report.results_file import results_file, run_from_record, run_to_record
from headway.report.sweep_result import FailedRun, Point, SweepResult, latency_measure

__all__ = ["SweepResult", "sweep"]

_Result = tuple[Run, Distribution]
_Call = tuple[ClusterSpec, Task]


def sweep(
    *,
    trace: str | Path | None = None,
    workload: str | None = None,
    system: Sequence[str] = ("h200",),
    gpus: int | None = None,
    ep: Sequence[int] = (8, 16, 32),
    prefill_ep: Sequence[int] | None = None,
    decode_ep: Sequence[int] | None = None,
    pd: Sequence[str] = ("1:1", "2:1", "3:1"),
    chunk: Sequence[int] = (4096,),
    policies: Sequence[str] = ("staggered",),
    batch: Sequence[str] = ("vllm-v1",),
    load: Sequence[float] | None = None,
    rps: Sequence[float] | None = None,
    arrivals: str | None = None,
    requests: int | None = None,
    seed: int = 0,
    seeds: int = 1,
    slo_ttft_s: float | None = None,
    slo_tpot_s: float | None = None,
    latency: str = "ttft-p99",
    attainment: float = 0.9,
    workers: int | None = None,
    backend: str = "processes",
    address: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> SweepResult:
    """Simulate topologies × policies × batch policies × rates × seeds, and return what each did for its GPUs.

    Topologies are DeepSeek-V3 with prefill and decode apart on "h100" or "h200". `ep` is tried for prefill
    and decode in all pairs, unless `prefill_ep` or `decode_ep` name a pool's own. `pd`: prefill to decode
    instances, repeated as often as `gpus` allow (None: once). `chunk`: tokens of a prefill pass per rank.
    `load` is a fraction of each topology's own nominal capacity, `rps` the same rate for all.

    `latency`: "ttft-p99" and the like. Only points with at least `attainment` of the requests within both
    SLOs (None: TTFT 2 s, TPOT 50 ms) can be on the front. Other arguments, and errors, as in `compare`.
    """
    where = Where(backend, address, workers)
    measure = latency_measure(latency)
    if not 0.0 <= attainment <= 1.0:
        raise ConfigError(f"attainment must be between 0 and 1, got {attainment!r}")
    clusters, refused = topologies(
        systems=system,
        gpus=gpus,
        prefill_ep=prefill_ep or ep,
        decode_ep=decode_ep or ep,
        ratios=[_ratio(text) for text in pd],
        chunks=chunk,
    )
    if not clusters:
        raise ConfigError(_nothing_fits(refused))
    first = next(iter(clusters.values()))
    shared = prepare(
        trace=trace,
        workload=workload,
        cluster=first,
        arrivals=arrivals,
        requests=requests,
        slo_ttft_s=slo_ttft_s,
        slo_tpot_s=slo_tpot_s,
    )
    policies, batch = names(policies), names(batch)
    check_policies(first, policies, batch)
    seed_list = seed_range(seed, seeds)
    setups = {topology: replace(shared, cluster=cluster) for topology, cluster in clusters.items()}
    wanted = [
        (topology, Task(p, b, x, r, s))
        for topology, setup in setups.items()
        for x, r in rates(setup, load, rps)
        for p in policies
        for b in batch
        for s in seed_list
    ]
    jobs = [_job(setups[topology], topology, task) for topology, task in wanted]
    with results_file(out, resume=resume) as file:
        kept = Kept(file, _to_record, run_from_record) if file else None
        results = try_jobs(_run, shared, jobs, where=where, progress=progress, kept=kept)
    runs = [
        (topology, r[0])
        for (topology, _), r in zip(wanted, results, strict=True)
        if not isinstance(r, Failure)
    ]
    return SweepResult(
        workload=shared.workload.name,
        points=_points(runs),
        provenance=_provenance(shared, command or command_line(), seed_list, requests),
        latency=measure,
        attainment=attainment,
        refused=refused,
        failed=[FailedRun(result.name, result.why) for result in results if isinstance(result, Failure)],
    )


def _ratio(text: str) -> tuple[int, int]:
    prefill, _, decode = text.partition(":")
    if not (prefill.isdecimal() and decode.isdecimal()):
        raise ConfigError(f"P:D ratio {text!r}: write prefill and decode instances, such as 3:1")
    return int(prefill), int(decode)


def _nothing_fits(refused: Sequence[Refusal]) -> str:
    if not refused:
        return "name at least one system, EP size, P:D ratio and chunk"
    first = refused[0]
    return f"none of {len(refused)} topologies can be; {first.topology.name}: {first.why}"


def _job(setup: Setup, topology: Topology, task: Task) -> Job[_Call]:
    return Job((setup.cluster, task), setup.about() | asdict(topology) | task.about())


def _run(shared: Setup, call: _Call) -> _Result:
    cluster, task = call
    result = replace(shared, cluster=cluster).simulate(task)
    return task.summarise(result), distribution(result.outcomes)


def _to_record(result: _Result) -> dict[str, Any]:
    return run_to_record(*result)


def _points(runs: Sequence[tuple[Topology, Run]]) -> list[Point]:
    """Group runs over their seeds, in the order of the runs."""
    groups: dict[tuple[Topology, float, str, str], list[Run]] = {}
    for topology, run in runs:
        groups.setdefault((topology, run.rps, run.policy, run.batch), []).append(run)
    return [
        Point(topology, Cell(policy, batch, group[0].load, rps, tuple(group)))
        for (topology, rps, policy, batch), group in groups.items()
    ]


def _provenance(shared: Setup, command: str, seeds: Sequence[int], requests: int | None) -> Provenance:
    """Each topology has a nominal capacity of its own, so that there is none to tell."""
    basis = shared.provenance(command, seeds, requests or len(shared.workload))
    return replace(basis, cluster_source=f"such as {shared.cluster.source}", nominal_rps=math.nan)
