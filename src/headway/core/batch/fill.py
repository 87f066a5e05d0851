"""How a step is filled with prompts once a policy has put them in order: tokens, seats and KV blocks.

Rule 1. A chunk is what the tokens left in the step, the KV blocks and the policy's own limit allow.
Rule 2. A prompt begins only if a seat is free and the blocks hold all of it, beside the rest of the prompts
   begun before it. Otherwise half-computed prompts could fill the KV together and none of them ever end.
Rule 3. When one prompt cannot begin, no later one begins in its place (it would never get its blocks);
   prompts already begun still run.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat

from headway.core.batch.contract import BatchView, EngineRequest, Plan

__all__ = ["Prompt", "fill", "first_come"]

#: A request with a prompt to compute, and whether it would begin now (it waits, holding no seat and no KV).
Prompt = tuple[EngineRequest, bool]
#: (request, most tokens) → tokens the policy lets it have; anything under `most` ends the filling.
Allow = Callable[[EngineRequest, int], int]


def first_come(view: BatchView) -> Iterator[Prompt]:
    """Prompts begun before, then waiting ones, first come first."""
    return chain(zip(view.prefilling, repeat(False)), zip(view.waiting, repeat(True)))


def fill(
    view: BatchView,
    tokens: int,
    prompts: Iterable[Prompt] | None = None,
    *,
    allow: Allow | None = None,
    whole: bool = False,
) -> Plan:
    """Take prompts in the order given (`first_come` when None) until `tokens` are planned; return the plan:
    these chunks, every decode, and who was kept out by rule 2 for want of blocks alone.

    `prompts` is read only as far as needed. `whole`: a prompt is split only if it is first, for it may be
    longer than a step.
    """
    planned: list[tuple[EngineRequest, int]] = []
    if tokens <= 0:
        return Plan(planned)
    blocks = _Blocks(view)
    blocked: EngineRequest | None = None
    starved = False  # a prompt begun, of blocks: another one would take them from it
    seats, partial, may_begin = view.free_seats, len(view.prefilling), True
    for work, begins in first_come(view) if prompts is None else prompts:
        if begins:
            if may_begin and seats > 0 and not blocks.reserve(work):
                blocked = work
            may_begin = may_begin and seats > 0 and blocked is None
            if not may_begin:
                if not partial:
                    break
                continue
            seats -= 1
        else:
            partial -= 1
        todo = work.todo_tokens
        most = min(todo, tokens, blocks.room(work))
        if whole and most < todo and planned:
            return Plan(planned)
        chunk = most if allow is None or most < 1 else allow(work, most)
        if chunk > 0:
            planned.append((work, chunk))
            blocks.take(work, chunk)
            tokens -= chunk
        if tokens <= 0 or chunk < most:
            return Plan(planned)
        starved = starved or chunk < todo
    if blocked is None or starved:
        return Plan(planned)
    return Plan(planned, blocked=(blocked, tokens))


class _Blocks:
    """KV blocks of a step: `free` now, and `promised` to the rest of the prompts begun."""

    __slots__ = ("free", "promised", "size")

    def __init__(self, view: BatchView) -> None:
        self.size = view.block_tokens
        # A decode needs a new block every `size` steps.
        self.free = view.free_blocks - len(view.decodes) // self.size
        self.promised = 0
        for work in view.prefilling:
            self.promised += self._grown(work, work.todo_tokens)

    def reserve(self, work: EngineRequest) -> bool:
        """Promise a waiting prompt all its blocks, or say that they are not there."""
        need = self._grown(work, work.todo_tokens)
        if need > self.free - self.promised:
            return False
        self.promised += need
        return True

    def room(self, work: EngineRequest) -> int:
        """Tokens of the request that the free blocks and its own last block hold."""
        context = work.context_tokens
        return (max(self.free, 0) - (-context // self.size)) * self.size - context

    def take(self, work: EngineRequest, chunk: int) -> None:
        """Turn promised blocks into used ones."""
        used = self._grown(work, chunk)
        self.free -= used
        self.promised -= used

    def _grown(self, work: EngineRequest, tokens: int) -> int:
        context = work.context_tokens
        return -(-(context + tokens) // self.size) + (-context // self.size)
