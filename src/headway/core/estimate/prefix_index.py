"""Which prefix blocks each rank probably holds, so that a request can go where its prompt is half computed.

A belief made from what was dispatched: engines evict without telling, so a rank remembers a bounded number
of blocks, least recently used out first. A reverse index (block → ranks) answers `best` by walking the
request's own blocks: the cost depends on the prompt and on the ranks that hold its first block, not on the
size of the cluster.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from headway.core.errors import ConfigError
from headway.core.request import Request

__all__ = ["PrefixIndex"]

Key = TypeVar("Key", bound=Hashable)


class PrefixIndex(Generic[Key]):
    """Prefix blocks by rank. `Key` names a rank, usually (instance, rank).

    `blocks_per_rank`: hashes remembered for one rank. Raises ConfigError when it is under 1.
    """

    __slots__ = ("_blocks_per_rank", "_held", "_holders")

    def __init__(self, blocks_per_rank: int = 32_768) -> None:
        if blocks_per_rank < 1:
            raise ConfigError(f"blocks_per_rank must be at least 1, got {blocks_per_rank}")
        self._blocks_per_rank = blocks_per_rank
        self._held: dict[Key, OrderedDict[int, None]] = {}
        # Inner dicts serve as sets that keep their order, so that equal events give equal answers.
        self._holders: dict[int, dict[Key, None]] = {}

    def note(self, rank_key: Key, hashes: Iterable[int]) -> None:
        """Remember that the rank computed these blocks, in order from the start of the prompt."""
        held = self._held.setdefault(rank_key, OrderedDict())
        # Last block first: the start of a prefix, which everything behind it needs, is then the last to go.
        for block in reversed(tuple(hashes)):
            held[block] = None
            held.move_to_end(block)
            self._holders.setdefault(block, {})[rank_key] = None
        while len(held) > self._blocks_per_rank:
            self._drop(rank_key, held.popitem(last=False)[0])

    def forget(self, rank_key: Key) -> None:
        """Forget a rank: it restarted or is gone."""
        for block in self._held.pop(rank_key, ()):
            self._drop(rank_key, block)

    def hit_tokens(self, rank_key: Key, request: Request) -> int:
        """Tokens of the prompt the rank need not compute: its longest leading run, at most all but one token.

        The last token is always computed, for the first output token comes out of it.
        """
        held = self._held.get(rank_key)
        if not held or not request.prefix or request.prefix[0] not in held:
            return 0
        run = 0
        for block in request.prefix:
            if block not in held:
                break
            run += 1
        return _tokens(run, request)

    def best(self, request: Request) -> list[tuple[Key, int]]:
        """Return (rank, hit tokens) of every rank that holds the start of the prompt, longest hit first."""
        found: list[tuple[Key, int]] = []
        left = dict(self._holders.get(request.prefix[0], ())) if request.prefix else {}
        for run, block in enumerate(request.prefix[1:], start=1):
            if not left:
                break
            holders = self._holders.get(block, {})
            ended = [key for key in left if key not in holders]
            found += [(key, _tokens(run, request)) for key in ended]
            for key in ended:
                del left[key]
        found += [(key, _tokens(len(request.prefix), request)) for key in left]
        found.reverse()
        return [hit for hit in found if hit[1] > 0]

    def _drop(self, rank_key: Key, block: int) -> None:
        holders = self._holders[block]
        del holders[rank_key]
        if not holders:
            del self._holders[block]


def _tokens(run: int, request: Request) -> int:
    return min(run * request.prefix_block_tokens, request.prompt_tokens - 1)
