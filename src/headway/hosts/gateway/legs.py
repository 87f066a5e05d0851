"""Carries out one leg of a request: send it to an engine, and stream the answer or keep it.

Rule 1. What a leg holds (its seat at the worker, its connection) is released in `finally`.
Rule 2. Nothing goes to the client before the engine has answered well: until then the leg may be made
        elsewhere.
Rule 3. An engine's 4xx is the client's affair and is passed on. With a 429 or 503 it has enough to do; any
        other 5xx it failed: what that means is decided by `core/fault_attribution.py`.
Rule 4. What this replica decided as the leader of its pool is sent only while it leads still, and with the
        token of its term: an engine that has seen a newer one refuses.
Rule 5. A stream that breaks after its first byte is never repeated: the client gets an error event and a cut
        connection, so that it cannot take the half for the whole.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from headway.core.actions import Dispatch
from headway.core.events import Event, PrefillDone, Role
from headway.core.fault_attribution import Fault
from headway.front.config import LimitsSpec
from headway.front.headers import headers_for_client, read_retry_after
from headway.front.lease import Elector
from headway.front.place_wait import PlaceWait
from headway.front.token_stream import EventWeights, TokenStream
from headway.front.transport import Answer, Body, ExhaustedError, Transport, TransportError
from headway.front.usage import Usage, error_status, usage_of
from headway.front.worker import Worker
from headway.front.workers import Workers
from headway.hosts.gateway.flight import EngineSaysNo, Flight, LegError
from headway.hosts.gateway.idle import Idle

__all__ = ["Legs"]


class Legs:
    """What dialects make a request's way of."""

    def __init__(
        self,
        workers: Workers,
        transport: Transport,
        feed: Callable[[Event], object],
        limits: LimitsSpec,
        *,
        elector: Elector,
        clock: Callable[[], float],
        dispatched: Callable[[Flight, Dispatch], None],
        engine_headers: Mapping[str, str],
    ) -> None:
        self._workers = workers
        self._transport = transport
        self._feed = feed
        self._limits = limits
        self._wait = PlaceWait(workers, limits, clock)
        self._elector = elector
        self._clock = clock
        self._dispatched = dispatched
        self._engine_headers = dict(engine_headers)
        self._weights = EventWeights()

    async def place(self, flight: Flight, role: Role) -> tuple[Worker, Dispatch]:
        """Wait for a place of this role. Raises LegError when the worker is gone by then, and Refusal when
        no engine is up for `no_engine_timeout_s`, or none took the request in `queue_timeout_s`.
        """
        if flight.hold_began_s is None:
            flight.hold_began_s = self._clock()
        began_s, roles = flight.hold_began_s, _needed(role)
        while (
            dispatch := await flight.place(role, self._wait.left_s(began_s, roles, flight.request.model))
        ) is None:
            self._wait.check(began_s, roles, flight.request.model)
        self._dispatched(flight, dispatch)
        worker = self._workers.get(dispatch.instance)
        if worker is None:
            raise LegError(f"{dispatch.instance} was removed", status=503)
        return worker, dispatch

    async def stream(self, flight: Flight, worker: Worker, dispatch: Dispatch, body: Body) -> None:
        """Send the last leg of a request, and its answer to the client."""
        async with self._open(flight, worker, dispatch, body, self._patience_s(flight)) as answer:
            if _streams(answer):
                await self._forward(flight, worker, answer)
            else:
                await self._hand_over(flight, worker, answer)

    async def ask(self, flight: Flight, worker: Worker, dispatch: Dispatch, body: Body) -> bytes:
        """Send a prefill leg and return its answer, which says that the prefill is done."""
        patience_s = self._limits.first_byte_timeout_s
        async with self._open(flight, worker, dispatch, body, patience_s) as answer:
            answered = await self._read(worker, answer)
            self._heard(flight, worker)
            self.prefill_done(flight, worker)
            flight.hold_began_s = None  # the wait for a decode engine is another one
        return answered

    async def accompany(self, flight: Flight, worker: Worker, dispatch: Dispatch, body: Body) -> None:
        """Send a prefill leg whose answer goes nowhere; its first token says that the prefill is done."""
        try:
            async with self._open(flight, worker, dispatch, body, self._patience_s(flight)) as answer:
                tokens = _tokens_of(answer)
                async for piece in answer.chunks():
                    self._heard(flight, worker)
                    if tokens is not None:
                        tokens.add(piece)
                    if tokens is None or tokens.started:
                        self.prefill_done(flight, worker)
        except TransportError as error:
            if not flight.prefilled:
                raise self._broken(worker, error) from None
        except LegError:
            if not flight.sink.started:  # else the decode leg does without it
                raise

    def prefill_done(self, flight: Flight, worker: Worker) -> None:
        """Tell the policy, once, that the prompt is computed."""
        if not flight.prefilled:
            flight.prefilled = True
            flight.prefill_done_s = self._clock()
            self._feed(PrefillDone(flight.request.id))
        worker.inference.prefilled(flight.request.id)

    def hung(self, flight: Flight, error: LegError) -> list[Worker]:
        """Return the engines that timed out and answered no other request in that time."""
        patience_s = self._limits.idle_timeout_s if flight.sink.started else flight.patience_s
        since_s = self._clock() - patience_s
        return [worker for worker in error.silent if worker.health.answered_s <= since_s]

    def _patience_s(self, flight: Flight) -> float:
        """Return how long an engine may take to its first byte, which ends an answer that does not stream."""
        limits = self._limits
        return limits.first_byte_timeout_s if flight.call.stream else limits.answer_timeout_s

    def kv_has_expired(self, flight: Flight) -> bool:
        """Whether the engine that computed the prompt may have given its KV away since."""
        done_s = flight.prefill_done_s
        return done_s is not None and self._clock() - done_s > self._limits.kv_lease_s

    @asynccontextmanager
    async def _open(
        self, flight: Flight, worker: Worker, dispatch: Dispatch, body: Body, patience_s: float
    ) -> AsyncIterator[Answer]:
        request = flight.request
        worker.legs.add(flight)
        if worker.spec.role is not Role.DECODE:
            streams = flight.call.stream or worker.spec.role is Role.PREFILL
            worker.inference.sent(
                request.id, dispatch.rank, dispatch.number, request.prompt_tokens, streams=streams
            )
        answer: Answer | None = None
        flight.expect(worker, patience_s)
        try:
            answer = await self._send(flight, worker, dispatch, body)
            yield answer
            if flight.status < 500:
                self._workers.worked(worker)
        finally:
            if answer is not None:
                answer.close()
            worker.legs.discard(flight)
            worker.inference.gone(request.id)

    async def _send(self, flight: Flight, worker: Worker, dispatch: Dispatch, body: Body) -> Answer:
        if not self._elector.leads():  # it did when the policy decided
            raise LegError("this replica does not lead the pool any more", status=503)
        url = worker.spec.rank_url(dispatch.rank) + flight.call.path
        try:
            answer = await self._transport.send("POST", url, self._headers(flight, worker, dispatch), body)
        except TransportError as error:
            raise self._broken(worker, error) from None
        if answer.status < 300:
            return answer
        try:
            if self._elector.fenced(answer.status, answer.headers):
                raise LegError(f"{worker.name} has seen a newer leader", status=503)
            reason = await self._read(worker, answer)
        finally:
            answer.close()
        raise _refusal(worker, answer.status, reason, answer.headers)

    def _headers(self, flight: Flight, worker: Worker, dispatch: Dispatch) -> dict[str, str]:
        headers = {
            **flight.headers,
            **self._engine_headers,
            **self._elector.headers(),
            "Content-Type": "application/json",
            "x-request-id": f"{flight.request.id}.{flight.tries}",
            "x-headway-dispatch": str(worker.wire_number(dispatch.number)),
        }
        if worker.ranks > 1 and worker.spec.rank_by == "header":
            headers["X-data-parallel-rank"] = str(dispatch.rank)
        return headers

    async def _read(self, worker: Worker, answer: Answer) -> bytes:
        try:
            return await answer.read()
        except TransportError as error:
            raise self._broken(worker, error) from None

    def _broken(self, worker: Worker, error: TransportError) -> LegError:
        if isinstance(error, ExhaustedError):
            return LegError(str(error), status=503)
        fault = Fault.UNREACHABLE if error.refused else Fault.BROKEN
        return LegError(f"{worker.name}: {error}", worker=worker, fault=fault)

    async def _hand_over(self, flight: Flight, worker: Worker, answer: Answer) -> None:
        """Pass on an answer that is whole. The engine is done before the client has it."""
        body = await self._read(worker, answer)
        await flight.let_cut()
        self._first_byte(flight, worker)
        self._note(flight, usage_of(body))
        flight.engine_done(self._feed)
        await flight.sink.answer(answer.status, _passed_on(answer, worker), body)

    async def _forward(self, flight: Flight, worker: Worker, answer: Answer) -> None:
        """Pass on a stream, byte for byte from the first token on (`front/token_stream.py`)."""
        tokens = TokenStream()
        sink = flight.sink
        idle = Idle(self._limits.idle_timeout_s, lambda: flight.expect(worker, 0.0), flight.client_stalls)

        def push(piece: bytes) -> bool:
            seen = tokens.events
            tokens.add(piece)
            if tokens.events != seen:
                idle.active = True
            return sink.push(piece)

        async def caught_up() -> None:
            idle.writing = True
            await sink.written()
            idle.writing = False

        try:
            begun = await self._await_token(worker, answer, tokens, idle)
            await flight.let_cut()
            self._first_byte(flight, worker)
            idle.start()
            await sink.start(answer.status, _passed_on(answer, worker))
            if not sink.push(begun):
                await caught_up()
            await answer.pour(push, caught_up)
        except TransportError as error:
            self._note(flight, tokens.usage(self._weights, worker.name))
            raise self._broken(worker, error) from None
        finally:
            idle.stop()
        tokens.finish()
        self._note(flight, tokens.usage(self._weights, worker.name))
        if tokens.error is None:
            flight.engine_done(self._feed)
        else:
            flight.failed_in_stream(self._feed, error_status(tokens.error))
        await flight.sink.end()

    async def _await_token(self, worker: Worker, answer: Answer, tokens: TokenStream, idle: Idle) -> bytes:
        """Read a stream to its first token; return what goes to the client. From the first bytes on an engine
        that sends no token, comments or not, is idle.
        """
        begun = b""
        while not tokens.started:
            piece = await answer.next()
            if not piece:
                if rest := tokens.finish():
                    return rest
                raise LegError(f"{worker.name}: a stream without a token", worker=worker)
            begun = tokens.add(piece)
            if tokens.error is not None:
                raise _said_in(tokens.error, worker)
            idle.start()
        return begun

    def _first_byte(self, flight: Flight, worker: Worker) -> None:
        flight.first_byte_s = self._clock()
        flight.limit(None)
        for each in flight.owing:  # a decode engine's byte is the prefill engine's answer too
            self._heard(flight, each)
        self.prefill_done(flight, worker)
        for failure in flight.faults.served():
            failed = self._workers.get(failure.engine)
            if failed is not None:
                self._workers.at_fault(failed, failure.reason)

    def _heard(self, flight: Flight, worker: Worker) -> None:
        flight.heard(worker)
        worker.health.answered_s = self._clock()

    def _note(self, flight: Flight, usage: Usage) -> None:
        flight.prompt_tokens, flight.output_tokens = usage


def _needed(role: Role) -> tuple[Role, ...]:
    """Return the roles that must have engines for a request that waits for this one."""
    return (Role.PREFILL, Role.DECODE) if role is Role.PREFILL else (role,)


def _refusal(worker: Worker, status: int, said: bytes, headers: Mapping[str, str]) -> EngineSaysNo | LegError:
    """Return what an engine's answer means that is no success (rule 3)."""
    content_type = headers.get("content-type", "application/json")
    answer = EngineSaysNo(status, content_type, said, retry_after_s=read_retry_after(headers))
    if status < 500 and status not in (408, 429):
        return answer
    fault = Fault.BACKPRESSURE if status in (429, 503) else Fault.ERROR
    return LegError(
        f"{worker.name} answers {status}", status=status, worker=worker, fault=fault, answer=answer
    )


def _said_in(data: bytes, worker: Worker) -> EngineSaysNo | LegError:
    """Return what an error event means that comes before any token: vLLM answers 200 before it looks."""
    return _refusal(worker, error_status(data), data, {})


def _streams(answer: Answer) -> bool:
    return answer.headers.get("content-type", "").startswith("text/event-stream")


def _tokens_of(answer: Answer) -> TokenStream | None:
    """Return what finds the tokens of an answer; None for one that does not stream."""
    return TokenStream() if _streams(answer) else None


def _passed_on(answer: Answer, worker: Worker) -> dict[str, str]:
    """Return the headers of an engine's answer for the client."""
    return {"Content-Type": "application/json", **headers_for_client(answer.headers, worker.spec.url)}
