"""SBS prefill allocation ("PBAA"): pour a batch evenly over the ranks of one instance.

    C_avail[d] = C − queued[d]                       room of rank d in the coming pass
    cost(r, d) = max(1, len(r) − prefix_hit(r, d))   what r adds to it
    r goes to argmax_d (C_avail[d] − cost(r, d)); what fits nowhere stays in the buffer     [P; details R]

A prompt longer than `C` runs over consecutive passes of one rank: it needs a rank with a whole chunk free,
takes
that, and its rest stays queued there, so that the following passes see it as used.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from headway.core.request import Request

__all__ = ["Bin", "pour"]


@dataclass(slots=True)
class Bin:
    """A rank in a pour: its room in the coming pass, in tokens; what it got. `key` is the caller's."""

    key: int
    room: int
    chunk: int


def pour(
    requests: Iterable[Request],
    bins: list[Bin],
    *,
    hits: Callable[[Request], Iterable[tuple[int, int]]] | None = None,
    overflow: bool = False,
) -> list[tuple[Request, int]]:
    """Assign requests, in the order given, to bins; return (request, bin key) pairs and update the rooms.

    `hits` yields (bin key, cached prefix tokens) of a request where that is not 0. With `overflow`, a request
    may go to any rank with room left and run over into the next pass (used when every pass will be full).
    O(n log m) for n requests and m bins, plus the hits.
    """
    by_key = {b.key: b for b in bins}
    heap = [(-b.room, b.key) for b in bins if b.room > 0]
    heapq.heapify(heap)
    placed: list[tuple[Request, int]] = []
    for request in requests:
        if not heap:
            break
        best = _top(heap, by_key)
        if best is None:
            break
        cost = request.prompt_tokens
        left = best.room - cost
        for key, hit in hits(request) if hits else ():
            rank, cheaper = by_key.get(key), max(1, request.prompt_tokens - hit)
            if rank is not None and rank.room - cheaper > left and _fits(cheaper, rank, overflow):
                best, cost, left = rank, cheaper, rank.room - cheaper
        if not _fits(cost, best, overflow):
            continue
        best.room -= cost
        placed.append((request, best.key))
        heapq.heappush(heap, (-best.room, best.key))
    return placed


def _fits(cost: int, rank: Bin, overflow: bool) -> bool:
    """Whether a rank can start on it in the coming pass: with all of it or a whole chunk, or with a part."""
    return min(cost, rank.chunk) <= rank.room or (overflow and rank.room > 0)


def _top(heap: list[tuple[int, int]], by_key: dict[int, Bin]) -> Bin | None:
    """Return the bin with the most room; entries whose room has changed since are stale and dropped."""
    while heap:
        negative, key = heap[0]
        if by_key[key].room == -negative:
            return by_key[key] if negative < 0 else None
        heapq.heappop(heap)
    return None
