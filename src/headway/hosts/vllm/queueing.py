"""Brings requests to the front of vLLM's waiting queue for one step, and puts those back that did not begin.

The queue is a deque of thousands: what is done here costs time for each request that is moved, and beside it
only what rotating a deque costs (a microsecond for a thousand).
"""

from collections import deque
from itertools import islice
from typing import Any

__all__ = ["Moved"]

#: Requests this near to the front are looked for one by one.
_NEAR = 256


class Moved:
    """Requests that were moved to the front of a queue, until `undo()`.

    Those that did not begin get their old places back: else the queue is not first come first any more.
    """

    __slots__ = ("_followers", "_front", "_queue")

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._front: list[Any] = []  # the front as it was, as far as it changed
        self._followers: list[tuple[Any, int, Any]] = []  # from far behind: who, its place, who came after it

    def to_front(self, wanted: list[Any]) -> None:
        """Bring the requests to the front in this order. One that is not in the queue is left out."""
        queue = self._queue
        if not wanted or all(inner is other for inner, other in zip(wanted, queue, strict=False)):
            return
        near, far = self._find(wanted)
        moved = {id(inner) for inner in far.values()}
        for place in sorted(far, reverse=True):
            after = next((queue[n] for n in range(place + 1, len(queue)) if id(queue[n]) not in moved), None)
            self._followers.append((far[place], place, after))
        _take_out(queue, sorted(far))
        self._front = [queue.popleft() for _ in range(near)]
        known = {id(inner) for inner in self._front} | moved
        chosen = {id(inner) for inner in wanted}
        front = [inner for inner in wanted if id(inner) in known]
        front += [inner for inner in self._front if id(inner) not in chosen]
        queue.extendleft(reversed(front))

    def _find(self, wanted: list[Any]) -> tuple[int, dict[int, Any]]:
        """Return how deep the near ones lie, and the far ones by place."""
        missing = {id(inner): inner for inner in wanted}
        depth = 0
        for place, inner in enumerate(islice(self._queue, _NEAR)):
            if missing.pop(id(inner), None) is not None:
                depth = place + 1
                if not missing:
                    return depth, {}
        far: dict[int, Any] = {}
        for inner in missing.values():
            found = _place_of(self._queue, inner)
            if found is not None:
                far[found] = inner
        return depth, far

    def undo(self) -> None:
        """Put back those that did not begin."""
        if not self._front and not self._followers:
            return
        queue = self._queue
        back = self._come_back()
        for inner, place, after in reversed(
            back
        ):  # from front to back: two with one follower keep their order
            queue.insert(_place_before(queue, after, place), inner)
        known = {id(inner) for inner in self._front}
        places: list[int] = []
        stayed: set[int] = set()
        for place, inner in enumerate(queue):
            if id(inner) in known:
                places.append(place)
                stayed.add(id(inner))
                if len(stayed) == len(known):
                    break
            elif not inner.num_preemptions:
                break  # vLLM takes from the front and puts back at the front, in order: the rest is untouched
        for place, inner in zip(places, [each for each in self._front if id(each) in stayed], strict=True):
            queue[place] = inner

    def _come_back(self) -> list[tuple[Any, int, Any]]:
        """Take those out of the front again that came from far behind and did not begin."""
        queue = self._queue
        far = {id(inner) for inner, _, _ in self._followers}
        near = far | {id(inner) for inner in self._front}
        taken: set[int] = set()
        kept: list[Any] = []
        while far != taken and queue and (id(queue[0]) in near or queue[0].num_preemptions):
            inner = queue.popleft()
            if id(inner) in far:
                taken.add(id(inner))
            else:
                kept.append(inner)
        queue.extendleft(reversed(kept))
        return [each for each in self._followers if id(each[0]) in taken]


def _take_out(queue: Any, places: list[int]) -> None:
    """Remove the requests at these places, in ascending order, with one turn of the queue."""
    turned = 0
    for gone, place in enumerate(places):
        queue.rotate(turned - (place - gone))
        turned = place - gone
        queue.popleft()
    queue.rotate(turned)


def _place_of(queue: deque[Any], inner: Any) -> int | None:
    """Return where a request is. Most of the queue is in order of arrival, which finds it at once."""
    low, high = 0, len(queue)
    while low < high:
        middle = (low + high) // 2
        if queue[middle].arrival_time < inner.arrival_time:
            low = middle + 1
        else:
            high = middle
    for place in range(max(low - 4, 0), min(low + 4, len(queue))):
        if queue[place] is inner:
            return place
    return next((place for place, other in enumerate(queue) if other is inner), None)


def _place_before(queue: deque[Any], after: Any, place: int) -> int:
    """Return the place of `after`, which was behind `place`; the end of the queue for none."""
    if after is None:
        return len(queue)
    found = _place_of(queue, after)
    return min(place, len(queue)) if found is None else found
