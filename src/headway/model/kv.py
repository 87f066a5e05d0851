"""Decides what fits: the paged KV of one rank and its block-hash prefix cache.

Rule 1. Memory is counted in blocks of `block_tokens`; a request holds whole blocks.
Rule 2. A prefix is known by hashes, one per `prefix_block_tokens` of prompt; a hash stands for everything
        up to its end, so equal hashes mean equal prefixes. Shared blocks are counted once, however many
        requests hold them.
Rule 3. Blocks of a hash that nobody holds stay cached while there is room: they count as free, and the one
        unused for longest is evicted first (of one prefix, its tail first: a head is of use without its
        tail).
"""

from collections.abc import Sequence

from headway.core.errors import InvariantError
from headway.core.request import Request

__all__ = ["PagedKv", "take_each"]


class _Shared:
    """The blocks of one hash and how many requests hold them."""

    __slots__ = ("blocks", "holders")

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.holders = 0


class PagedKv:
    """KV of one rank. `blocks`: all there are; `used`: held by requests; `cached`: evictable."""

    __slots__ = ("_idle", "_shared", "block_tokens", "blocks", "cached", "used")

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.used = 0
        self.cached = 0
        self._shared: dict[int, _Shared] = {}
        self._idle: dict[int, _Shared] = {}  # nobody holds these; longest unused first

    @property
    def free(self) -> int:
        """Blocks free or evictable."""
        return self.blocks - self.used

    @property
    def tokens(self) -> int:
        """Most tokens the rank can hold."""
        return self.blocks * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold `tokens`."""
        return -(-tokens // self.block_tokens)

    def take(self, blocks: int) -> None:
        """Hold `blocks` more, evicting what is cached. Raises InvariantError when they are not free."""
        if not self.try_take(blocks):
            raise InvariantError(f"took {blocks} KV blocks with only {self.free} free")

    def try_take(self, blocks: int) -> bool:
        """Hold `blocks` more if they are free; return whether they were."""
        if self.used + blocks > self.blocks:
            return False
        self.used += blocks
        while self.used + self.cached > self.blocks:
            self._evict()
        return True

    def give(self, blocks: int) -> None:
        """Give `blocks` back. Raises InvariantError when more come back than were taken."""
        self.used -= blocks
        if self.used < 0:
            raise InvariantError(f"{-self.used} KV blocks too many were given back")

    def shared_blocks(self, request: Request, hashes: int) -> int:
        """Return how many whole blocks the first `hashes` of the request's prefix fill."""
        return hashes * request.prefix_block_tokens // self.block_tokens

    def hold_prefix(self, request: Request) -> int:
        """Hold the longest cached run of the request's prefix; return how many hashes it has."""
        held = 0
        for number in request.prefix:
            if number not in self._shared or (held + 1) * request.prefix_block_tokens > request.prompt_tokens:
                break
            self._hold(number)
            held += 1
        return held

    def release_prefix(self, request: Request, hashes: int) -> None:
        """Let go of the first `hashes` of the prefix; the tail becomes evictable before the head."""
        for number in reversed(request.prefix[:hashes]):
            shared = self._shared[number]
            shared.holders -= 1
            if not shared.holders:
                self._idle[number] = shared
                self.used -= shared.blocks
                self.cached += shared.blocks

    def publish(self, request: Request, hashes: int, computed_tokens: int) -> int:
        """Share the prefix blocks computed by now; return how many hashes the request holds.

        It held the first `hashes` before. Where another request was quicker, its copy is held and ours given
        back.
        """
        size = request.prefix_block_tokens
        known = min(computed_tokens, request.prompt_tokens) // size if size else 0
        for index in range(hashes, min(known, len(request.prefix))):
            number = request.prefix[index]
            blocks = self.shared_blocks(request, index + 1) - self.shared_blocks(request, index)
            self.used -= blocks
            if number not in self._shared:
                self._shared[number] = self._idle[number] = _Shared(blocks)
                self.cached += blocks
            self._hold(number)
            hashes = index + 1
        return hashes

    def _hold(self, number: int) -> None:
        shared = self._shared[number]
        if not shared.holders:
            del self._idle[number]
            self.cached -= shared.blocks
            self.used += shared.blocks
        shared.holders += 1

    def _evict(self) -> None:
        number = next(iter(self._idle))
        self.cached -= self._idle.pop(number).blocks
        del self._shared[number]


def take_each(kvs: Sequence[PagedKv], blocks: Sequence[int]) -> list[int]:
    """`try_take` on each of the ranks; return the indices of those whose blocks are not free.

    A lockstep group does this in every pass: one loop, and no call where nothing has to be evicted.
    """
    lacking = []
    for index, (kv, more) in enumerate(zip(kvs, blocks, strict=True)):
        if kv.used + kv.cached + more <= kv.blocks:
            kv.used += more
        elif not kv.try_take(more):
            lacking.append(index)
    return lacking
