"""The emulator's driver, the only file here that touches engines and batch policies.

Start a pass, sleep for as long as it takes, end it, tell the scheduler, hand out the tokens. One task per
lockstep group.
"""

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from headway.core.batch.contract import BatchPolicy, batch_policies
from headway.core.events import PassEnded, Snapshot
from headway.core.request import Request
from headway.hosts.emulator.clock import Clock
from headway.model.cluster import PoolSpec
from headway.model.engine import PassOutcome
from headway.model.instance import Group, Instance
from headway.model.work import Work

__all__ = ["Driver", "Job", "Pass", "RankLoad", "batch_maker"]

#: A pass begins when the one before was due, not when the timer rang: timers ring up to 1 ms late, which
#: would slow a 20 ms decode step by 5%. Beyond this lag (wall time) the loop is overloaded, and time is lost.
CATCH_UP_S = 0.05


def batch_maker(spec: str, seed: int) -> Callable[[str], BatchPolicy]:
    """Return what makes the policy of a rank, named as "decode-0/3". Raises ConfigError for the spec."""
    cls, settings = batch_policies.find(spec)

    def make(rank: str) -> BatchPolicy:
        made: BatchPolicy = cls(settings, random.Random(f"{seed}/batch/{rank}"))
        return made

    return make


class Job:
    """A request in an engine's care.

    `done` is True when its last token exists, False when the engine died. `on_tokens`, if given, hears after
    each pass how many tokens exist, but for the last one. `begun_s`: when its first token did (model time).
    """

    __slots__ = ("begun_s", "done", "on_tokens", "rank", "work")

    def __init__(
        self,
        request: Request,
        output_tokens: int,
        rank: int,
        *,
        prefilled: bool = False,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self.work = Work(request, output_tokens, prefilled)
        self.rank = rank
        self.on_tokens = on_tokens
        self.begun_s: float | None = None
        self.done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    @property
    def tokens(self) -> int:
        """Output tokens that exist."""
        return self.work.generated_tokens

    @property
    def needs_engine(self) -> bool:
        """Whether there is anything to compute: not when its only token came with its KV."""
        return not (self.work.prefilled and self.work.output_tokens == 1)

    def end(self, finished: bool) -> None:
        """Settle `done`, unless nobody waits any more."""
        if not self.done.done():
            self.done.set_result(finished)


class RankLoad(NamedTuple):
    """Requests that hold a seat and that wait, KV blocks in use."""

    running: int
    waiting: int
    kv_blocks: int


class Pass(NamedTuple):
    """A pass that ended: from which rank on, what it did, preemptions of these ranks since the start."""

    first_rank: int
    outcome: PassOutcome
    preemptions: int


class Driver:
    """Runs the engines of one instance in wall time.

    `publish` is told each pass that ended (times in wall seconds), `on_pass` what it did.
    """

    def __init__(
        self,
        name: str,
        pool: PoolSpec,
        make_batch: Callable[[str], BatchPolicy],
        *,
        seed: int,
        clock: Clock,
        epoch: int,
        publish: Callable[[PassEnded], None],
        on_pass: Callable[[Pass], None],
    ) -> None:
        self.instance = Instance(
            name, pool, make_batch, lambda group: random.Random(f"{seed}/engine/{group}")
        )
        self.instance.epoch = self.instance.told_epoch = epoch
        self.jobs: dict[str, Job] = {}
        self._clock = clock
        self._publish, self._on_pass = publish, on_pass
        self._streams: dict[Group, dict[str, Job]] = {group: {} for group in self.instance.groups}
        self._wanted = {group: asyncio.Event() for group in self.instance.groups}
        self._unhung = asyncio.Event()
        self._unhung.set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to run passes."""
        self._tasks = [asyncio.create_task(self._run(group)) for group in self.instance.groups]
        for task in self._tasks:
            task.add_done_callback(_complain)

    async def close(self) -> None:
        """Stop; jobs that are still here are lost."""
        self.crash()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Requests

    def submit(self, job: Job) -> None:
        """Hand a job to its rank. One that comes with the KV of its prompt has its first token at once."""
        group, place = self.instance.locate(job.rank)
        now = self._clock.now()
        if job.work.prefilled:
            job.work.first_token_s = now
        group.engine.submit(job.work, place, now)
        self.jobs[job.work.request.id] = job
        if job.work.prefilled:
            self._begin(group, job, now)
        self._wanted[group].set()

    def cancel(self, job: Job) -> None:
        """Withdraw a job, wherever it is; nothing happens when it is over."""
        request_id = job.work.request.id
        if self.jobs.pop(request_id, None) is not None:
            group, _ = self.instance.locate(job.rank)
            self._streams[group].pop(request_id, None)
            group.engine.cancel(request_id)

    def quietest_rank(self) -> int:
        """Return where a request without a rank goes: vLLM's internal balance, waiting × 4 + running."""
        loads = self.loads()
        return min(range(len(loads)), key=lambda rank: 4 * loads[rank].waiting + loads[rank].running)

    def loads(self) -> list[RankLoad]:
        """Tell how each rank stands."""
        engines = [group.engine for group in self.instance.groups]
        return [
            RankLoad(*rank)
            for engine in engines
            for rank in zip(engine.running(), engine.waiting(), engine.kv_blocks(), strict=True)
        ]

    # Faults

    def crash(self) -> None:
        """Lose everything and stop running passes."""
        self.instance.die()
        for task in self._tasks:
            task.cancel()
        jobs, self.jobs = self.jobs, {}
        for streams in self._streams.values():
            streams.clear()
        for job in jobs.values():
            job.end(finished=False)

    def hang(self) -> None:
        """Let passes under way never end."""
        self.instance.hung = True
        self._unhung.clear()

    def recover(self) -> bool:
        """Run again as before; return whether that began a new epoch."""
        self.instance.slow_down(1.0)
        self.instance.hung = False
        self._unhung.set()
        if self.instance.alive:
            return False
        self.instance.restart()
        self.start()
        return True

    def snapshot(self) -> Snapshot:
        """Tell how all ranks stand."""
        return self.instance.snapshot(self._clock.now())

    # Passes

    async def _run(self, group: Group) -> None:
        engine, wanted = group.engine, self._wanted[group]
        due_s = -math.inf
        while True:
            while not engine.has_work:
                wanted.clear()
                await wanted.wait()
                due_s = -math.inf  # idle: nothing to catch up with
                # HTTP spreads a batch over milliseconds; an engine's loop takes as long to come round to it.
                await self._clock.until(self._clock.now() + self.instance.pool.host_gap_s)
            await self._unhung.wait()
            now = self._clock.now()
            group.started_s = due_s if now - due_s <= CATCH_UP_S * self._clock.speed else now
            duration_s = engine.start_pass(group.started_s)
            if duration_s is None:  # cancelled meanwhile
                continue
            due_s = group.started_s + duration_s
            await self._clock.until(due_s)
            if self.instance.hung:
                await self._unhung.wait()
                due_s = self._clock.now()
            self._end(group, engine.end_pass(due_s), due_s)

    def _end(self, group: Group, passed: PassOutcome, now: float) -> None:
        report = group.report(passed, now)
        self._publish(replace(report, duration_s=self._clock.wall_s(report.duration_s)))
        for work in passed.first_tokens:
            job = self.jobs.get(work.request.id)
            if job is not None:
                self._begin(group, job, now, silent=work.finished)
        for work in passed.finished:
            self._finish(group, work)
        for job in self._streams[group].values():
            assert job.on_tokens is not None
            job.on_tokens(job.work.generated_tokens)
        self._on_pass(Pass(group.first_rank, passed, group.engine.preemptions))

    def _begin(self, group: Group, job: Job, now: float, *, silent: bool = False) -> None:
        """Note the first token; `silent` when it is the last one too."""
        job.begun_s = now
        if job.on_tokens is not None and not silent:
            self._streams[group][job.work.request.id] = job
            if job.work.prefilled:
                job.on_tokens(1)

    def _finish(self, group: Group, work: Work) -> None:
        request_id = work.request.id
        self._streams[group].pop(request_id, None)
        job = self.jobs.pop(request_id, None)
        if job is not None:
            job.end(finished=True)


def _complain(task: asyncio.Task[None]) -> None:
    """A group whose batch policy broke would stand still without a word."""
    if not task.cancelled() and (error := task.exception()) is not None:
        context = {"message": "an emulated engine stopped", "exception": error, "task": task}
        task.get_loop().call_exception_handler(context)
