"""Runs jobs wherever they are to run, and decides what a lost worker, an error and a result on disk mean.

1. Results come back in the order of the jobs, whatever ended first.
2. A job whose worker was lost is run again, `MAX_TRIES` times in all; then it has failed. It may be the job
   itself that kills its workers, for want of memory.
3. A job that raised has failed at once: it would raise again.
4. A failure is raised by `run_jobs`; `try_jobs` puts it in the job's place and goes on.
5. What ends is written to the results file before it counts as done; what is there already is not run.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from headway.core.errors import ConfigError, HeadwayError
from headway.hosts.sim.workers import Ended, Where, Workers, open_workers
from headway.report.results_file import ResultsFile

__all__ = ["MAX_TRIES", "Failure", "Job", "Kept", "Progress", "run_jobs", "try_jobs"]

#: How often a job is started before it has failed, when its workers are lost.
MAX_TRIES = 3

#: Called as (done, all): once when the work is under way, then after each job.
Progress = Callable[[int, int], None]

S = TypeVar("S")
C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Job(Generic[C]):
    """One piece of work. `call`: what the function is given; `about`: all that its result depends on.

    `fresh`: run it although its result is on file, since the file has not all of it.
    """

    call: C
    about: dict[str, Any]
    fresh: bool = False

    def __str__(self) -> str:
        """What it is called in a message."""
        parts = [str(self.about[name]) for name in ("cluster", "policy", "batch")]
        if self.about.get("load") is not None:
            parts.append(f"load {self.about['load']:g}")
        elif "rps" in self.about:
            parts.append(f"{self.about['rps']:.3g} req/s")
        return " · ".join([*parts, f"seed {self.about['seed']}"])


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that failed: what it was, and why."""

    about: dict[str, Any]
    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Kept(Generic[R]):
    """Where results are kept, and how one goes into a record of plain values and comes out again."""

    file: ResultsFile
    to_record: Callable[[R], dict[str, Any]]
    from_record: Callable[[dict[str, Any]], R]

    def has(self, job: Job[Any]) -> bool:
        """Whether the result of a job is on file."""
        return self.file.result(job.about) is not None

    def find(self, job: Job[Any]) -> R | None:
        """Return the result of a job that is on file. Raises ConfigError when it cannot be read."""
        record = None if job.fresh else self.file.result(job.about)
        if record is None:
            return None
        try:
            return self.from_record(record)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.file.path}: the result of {job} cannot be read: {error!r}") from None


def run_jobs(
    work: Callable[[S, C], R],
    shared: S,
    jobs: Sequence[Job[C]],
    *,
    where: Where,
    progress: Progress | None = None,
    kept: Kept[R] | None = None,
) -> list[R]:
    """Return `work(shared, job.call)` for every job. `work` must be a module-level function.

    Raises what the first failed job raised, or HeadwayError when its workers were lost. Whatever is raised,
    KeyboardInterrupt too, no worker is left behind.
    """
    books = _Books(jobs, kept, keep_going=False)
    _run(work, shared, books, where, progress)
    return [result for result in books.in_order() if not isinstance(result, Failure)]


def try_jobs(
    work: Callable[[S, C], R],
    shared: S,
    jobs: Sequence[Job[C]],
    *,
    where: Where,
    progress: Progress | None = None,
    kept: Kept[R] | None = None,
) -> list[R | Failure]:
    """As `run_jobs`, but go on after a failure: it stands in the job's place."""
    books = _Books(jobs, kept, keep_going=True)
    _run(work, shared, books, where, progress)
    return books.in_order()


def _run(
    work: Callable[[S, C], R],
    shared: S,
    books: "_Books[C, R]",
    where: Where,
    progress: Progress | None,
) -> None:
    if not books.queue:
        return
    report = progress or (lambda done, total: None)
    with closing(open_workers(where, work, shared, len(books.queue))) as workers:
        _fill(workers, books)
        report(len(books.results), len(books.jobs))
        while books.under_way:
            for ended in workers.wait():
                books.settle(ended)
            _fill(workers, books)
            report(len(books.results), len(books.jobs))


def _fill(workers: Workers, books: "_Books[Any, Any]") -> None:
    """Start jobs while there are slots; one at least, while a cluster has no CPU yet."""
    while books.queue and len(books.under_way) < max(1, workers.slots):
        number = books.queue.popleft()
        workers.start(number, books.jobs[number].call)
        books.under_way.add(number)


class _Books(Generic[C, R]):
    """What is still to be done, what is under way, how often it was tried and what came of it."""

    def __init__(self, jobs: Sequence[Job[C]], kept: Kept[R] | None, keep_going: bool) -> None:
        self.jobs = jobs
        self.results: dict[int, R | Failure] = {}
        self.under_way: set[int] = set()
        self._kept = kept
        self._keep_going = keep_going
        self._lost: Counter[int] = Counter()
        if kept:
            found = ((number, kept.find(job)) for number, job in enumerate(jobs))
            self.results.update((number, result) for number, result in found if result is not None)
        self.queue = deque(number for number in range(len(jobs)) if number not in self.results)

    def in_order(self) -> list[R | Failure]:
        """Return what came of each job, when all are settled."""
        return [self.results[number] for number in range(len(self.jobs))]

    def settle(self, ended: Ended) -> None:
        """Note the end of a job: done, to be tried again, or failed."""
        self.under_way.remove(ended.number)
        if ended.lost is not None:
            self._lost[ended.number] += 1
            if self._lost[ended.number] < MAX_TRIES:
                self.queue.append(ended.number)
            else:
                self._fail(ended, f"lost {MAX_TRIES} times: {ended.lost}")
        elif ended.error is not None:
            self._fail(ended, f"{type(ended.error).__name__}: {ended.error}")
        else:
            job = self.jobs[ended.number]
            if self._kept and not self._kept.has(job):
                self._kept.file.add(job.about, self._kept.to_record(ended.result))
            self.results[ended.number] = ended.result

    def _fail(self, ended: Ended, why: str) -> None:
        job = self.jobs[ended.number]
        if self._kept:
            self._kept.file.add_failure(job.about, why)
        if not self._keep_going:
            raise ended.error or HeadwayError(f"{job}: {why}")
        self.results[ended.number] = Failure(job.about, str(job), why)
