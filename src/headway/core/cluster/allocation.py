"""SBS prefill allocation ("PBAA"): pour a batch evenly over the ranks of one instance.

    C_avail[d] = C − queued[d]                       room of rank d in the coming pass
    cost(r, d) = max(1, len(r) − prefix_hit(r, d))   what r adds to it
    r goes to argmax_d (C_avail[d] − cost(r, d)); what fits nowhere stays in the buffer     [P; details R]

A prompt longer than `C` runs over consecutive passes of one rank: it needs a rank with a whole chunk free,
takes that, and its rest stays queued there, so that the following passes see it as used.
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

    Of bins with equal room the first takes the request.

    `hits` yields (bin key, cached prefix tokens) of a request where that is not 0. With `overflow`, a request
    may go to any rank with room left and run over into the next pass (used when every pass will be full). O(n
    log m) for n requests and m bins, plus the hits.
    """
    by_key = {b.key: b for b in bins}
    place = {b.key: at for at, b in enumerate(bins)}
    heap = [(-b.room, at) for at, b in enumerate(bins) if b.room > 0]
    heapq.heapify(heap)
    placed: list[tuple[Request, int]] = []
    for request in requests:
        while heap and bins[heap[0][1]].room != -heap[0][0]:
            heapq.heappop(heap)  # a hit took room of this bin since
        if not heap or heap[0][0] >= 0:
            break
        top = best = bins[heap[0][1]]
        cost = request.prompt_tokens
        if hits is not None:
            best, cost = _best_hit(request, top, by_key, hits(request), overflow)
        if cost > best.room and best.chunk > best.room and not overflow:
            continue
        best.room -= cost
        placed.append((request, best.key))
        if best is top:
            heapq.heapreplace(heap, (-best.room, place[best.key]))
        else:
            heapq.heappush(heap, (-best.room, place[best.key]))
    return placed


def _best_hit(
    request: Request, top: Bin, by_key: dict[int, Bin], hits: Iterable[tuple[int, int]], overflow: bool
) -> tuple[Bin, int]:
    """Return the bin with the most room left after the request, and its cost there; `top` has no hit."""
    best, cost = top, request.prompt_tokens
    for key, hit in hits:
        rank, cheaper = by_key.get(key), max(1, request.prompt_tokens - hit)
        if rank is not None and rank.room - cheaper > best.room - cost and _fits(cheaper, rank, overflow):
            best, cost = rank, cheaper
    return best, cost


def _fits(cost: int, rank: Bin, overflow: bool) -> bool:
    """Whether a rank can start on it in the coming pass: with all of it or a whole chunk, or with a part."""
    return min(cost, rank.chunk) <= rank.room or (overflow and rank.room > 0)
