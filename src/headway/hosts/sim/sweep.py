"""Many simulations at once: what they share, what tells them apart, and how they are spread over processes.

Every name is checked before the first simulation starts. Results come back in the order of the tasks,
whatever finished first, and equal seeds see equal requests under every policy (common random numbers).
"""

import math
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

from headway.core.batch.contract import batch_policies
from headway.core.cluster import check_cluster
from headway.core.errors import ConfigError, HeadwayError
from headway.core.request import Slo
from headway.hosts.sim.simulate import SimResult, simulate
from headway.model.cluster import ClusterSpec
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.report.metrics import Run, summarise
from headway.report.results import Provenance
from headway.workload import Workload, load_trace, make_items, parametric

__all__ = ["DEFAULT_WORKLOAD", "Progress", "Setup", "Task", "check_policies", "prepare", "run_tasks"]

DEFAULT_WORKLOAD = "azure-code"

#: Called as (done, all): once when the work is under way, then after each simulation or search.
Progress = Callable[[int, int], None]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Setup:
    """What all simulations of a sweep share. `requests`: None takes the whole trace."""

    cluster: ClusterSpec
    workload: Workload
    arrivals: str
    requests: int | None
    slo: Slo

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
    return Setup(spec, source, arrivals, requests, slo)


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


def run_tasks(
    work: Callable[[Setup, T], R],
    setup: Setup,
    tasks: Sequence[T],
    *,
    workers: int | None,
    progress: Progress | None,
) -> list[R]:
    """Return `[work(setup, task) for task in tasks]`, computed by `workers` processes (None: one per core).

    `work` must be a module-level function. Raises what `work` raises; KeyboardInterrupt leaves no process
    behind.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    report = progress or (lambda done, total: None)
    if workers == 1:
        return _run_here(work, setup, tasks, report)
    return _run_in_processes(work, setup, tasks, workers, report)


def _run_here(work: Callable[[Setup, T], R], setup: Setup, tasks: Sequence[T], report: Progress) -> list[R]:
    results = []
    report(0, len(tasks))
    for done, task in enumerate(tasks, start=1):
        results.append(work(setup, task))
        report(done, len(tasks))
    return results


def _run_in_processes(
    work: Callable[[Setup, T], R], setup: Setup, tasks: Sequence[T], workers: int, report: Progress
) -> list[R]:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, _context(), initializer=_start_worker, initargs=(work, setup))
    try:
        with warnings.catch_warnings():
            # The threads it warns of are a linear algebra library's, idle, with fork handlers of their own.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            futures: list[Future[R]] = [pool.submit(_run_in_worker, task) for task in tasks]
        report(0, len(tasks))
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            report(done, len(tasks))
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise HeadwayError("a worker process died, perhaps for lack of memory: try fewer --workers") from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    """Fork where that is safe: a script then needs no `__main__` guard, and workers share its memory."""
    if "fork" in multiprocessing.get_all_start_methods() and threading.active_count() == 1:
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("spawn")


_worker: tuple[Callable[[Setup, Any], Any], Setup] | None = None


def _start_worker(work: Callable[[Setup, Any], Any], setup: Setup) -> None:
    global _worker
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent alone answers it
    _worker = (work, setup)


def _run_in_worker(task: Any) -> Any:
    assert _worker is not None
    work, setup = _worker
    return work(setup, task)
