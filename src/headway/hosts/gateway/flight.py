"""A request on its way through the gateway: what it waits for, where it is, and how it is taken back.

The policy speaks to it through the driver (`dispatched`, `rejected`, `recalled`); the task that serves it
awaits `place`. Whatever interrupts a leg before its first byte (a recall, a worker that goes down, a time
that is up) ends the flight's `scope`, and with it all legs of the request at once.
"""

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from headway.core.actions import Dispatch, Recall, Reject
from headway.core.errors import EngineError
from headway.core.events import Event, Failed, Finished, Role
from headway.core.fault_attribution import Fault, RequestFaults
from headway.core.request import Request
from headway.front.errors import Refusal, rejected
from headway.front.requests import Call
from headway.front.transport import Sink
from headway.front.worker import Worker
from headway.hosts.gateway.tracing import NO_TRACE, Trace

__all__ = ["EngineSaysNo", "Flight", "LegError", "RecalledError"]


class EngineSaysNo(Exception):  # noqa: N818  an answer, not a fault
    """An engine's answer that is no success. Its body is for the client alone: it may repeat the prompt,
    which no log may hold.
    """

    def __init__(
        self, status: int, content_type: str, body: bytes, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(f"the engine answers {status}")
        self.status = status
        self.content_type = content_type
        self.body = body
        self.retry_after_s = retry_after_s


class LegError(EngineError):
    """An engine failed a request, or this host could not have it served there.

    `fault`: how; None: an error of the worker's, without one this host's. `status`: what the client gets if
    nothing else helps and there is no `answer`, which is the engine's own. `silent`: the engines that owed a
    byte when time was up: some of them may hang.
    """

    def __init__(
        self,
        reason: str,
        *,
        status: int = 502,
        worker: Worker | None = None,
        fault: Fault | None = None,
        answer: EngineSaysNo | None = None,
        silent: tuple[Worker, ...] = (),
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.worker = worker
        self.fault = fault or (Fault.OURS if worker is None else Fault.ERROR)
        self.answer = answer
        self.silent = silent


class RecalledError(Exception):
    """The policy took the request back: it waits for another place."""


class Flight:
    """One request. Times are the clock's, None until they come.

    `hold_began_s`: since when it waits for a place; a refusal by an engine that has enough does not begin it
    anew. `patience_s`: how long the engine that was asked last may be silent.
    """

    scheduled = True

    def __init__(
        self,
        request: Request,
        call: Call,
        headers: Mapping[str, str],
        sink: Sink,
        *,
        role_of: Callable[[str], Role | None],
        clock: Callable[[], float],
        retries: int = 0,
        trace: Trace = NO_TRACE,
    ) -> None:
        self.request = request
        self.call = call
        self.headers = headers
        self.sink = sink
        self.trace = trace
        self.faults = RequestFaults(retries)
        self.attempts = 0  # that engines failed
        self.tries = 0  # all, recalled ones too
        self.waits = False  # counted in the buffer
        self.prefilled = False
        self.over = False
        self.refusal: Refusal | None = None
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.dispatched_s: float | None = None
        self.first_byte_s: float | None = None
        self.prefill_done_s: float | None = None
        self.hold_began_s: float | None = None
        self.patience_s = 0.0
        self.ended_s: float | None = None
        self.instances: list[str] = []
        self.owing: tuple[Worker, ...] = ()  # that were asked and have not answered
        self.why = ""  # of the last dispatch
        self.code = ""  # of the error the client was given
        self.status = 200  # of an answer that was passed on
        self._role_of = role_of
        self._clock = clock
        self._places: dict[Role, Dispatch] = {}
        self._awaited: tuple[Role, asyncio.Future[Dispatch | None]] | None = None
        self._scope: asyncio.Timeout | None = None
        self._cut: Exception | None = None

    @property
    def trace_id(self) -> str | None:
        """Of its trace, if it has one."""
        return self.trace.trace_id

    # What the policy says

    def dispatched(self, action: Dispatch) -> None:
        """See `Waiter.dispatched`. The place of a worker that is gone meanwhile is found out by the leg."""
        role = self._role_of(action.instance) or Role.AGGREGATED
        self.why = action.why
        if self._awaited is not None and self._awaited[0] is role and not self._awaited[1].done():
            self._awaited[1].set_result(action)
        else:
            self._places[role] = action

    def rejected(self, action: Reject) -> None:
        """See `Waiter.rejected`."""
        self.refusal = rejected(action, self.request.prompt_tokens)
        self._cut = None  # a refusal is the last word
        self._interrupt(self.refusal)

    def recalled(self, action: Recall) -> None:
        """See `Waiter.recalled`."""
        self._places.clear()
        self._interrupt(RecalledError(action.why))

    def abandon(self, worker: Worker) -> None:
        """Give up the legs, unless bytes have gone out: what streams may still come to its end."""
        if not self.sink.started:
            self._interrupt(LegError(f"{worker.name} is down", status=503, worker=worker, fault=Fault.DOWN))

    def role_at_last(self) -> Role | None:
        """Return what the engine of the last leg does; None when there was none, or it was removed."""
        return self._role_of(self.instances[-1]) if self.instances else None

    # What the serving task does

    def begin_again(self) -> None:
        """Forget what an attempt had come to."""
        self.prefilled = False
        self.prefill_done_s = None

    def engine_done(self, feed: Callable[[Event], object]) -> None:
        """Tell the policy that the last token exists."""
        if not self.over:
            self.over = True
            feed(Finished(self.request.id, self.output_tokens or 0))

    def failed_in_stream(self, feed: Callable[[Event], object], status: int) -> None:
        """Tell the policy that the engine ended the stream with an error event, which the client has."""
        self.status, self.code = status, "engine_error"
        if not self.over:
            self.over = True
            feed(Failed(self.request.id, "an error event in the stream", retry=False))

    async def place(self, role: Role, timeout_s: float) -> Dispatch | None:
        """Wait to be dispatched to an instance of this role. Return None when that takes too long."""
        ready = self._places.pop(role, None)
        if ready is not None:
            return ready
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Dispatch | None] = loop.create_future()
        self._awaited = (role, future)
        timer = loop.call_later(timeout_s, _give_up, future)
        try:
            return await future
        finally:
            timer.cancel()
            self._awaited = None

    def forget_places(self) -> None:
        """Places given for an attempt that failed are void."""
        self._places.clear()

    async def let_cut(self) -> None:
        """Let a cut take effect that was decided in this turn of the loop, before the first byte goes out:
        of a request that was taken back, the client would get that byte twice.
        """
        while self._cut is not None:
            await asyncio.sleep(0)

    def limit(self, seconds: float | None) -> None:
        """Let the scope end by itself after so long; None: never."""
        if self._scope is not None and self._cut is None and not self._scope.expired():
            self._scope.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    def expect(self, worker: Worker, within_s: float) -> None:
        """Let the scope end after so long unless `limit` says otherwise; who was not `heard` is silent."""
        self.heard(worker)  # it owes once
        self.owing += (worker,)
        self.patience_s = max(self.patience_s, within_s)
        self.limit(within_s)

    def heard(self, worker: Worker) -> None:
        """Note that an engine has answered."""
        self.owing = tuple(each for each in self.owing if each is not worker)

    def client_stalls(self) -> None:
        """Give up on a client that does not read: it counts as gone, and no engine is to blame."""
        self._interrupt(ConnectionAbortedError("the client does not read"))

    async def __aenter__(self) -> Self:
        """Enter the scope of one attempt."""
        if self._cut is not None:
            cut, self._cut = self._cut, None
            raise cut
        self.owing, self.patience_s = (), 0.0
        self._scope = asyncio.timeout(None)
        await self._scope.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        scope, self._scope = self._scope, None
        assert scope is not None
        try:
            await scope.__aexit__(kind, error, trace)
        except TimeoutError:
            if not scope.expired():
                raise
            cut, self._cut = self._cut, None
            if cut is not None:
                raise cut from None
            raise self._silence() from None
        if (
            self._cut is not None and error is not None
        ):  # the cut came while the attempt was failing by itself
            self._cut = None

    def _silence(self) -> LegError:
        silent = self.owing
        who = " and ".join(worker.name for worker in silent) or "the engine"
        worker = silent[0] if silent else None
        reason = f"{who} was silent for too long"
        return LegError(reason, status=504, worker=worker, fault=Fault.SLOW, silent=silent)

    def _interrupt(self, cut: Exception) -> None:
        """End the wait or the legs of this attempt with `cut`."""
        if self.over or self._cut is not None:
            return
        if self._awaited is not None and not self._awaited[1].done():
            self._awaited[1].set_exception(cut)
            return
        self._cut = cut
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())


def _give_up(future: asyncio.Future[Dispatch | None]) -> None:
    if not future.done():
        future.set_result(None)
