"""Keeps account of vLLM's waiting requests, so that no step has to walk its whole queue.

The scheduler's hooks report who comes and who leaves. Where the count does not match vLLM's own queues, for a
request may take ways that no hook sees, the account is made anew from them.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import chain, islice
from typing import Any, overload

from headway.core.batch import EngineRequest
from headway.hosts.vllm.head import SIGHT, Head
from headway.hosts.vllm.view import Adopter, Work, is_blocked, second_queue, todo_tokens

__all__ = ["Waiting", "WaitingAccount"]

#: Waiting requests looked at in one go, at least.
_LEAST_LOOK = 8


class WaitingAccount:
    """Tokens of all that wait, and those whose TTFT deadline has not passed, in order of arrival."""

    def __init__(self, scheduler: Any, adopter: Adopter) -> None:
        self._scheduler = scheduler
        self.adopter = adopter
        self.head = Head(adopter)
        self._clear()

    def _clear(self) -> None:
        self._total = 0
        self._tokens: dict[str, int] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._deadlines: list[tuple[float, str]] = []  # a heap; entries of requests that left are passed over

    @property
    def queue(self) -> Any:
        """vLLM's queue."""
        return self._scheduler.waiting

    def look(self, ahead: list[Any]) -> "Waiting":
        """Return what waits, behind requests that vLLM looks at first."""
        return Waiting(ahead, self)

    def add(self, inner: Any, *, first: bool = False) -> None:
        """Note a request that waits from now on. `first`: it comes before all others."""
        name: str = inner.request_id
        self.discard(name)
        work = self.adopter.work_of(inner)
        self._tokens[name] = tokens = todo_tokens(inner)
        self._total += tokens
        self._open[name] = inner
        if first:
            self._open.move_to_end(name, last=False)
        heappush(self._deadlines, (work.request.arrival_s + work.request.slo.ttft_s, name))

    def discard(self, name: str) -> None:
        """Note that a request does not wait any more, if it did."""
        self._total -= self._tokens.pop(name, 0)
        self._open.pop(name, None)

    def took(self, output: Any) -> None:
        """Note what a step that vLLM formed has begun, resumed and preempted."""
        for new in output.scheduled_new_reqs:
            self.discard(new.req_id)
        for name in output.scheduled_cached_reqs.resumed_req_ids:
            self.discard(name)
        requests = self._scheduler.requests
        if output.preempted_req_ids:
            self.head.clear()
        for name in output.preempted_req_ids or ():
            inner = requests.get(name)
            if inner is not None and name not in output.num_scheduled_tokens:
                self.add(inner, first=True)

    def reset(self) -> None:
        """Make the account anew with the next look."""
        self._clear()
        self.head.clear()

    def queued_tokens(self) -> int:
        """Return the tokens to compute over all that wait, but for those nothing can be done about yet."""
        self._sync()
        tokens = self._total
        for inner in second_queue(self._scheduler):  # those that hold KV: a few
            tokens -= self._tokens.get(inner.request_id, 0)
            tokens += 0 if is_blocked(inner) else todo_tokens(inner)
        return tokens

    def open_at(self, now: float) -> Iterator[Work]:
        """Return those whose TTFT deadline is not before `now`, in order of arrival."""
        self._sync()
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] < now:
            _, name = heappop(deadlines)
            inner = self._open.get(name)
            if inner is not None and _deadline_s(self.adopter.work_of(inner)) < now:
                del self._open[name]
        coming, count = iter(self._open.values()), 8
        while inners := list(islice(coming, count)):
            yield from self.adopter.show(inners)
            count = min(2 * count, 128)

    def _sync(self) -> None:
        waiting, second = self._scheduler.waiting, second_queue(self._scheduler)
        if len(self._tokens) != len(waiting) + len(second):
            self._clear()
            queue: Iterable[Any] = getattr(waiting, "_heap", waiting)
            for inner in (*second, *queue):
                self.add(inner)


def _deadline_s(work: Work) -> float:
    return work.request.arrival_s + work.request.slo.ttft_s


class Waiting(Sequence[EngineRequest]):
    """vLLM's waiting requests, looked at only as far as somebody reads, and once. `len` may count a few that
    are blocked. `ahead`: requests that vLLM looks at before its queue.
    """

    __slots__ = ("_account", "_front", "_more", "_queued", "_seen")

    def __init__(self, ahead: list[Any], account: "WaitingAccount") -> None:
        self._account = account
        queue = account.queue
        # What is known of the front from earlier steps.
        self._front: Head | None = None if ahead or not account.head.follow(queue) else account.head
        # A priority queue in order costs O(n log n) comparisons in Python, each step. Its heap as it lies has
        # the first ones first, and vLLM keeps the order of priorities in any case.
        self._queued = getattr(queue, "_heap", queue)
        self._seen: list[Work] = []
        known = 0 if self._front is None else len(self._front.works)
        self._more: Iterator[Any] | None = islice(chain(ahead, self._queued), known, None)

    def __bool__(self) -> bool:
        return bool(self._seen) or next(iter(self), None) is not None

    def __len__(self) -> int:
        return len(self._seen) if self._more is None else len(self._queued)

    def __iter__(self) -> Iterator[EngineRequest]:
        return iter(self._seen) if self._more is None else self._look()

    def _look(self) -> Iterator[EngineRequest]:
        place = 0
        while place < len(self._seen) or self._look_further():
            known = self._seen[place:]
            place += len(known)
            yield from known

    def open_at(self, now: float) -> Iterator[EngineRequest]:
        """Return those whose TTFT deadline is not over, as the contract has it."""
        return self._account.open_at(now)

    def by_deadline(self, count: int) -> Sequence[EngineRequest] | None:
        """Return the first `count` by TTFT deadline, if that is known without looking at them."""
        return self._front.ordered if self._front is not None and count == SIGHT else None

    def earliest_s(self, count: int) -> float | None:
        """Return the earliest arrival of the first `count`, if that is known without looking at them."""
        return self._front.earliest_s if self._front is not None and count == SIGHT else None

    def _look_further(self) -> bool:
        """Look at as many again as were seen. Return False if there are no more."""
        place = len(self._seen)
        if self._front is not None and place < len(self._front.works):
            self._seen += self._front.works[place : place + max(place, _LEAST_LOOK)]
            return True
        while self._more is not None:
            inners = list(islice(self._more, max(len(self._seen), _LEAST_LOOK)))
            works = self._account.adopter.show(inners)
            self._seen += works
            if not inners:
                self._more = None
            if works:
                return True
        return False

    @overload
    def __getitem__(self, index: int) -> EngineRequest: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EngineRequest]: ...
    def __getitem__(self, index: int | slice) -> EngineRequest | Sequence[EngineRequest]:
        if index == -1 and self._queued:  # the usual question: who came last
            return self._account.adopter.work_of(self._queued[-1])
        if isinstance(index, slice) and index.stop is not None and index.stop >= 0 <= (index.start or 0):
            while len(self._seen) < index.stop and self._look_further():
                pass
            return self._seen[index]
        return list(self)[index]
