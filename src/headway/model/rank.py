"""Decides what one rank runs in a pass: its batch policy's plan, as far as blocks, tokens and seats allow.

Rule 1. A request prefilled elsewhere is admitted first come, when a seat is free and its blocks fit; one
        that was preempted here goes before it. No policy is asked.
Rule 2. Decodes come before prompts when blocks are short: the newest request is preempted (a partial prompt
        before a decode), gives its KV back and is computed again from the front of the waiting.
Rule 3. Prompts run in the order of the plan, each chunk cut to the token cap and to the blocks that are free.
Rule 4. A step is never empty while the rank has work: if the plan (or the lack of blocks) makes it so, all
        decodes run, or else the first prompt.
"""

from collections.abc import Collection, Iterable

from headway.core.batch.contract import BatchPolicy, EngineRequest, Plan
from headway.core.errors import InvariantError
from headway.core.events import Role
from headway.model.cluster import PoolSpec
from headway.model.decodes import Decodes
from headway.model.kv import PagedKv
from headway.model.work import Stage, Work

__all__ = ["Rank"]


class Rank:
    """One rank of an engine; it is its own `core.batch.contract.BatchView`, no copying.

    `queued_tokens`: to compute over the waiting and the prefilling. `chunked` and `skipped`: the pass under
    way. `preemptions`, `policy_fallbacks`: since the start.
    """

    def __init__(self, index: int, pool: PoolSpec, policy: BatchPolicy, decodes: Decodes) -> None:
        self.index = index
        self.policy = policy
        self.token_cap = pool.token_cap
        self.block_tokens = pool.block_tokens
        self.decodes_always_run = policy.decodes_always_run
        self.preemptions = 0
        self.policy_fallbacks = 0
        self._prefill_only = pool.role is Role.PREFILL
        self._max_running = pool.max_running
        self._kv_blocks = pool.kv_blocks
        self.clear(decodes)

    def clear(self, decodes: Decodes) -> None:
        """Forget all requests and the prefix cache."""
        self.waiting: list[Work] = []
        self.prefilling: list[Work] = []
        self.arrived: list[Work] = []
        self.decodes = decodes.members[self.index]
        self.kv = PagedKv(self._kv_blocks, self.block_tokens)
        self.queued_tokens = 0
        self.chunked: list[Work] = []
        self.skipped: list[Work] = []
        self._preempted: list[Work] = []  # in the coming pass: they do not begin again at once
        self._decodes = decodes

    @property
    def decode_context_tokens(self) -> int:
        """Sum of `context_tokens` over the decodes."""
        return self._decodes.contexts[self.index]

    @property
    def free_seats(self) -> int:
        """How many waiting prompts may begin."""
        return self._max_running - len(self.decodes) - len(self.prefilling)

    @property
    def free_blocks(self) -> int:
        """KV blocks free or evictable."""
        return self.kv.free

    @property
    def running(self) -> int:
        """Requests that hold a seat."""
        return len(self.decodes) + len(self.prefilling)

    def works(self) -> Iterable[Work]:
        """Everything on this rank."""
        return (*self.decodes, *self.prefilling, *self.arrived, *self.waiting)

    # Coming and going

    def submit(self, work: Work) -> None:
        """Take in a request. Raises InvariantError when it is not new or the KV can never hold it."""
        request = work.request
        if work.stage is not Stage.NEW or (work.prefilled and work.output_tokens < 2):
            raise InvariantError(f"request {request.id}: its work was used before, or has nothing left to do")
        if request.prompt_tokens + 1 > self.kv.tokens:
            raise InvariantError(
                f"request {request.id}: {request.prompt_tokens} prompt tokens never fit {self.kv.tokens}"
            )
        work.rank = self.index
        # The step after token g needs KV for prompt + g: beyond that the rank cannot go even with nothing
        # else on it.
        work.limit = min(work.output_tokens, self.kv.tokens - request.prompt_tokens + 1)
        if work.prefilled:
            work.stage = Stage.ARRIVED
            self.arrived.append(work)
        else:
            work.stage = Stage.WAITING
            self.waiting.append(work)
            self.queued_tokens += work.todo_tokens

    def remove(self, work: Work) -> None:
        """Let go of a request, wherever it is, and of all it holds."""
        if work.stage is Stage.ARRIVED:
            self.arrived.remove(work)
        elif work.stage is Stage.DECODING:
            self._decodes.leave(work)
        else:
            self.queued_tokens -= work.todo_tokens
            (self.prefilling if work.stage is Stage.PREFILLING else self.waiting).remove(work)
        self._release_kv(work)
        work.stage = Stage.GONE

    # A pass: form, then finish

    def form(self, now: float) -> None:
        """Settle what the rank runs in the coming pass."""
        self._preempted = []
        self._admit_arrived()
        if not (self.waiting or self.prefilling or self.decodes):
            return
        if not self.waiting and not self.prefilling and self.decodes_always_run:
            self.grow_decodes()
            return
        plan = self.policy.plan(self, now)
        self._sit_out(plan)
        self.grow_decodes()
        self._take_chunks(plan)
        if not self.chunked and len(self.skipped) == len(self.decodes):
            self._never_empty()

    def grow_decodes(self) -> None:
        """Take the KV blocks that the coming pass's decodes need, preempting the newest while they lack."""
        while (needed := self._decodes.blocks_needed(self.index, self.skipped)) > self.kv.free:
            self._preempt(self.prefilling[-1] if self.prefilling else next(reversed(self.decodes)))
        self.kv.take(needed)
        if self.skipped:
            self.skipped = [work for work in self.skipped if work.stage is Stage.DECODING]

    def finish_chunks(self, now: float) -> list[Work]:
        """Count the chunks of the pass that ended at `now`; return the requests it brought a token."""
        delivered = []
        for work in self.chunked:
            self.queued_tokens -= work.chunk_tokens
            work.stored_context += work.chunk_tokens
            work.chunk_tokens = 0
            work.held_hashes = self.kv.publish(work.request, work.held_hashes, work.stored_context)
            if work.todo_tokens == 0 and not work.cancelled:
                work.deliver(now)
                delivered.append(work)
        self.chunked = []
        self.skipped = []
        return delivered

    def settle(self, work: Work) -> bool:
        """Send a request whose prompt is done on to decode; return whether it leaves the engine instead."""
        if self._prefill_only or work.stored_generated >= work.limit:
            self.prefilling.remove(work)
            self._release_kv(work)
            work.stage = Stage.GONE
            return True
        self.prefilling.remove(work)
        self._decodes.join(work)
        return False

    # Steps of `form`

    def _admit_arrived(self) -> None:
        while self.arrived and self.free_seats > 0 and not (self.waiting and self.waiting[0].preemptions):
            work = self.arrived[0]
            prompt = work.request.prompt_tokens
            held = self.kv.hold_prefix(work.request)
            shared = self.kv.shared_blocks(work.request, held)
            if self.kv.blocks_for(prompt + 1) - shared > self.kv.free:
                self.kv.release_prefix(work.request, held)
                return
            self.kv.take(self.kv.blocks_for(prompt) - shared)
            work.held_hashes = self.kv.publish(work.request, held, prompt)
            work.stored_context = prompt
            del self.arrived[0]
            self._decodes.join(work)

    def _sit_out(self, plan: Plan) -> None:
        skipped: Collection[EngineRequest] = plan.skipped if plan.decode else self.decodes
        if not skipped:
            return
        # Once each, and only what decodes here: a policy may not harm the engine.
        self.skipped = [work for work in dict.fromkeys(skipped) if work in self.decodes]

    def _take_chunks(self, plan: Plan) -> None:
        budget = self.token_cap - len(self.decodes) + len(self.skipped)
        for request, tokens in plan.prefills:
            if budget <= 0:
                return
            assert isinstance(request, Work)
            budget -= self._take_chunk(request, min(tokens, budget))

    def _take_chunk(self, work: Work, tokens: int) -> int:
        """Put up to `tokens` of a prompt into the pass; return how many went in."""
        begins = work.stage is Stage.WAITING
        if work.chunk_tokens or work.rank != self.index or work in self._preempted:
            return 0
        if not (work.stage is Stage.PREFILLING or (begins and self.free_seats > 0)):
            return 0
        if begins:
            self._hold_prefix(work)
        held = self._held_blocks(work)
        tokens = min(
            tokens, work.todo_tokens, (held + self.kv.free) * self.block_tokens - work.stored_context
        )
        if tokens < 1:
            if begins:
                self._release_kv(work)
                work.stored_context = 0
            return 0
        self.kv.take(max(self.kv.blocks_for(work.stored_context + tokens) - held, 0))
        if begins:
            self._begin(work)
        work.chunk_tokens = tokens
        self.chunked.append(work)
        return tokens

    def _hold_prefix(self, work: Work) -> None:
        request = work.request
        work.held_hashes = self.kv.hold_prefix(request)
        cached = self.kv.shared_blocks(request, work.held_hashes) * self.block_tokens
        # Even a prompt that is cached in full computes its last token, or there would be none to answer with.
        work.stored_context = min(cached, request.prompt_tokens - 1)

    def _begin(self, work: Work) -> None:
        self.waiting.remove(work)
        self.prefilling.append(work)
        work.stage = Stage.PREFILLING
        self.queued_tokens -= work.stored_context  # found in the cache

    def _never_empty(self) -> None:
        if self.decodes:
            self.policy_fallbacks += 1
            self.skipped = []
            self.grow_decodes()
            return
        first = self.prefilling[0] if self.prefilling else self.waiting[0]
        if self._take_chunk(first, self.token_cap):
            self.policy_fallbacks += 1
        while not self.chunked:  # partial prompts hold all blocks between them
            self._preempt(self.prefilling[-1])
            self._take_chunk(first, self.token_cap)

    # KV

    def _preempt(self, work: Work) -> None:
        if self.running == 1:
            raise InvariantError(f"request {work.request.id} does not fit a rank of its own")
        if work.stage is Stage.DECODING:
            self._decodes.leave(work)
        else:
            self.prefilling.remove(work)
            self.queued_tokens -= work.todo_tokens
        self._release_kv(work)
        work.stored_context = 0
        work.stage = Stage.WAITING
        work.preemptions += 1
        self.preemptions += 1
        self._preempted.append(work)
        self.waiting.insert(0, work)
        self.queued_tokens += work.todo_tokens

    def _held_blocks(self, work: Work) -> int:
        shared = self.kv.shared_blocks(work.request, work.held_hashes)
        return max(self.kv.blocks_for(work.stored_context), shared)

    def _release_kv(self, work: Work) -> None:
        shared = self.kv.shared_blocks(work.request, work.held_hashes)
        self.kv.give(self._held_blocks(work) - shared)
        self.kv.release_prefix(work.request, work.held_hashes)
        work.held_hashes = 0
