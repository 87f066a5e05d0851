"""Keeps account of vLLM's waiting requests, so that no step has to walk its whole queue.

The scheduler's hooks report who comes and who leaves. Where the count does not match vLLM's own queues, for a
request may take ways that no hook sees, the account is made anew from them.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from typing import Any

from headway.hosts.vllm.view import Adopter, Work, is_blocked, second_queue, todo_tokens

__all__ = ["WaitingAccount"]


class WaitingAccount:
    """Tokens of all that wait, and those whose TTFT deadline has not passed, in order of arrival."""

    def __init__(self, scheduler: Any, adopter: Adopter) -> None:
        self._scheduler = scheduler
        self._adopter = adopter
        self._clear()

    def _clear(self) -> None:
        self._total = 0
        self._tokens: dict[str, int] = {}
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._deadlines: list[tuple[float, str]] = []  # a heap; entries of requests that left are passed over

    def add(self, inner: Any, *, first: bool = False) -> None:
        """Note a request that waits from now on. `first`: it comes before all others."""
        name: str = inner.request_id
        self.discard(name)
        work = self._adopter.work_of(inner)
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
        for name in output.preempted_req_ids or ():
            inner = requests.get(name)
            if inner is not None and name not in output.num_scheduled_tokens:
                self.add(inner, first=True)

    def reset(self) -> None:
        """Make the account anew with the next look."""
        self._clear()

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
            if inner is not None and _deadline_s(self._adopter.work_of(inner)) < now:
                del self._open[name]
        for inner in self._open.values():
            if not is_blocked(inner):
                yield self._adopter.shown(inner)

    def _sync(self) -> None:
        waiting, second = self._scheduler.waiting, second_queue(self._scheduler)
        if len(self._tokens) != len(waiting) + len(second):
            self._clear()
            queue: Iterable[Any] = getattr(waiting, "_heap", waiting)
            for inner in (*second, *queue):
                self.add(inner)


def _deadline_s(work: Work) -> float:
    return work.request.arrival_s + work.request.slo.ttft_s
