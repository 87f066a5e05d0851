"""Decides when an engine's passes start and end: a lockstep group of ranks under continuous batching.

    submit → [start_pass → end_pass]* → finished

A pass is not preempted: what is submitted while one is under way waits for the next. All ranks start and end
together; a rank without work waits for the others. The host keeps time: `start_pass` says how long the pass
takes, the host calls `end_pass` then. An instance of independent ranks is one engine per rank.

A pass in which every rank only decodes, under policies that say `decodes_always_run`, asks no policy and
costs O(ranks + changes); see `decodes.py` for how.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from headway.core.batch.contract import BatchPolicy, StepReport
from headway.core.errors import InvariantError
from headway.model.cluster import PoolSpec
from headway.model.decodes import Decodes
from headway.model.kv import take_each
from headway.model.rank import Rank
from headway.model.work import Stage, Work

__all__ = ["Engine", "PassOutcome", "State", "Work"]

_SQRT_12 = 12**0.5


class PassOutcome(NamedTuple):
    """What a pass brought about. Tuples have shape (ranks,).

    `first_tokens`: requests whose first token the pass delivered (on a prefill pool they have left).
    `finished`: those that are done and have left. `ran_tokens`: prompt tokens computed; `decodes`: decodes
    that gained a token.
    """

    first_tokens: list[Work]
    finished: list[Work]
    ran_tokens: tuple[int, ...]
    decodes: tuple[int, ...]


class State(NamedTuple):
    """How the ranks stand, as reports say it. Tuples have shape (ranks,).

    `queued_tokens`: prompt tokens received and still to compute. `kv_blocks`: held by requests. `running`:
    requests that hold a seat, decodes and prompts begun. `waiting`: requests received that do not run yet.
    `pab_tokens`: prefill admission budget; None when a policy does not say, or nobody asked.
    """

    queued_tokens: tuple[int, ...]
    kv_blocks: tuple[int, ...]
    running: tuple[int, ...]
    waiting: tuple[int, ...]
    pab_tokens: tuple[int, ...] | None


class Engine:
    """One lockstep group of `len(policies)` ranks of a pool. `rng` draws the jitter; `slowdown` injects
    faults.

    Raises InvariantError when it is driven out of order.
    """

    def __init__(self, pool: PoolSpec, policies: Sequence[BatchPolicy], rng: random.Random) -> None:
        self.pool = pool
        self.slowdown = 1.0
        self.busy = False
        self._rng = rng
        self._costs = pool.costs
        self._host_gap_s, self._block_tokens = pool.host_gap_s, pool.block_tokens
        self._jitter = pool.jitter * _SQRT_12  # width of a uniform distribution of that standard deviation
        self._decodes = Decodes(len(policies), pool.block_tokens)
        self._ranks = [Rank(i, pool, policy, self._decodes) for i, policy in enumerate(policies)]
        self._kvs = [rank.kv for rank in self._ranks]
        self._works: dict[str, Work] = {}
        self._cancelled: list[Work] = []
        self._unasked = all(policy.decodes_always_run for policy in policies)
        self._observers = [r for r in self._ranks if type(r.policy).observe is not BatchPolicy.observe]
        self._no_tokens = (0,) * len(policies)
        self._pass = _Pass(0.0, self._no_tokens, self._no_tokens, ())

    # State, for reports and for hosts

    @property
    def has_work(self) -> bool:
        """Whether a pass would run anything."""
        return bool(self._works)

    @property
    def passes(self) -> int:
        """Passes ended since the start or the last `drop_all`."""
        return self._decodes.clock

    @property
    def preemptions(self) -> int:
        """How often a request lost its KV to an older one."""
        return sum(rank.preemptions for rank in self._ranks)

    @property
    def policy_fallbacks(self) -> int:
        """How often a policy planned nothing although there was work, so that the engine chose."""
        return sum(rank.policy_fallbacks for rank in self._ranks)

    def queued_tokens(self) -> tuple[int, ...]:
        """Prompt tokens received and still to compute."""
        return tuple([rank.queued_tokens for rank in self._ranks])

    def kv_blocks(self) -> tuple[int, ...]:
        """KV blocks that requests hold."""
        return tuple([kv.used for kv in self._kvs])

    def running(self) -> tuple[int, ...]:
        """Requests that hold a seat: decodes and prompts begun."""
        return tuple([rank.running for rank in self._ranks])

    def waiting(self) -> tuple[int, ...]:
        """Requests received that do not run yet."""
        return tuple([len(rank.waiting) + len(rank.arrived) for rank in self._ranks])

    def state(self, now: float, *, pab: bool = True) -> State:
        """Tell all of that at once. `pab`: ask for the admission budgets too, a walk over all requests."""
        budgets = self.pab_tokens(now) if pab else None
        if self._only_decodes():
            counts = tuple(self._decodes.counts)
            return State(self._no_tokens, self.kv_blocks(), counts, self._no_tokens, budgets)
        return State(self.queued_tokens(), self.kv_blocks(), self.running(), self.waiting(), budgets)

    def _only_decodes(self) -> bool:
        """Whether every request here decodes, as nearly always in a decode pool."""
        return len(self._works) == self._decodes.total and not self._cancelled

    def pab_tokens(self, now: float) -> tuple[int, ...] | None:
        """Prefill admission budget of each rank; None when a policy does not say."""
        budgets = []
        for rank in self._ranks:
            budget = rank.policy.admission_budget(rank, now)
            if budget is None:
                return None
            budgets.append(budget)
        return tuple(budgets)

    # Coming and going

    def submit(self, work: Work, rank: int, now: float) -> None:
        """Hand a new `work` to a rank. Raises InvariantError when prompt and first token never fit its KV."""
        if work.request.id in self._works:
            raise InvariantError(f"request {work.request.id} is on this engine already")
        if work.first_token_s is not None:  # delivered by the engine that computed the prompt
            request = work.request
            work.lateness_s = work.first_token_s - request.slo.deadline_s(request.arrival_s, 0)
        self._ranks[rank].submit(work)
        self._works[work.request.id] = work

    def cancel(self, request_id: str) -> Work | None:
        """Withdraw a request (None: not here). What a pass under way computes for it is wasted."""
        work = self._works.pop(request_id, None)
        if work is None:
            return None
        if self.busy and work.stage in (Stage.PREFILLING, Stage.DECODING):
            work.cancelled = True
            self._cancelled.append(work)
        else:
            self._ranks[work.rank].remove(work)
        return work

    def drop_all(self) -> list[Work]:
        """Lose everything, prefix caches and the pass under way too; return the requests that were here."""
        lost = list(self._works.values())
        for work in lost:
            if work.decodes is not None:
                work.decodes.leave(work)
            work.stage = Stage.GONE
        self._works, self._cancelled, self.busy = {}, [], False
        self._decodes = Decodes(len(self._ranks), self._block_tokens)
        for rank in self._ranks:
            rank.clear(self._decodes)
        self._kvs = [rank.kv for rank in self._ranks]
        return lost

    # Passes

    def start_pass(self, now: float) -> float | None:
        """Start a pass; return its duration (s) with host gap and jitter, None if there is nothing to run."""
        if self.busy:
            raise InvariantError("a pass is under way")
        if not self._works:
            return None
        step_s = self._load_plans(now) if self._form(now) else self._load_decodes(now)
        self.busy = True
        if self._jitter:
            step_s *= 1.0 + self._jitter * (self._rng.random() - 0.5)
        return step_s * self.slowdown + self._host_gap_s

    def end_pass(self, now: float) -> PassOutcome:
        """End the pass under way: deliver its tokens at `now`."""
        if not self.busy:
            raise InvariantError("no pass is under way")
        self.busy = False
        run = self._pass
        first_tokens: list[Work] = []
        finished = self._end_planned(now, first_tokens) if run.loads else self._decodes.advance(now, ())
        if finished:
            finished = [self._finish(work) for work in finished if not work.cancelled]
        if self._cancelled:
            self._remove_cancelled()
        if self._observers:
            self._observe(now)
        return PassOutcome(first_tokens, finished, run.ran_tokens, run.decodes)

    def _form(self, now: float) -> bool:
        """Settle what each rank runs; return whether it is more, or less, than all decodes.

        Ranks that only decode, under a policy one need not ask, just grow.
        """
        growth = self._decodes.growth[self._decodes.clock % self._block_tokens]
        if self._unasked and self._only_decodes():
            for index in take_each(self._kvs, growth):
                self._ranks[index].grow_decodes()
            return False
        for rank, blocks in zip(self._ranks, growth, strict=True):
            if rank.waiting or rank.prefilling or rank.arrived or not rank.decodes_always_run:
                rank.form(now)
            elif blocks and not rank.kv.try_take(blocks):
                rank.grow_decodes()
        return any(rank.chunked or rank.skipped for rank in self._ranks)

    def _load_decodes(self, now: float) -> float:
        """Note that the pass runs all decodes and nothing else; return its step time."""
        decodes = self._decodes
        known = decodes.contexts if self._observers else None
        self._pass = _Pass(now, self._no_tokens, tuple(decodes.counts), (), known)
        return self._costs.decode_step_s(decodes.counts, decodes.contexts)

    def _load_plans(self, now: float) -> float:
        """Note what each rank runs; return the step time."""
        loads = tuple([_load(rank) for rank in self._ranks])
        chunks, counts, contexts, attentions, _ = zip(*loads, strict=True)
        self._pass = _Pass(now, chunks, counts, loads)
        if any(chunks):
            return self._costs.step_s(chunks, counts, contexts, attentions)
        return self._costs.decode_step_s(counts, contexts)

    def _end_planned(self, now: float, first_tokens: list[Work]) -> list[Work]:
        """Deliver the tokens of prompts and decodes; add to `first_tokens`, return who is done."""
        skipped = [work for rank in self._ranks for work in rank.skipped]
        finished = self._decodes.advance(now, skipped)
        for rank in self._ranks:
            for work in rank.finish_chunks(now):
                if work.stored_generated == 1:
                    first_tokens.append(work)
                if rank.settle(work):
                    self._left(work, finished)
        return finished

    def _left(self, work: Work, finished: list[Work]) -> None:
        if work.stored_generated >= work.limit:
            finished.append(work)
        else:
            del self._works[work.request.id]

    def _finish(self, work: Work) -> Work:
        if work.stage is not Stage.GONE:
            self._ranks[work.rank].remove(work)
        del self._works[work.request.id]
        work.finished = True
        work.truncated = work.generated_tokens < work.output_tokens
        return work

    def _remove_cancelled(self) -> None:
        for work in self._cancelled:
            self._ranks[work.rank].remove(work)
        self._cancelled = []

    def _observe(self, now: float) -> None:
        for rank in self._observers:
            report = self._pass.report(rank.index, now)
            if report.new_tokens:
                rank.policy.observe(report, now)


class _Load(NamedTuple):
    """What a rank runs in a pass: see `StepReport`; `context_tokens` of decodes and of prompts apart."""

    chunk_tokens: int
    decodes: int
    decode_context_tokens: int
    attention: float
    prompt_context_tokens: int


class _Pass(NamedTuple):
    """The pass under way. `loads` is empty and `contexts` stands in for it where nothing but decodes ran."""

    start_s: float
    ran_tokens: tuple[int, ...]
    decodes: tuple[int, ...]
    loads: tuple[_Load, ...]
    contexts: Sequence[int] | None = None

    def report(self, rank: int, now: float) -> StepReport:
        """Return what rank `rank` ran."""
        decodes, seconds = self.decodes[rank], now - self.start_s
        if not self.loads:
            return StepReport(decodes, decodes, self.contexts[rank] if self.contexts else 0, 0.0, seconds)
        load = self.loads[rank]
        context = load.decode_context_tokens + load.prompt_context_tokens
        return StepReport(load.chunk_tokens + decodes, decodes, context, load.attention, seconds)


def _load(rank: Rank) -> _Load:
    chunks = [(work.chunk_tokens, work.stored_context) for work in rank.chunked]
    return _Load(
        sum([chunk for chunk, _ in chunks]),
        len(rank.decodes) - len(rank.skipped),
        rank.decode_context_tokens - sum([work.context_tokens for work in rank.skipped]),
        sum([chunk * (context + chunk / 2) for chunk, context in chunks]),
        sum([context for _, context in chunks]),
    )
