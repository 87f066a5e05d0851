"""Pass a request on to one engine as it is: everything that the policy does not place.

The policy schedules prompts and their tokens, of which the gateway learns nothing here; the engine with the
fewest requests is taken. For the rest these requests are like the others: they count against the bounds, a
drain waits for them, and an engine's silence ends them. They are sent once, because the gateway does not
know whether it is safe to repeat them. The one exception is a reused connection that turns out to be closed
before any byte of an answer: then they are sent once more on a new one (`front/transport.py`).
"""

import asyncio
import re
from collections.abc import Mapping

from headway.front.body_reader import BodyReader
from headway.front.buffer import Buffer
from headway.front.config import LimitsSpec
from headway.front.errors import Refusal, bad_request, engine_failed, unavailable
from headway.front.headers import CREDENTIALS, HOP_BY_HOP, error_for_client, headers_for_client, nominated
from headway.front.model_field import body_with_model
from headway.front.transport import Answer, ExhaustedError, Sink, Transport, TransportError
from headway.front.worker import Worker
from headway.front.workers import Workers
from headway.hosts.gateway.endpoints import Endpoint, Kind, roles_for
from headway.hosts.gateway.idle import Idle

__all__ = ["Passthrough", "check_query"]

#: Request headers that never reach an engine: they steer it, or the gateway sets them.
_RESERVED = ("x-data-parallel-rank", "x-headway-", "x-request-id")
_QUERY = re.compile(r"[^\s#]*")
#: The `model` field of a multipart form is looked for in so much of the body.
_FORM_BYTES = 65_536
_BOUNDARY = re.compile(r'boundary="?([^\s";,]{1,200})', re.IGNORECASE)
_NAMES_MODEL = re.compile(rb'[;\s]name="?model"?(?:[;\s]|$)', re.IGNORECASE)
_LONGEST_NAME = 512


class _Passing:
    """A request at an engine, which whoever gives up on it can end."""

    scheduled = False

    def __init__(self, sink: Sink, scope: asyncio.Timeout, why: Exception) -> None:
        self.why = why  # once the scope has expired
        self._sink = sink
        self._scope = scope

    def abandon(self, worker: Worker) -> None:
        """See `Leg.abandon`."""
        if not self._sink.started:
            self.end(engine_failed(503))

    def answered(self) -> None:
        """Stop the timer for the response head; from now on the idle timer watches."""
        if not self._scope.expired():
            self._scope.reschedule(None)

    def end(self, why: Exception) -> None:
        """End the request with `why`."""
        if not self._scope.expired():
            self.why = why
            self._scope.reschedule(asyncio.get_running_loop().time())


class Passthrough:
    """Send a request to one engine and stream its answer back."""

    def __init__(
        self,
        workers: Workers,
        transport: Transport,
        buffer: Buffer,
        limits: LimitsSpec,
        *,
        reader: BodyReader,
        engine_headers: Mapping[str, str],
        keep_authorization: bool,
    ) -> None:
        self._workers = workers
        self._transport = transport
        self._buffer = buffer
        self._limits = limits
        self._reader = reader
        self._engine_headers = dict(engine_headers)
        # Engines would see two keys: ours goes in place of the client's.
        given = {name.lower() for name in engine_headers}
        self._dropped = (
            HOP_BY_HOP | CREDENTIALS | given | (set() if keep_authorization else {"authorization"})
        )
        self._clock = asyncio.get_running_loop().time

    async def serve(
        self,
        endpoint: Endpoint,
        method: str,
        query: str,
        headers: Mapping[str, str],
        body: bytes,
        request_id: str,
        sink: Sink,
    ) -> int:
        """Pass a request on and its answer back. Return the answer's status.

        Raises Refusal when the request cannot be served, and ConnectionError when the client is gone or
        does not read.
        """
        check_query(query)
        asked = await self._reader.check_passed_on(body)
        in_form = _form_model(headers, body)
        model = await self.model(in_form or asked)
        if asked is not None:
            body = body_with_model(body, asked, model)
        worker = await self.choose(endpoint, model)
        target = f"{endpoint.path}?{query}" if query else endpoint.path
        self._buffer.admit(0, 0)  # its body is counted by the connection until the answer ends
        self._buffer.leave(0, 0)  # it does not wait
        try:
            return await self._pass_on(worker, method, target, self.headers(headers, request_id), body, sink)
        except ExhaustedError as error:
            raise unavailable("exhausted", f"{error}.") from None
        except TransportError as error:
            self._workers.failed(worker, str(error), refused=error.refused)
            raise engine_failed(502) from None
        finally:
            self._buffer.done()

    async def model(self, asked: str | None) -> str | None:
        """Return the model that an engine must have; None: any engine. Raises Refusal (404)."""
        return None if asked is None else await self._workers.catalog.resolve(asked)

    async def _pass_on(
        self, worker: Worker, method: str, target: str, headers: dict[str, str], body: bytes, sink: Sink
    ) -> int:
        """Send the request and stream its answer until it is over or given up."""
        silence = engine_failed(504)
        scope = asyncio.timeout(self._limits.answer_timeout_s)
        passing = _Passing(sink, scope, silence)
        worker.legs.add(passing)
        try:
            async with scope:
                answer = await self._transport.send(method, worker.spec.url + target, headers, body or None)
                try:
                    passing.answered()
                    worker.health.answered_s = self._clock()
                    await self._stream(answer, worker, passing, silence, sink)
                finally:
                    answer.close()
                return answer.status
        except TimeoutError:
            if not scope.expired():
                raise
            if passing.why is silence:
                self._blame(worker, sink)
            raise passing.why from None
        finally:
            worker.legs.discard(passing)

    async def _stream(
        self, answer: Answer, worker: Worker, passing: _Passing, silence: Refusal, sink: Sink
    ) -> None:
        stalls = ConnectionAbortedError("the client does not read")
        idle = Idle(self._limits.idle_timeout_s, lambda: passing.end(silence), lambda: passing.end(stalls))
        headers = headers_for_client(answer.headers, worker.spec.url)
        idle.start()
        try:
            if answer.status >= 500 and "content-encoding" not in answer.headers:
                await sink.answer(answer.status, headers, error_for_client(await answer.read()))
                return
            await sink.start(answer.status, headers)
            async for chunk in answer.chunks():
                idle.active = idle.writing = True
                await sink.write(chunk)
                idle.writing = False
        finally:
            idle.stop()
        await sink.end()

    def _blame(self, worker: Worker, sink: Sink) -> None:
        """Count a silence as the engine's failure, if it answered no other request meanwhile."""
        patience_s = self._limits.idle_timeout_s if sink.started else self._limits.answer_timeout_s
        if self._clock() - worker.health.answered_s >= patience_s:
            self._workers.silent(worker, f"{worker.name} was silent for too long")

    async def choose(self, endpoint: Endpoint, model: str | None) -> Worker:
        """Return the least busy engine that can take the request, one that has its model if there is one.

        Raises Refusal: 501 when no engine of this cluster could, 503 when none comes up in time.
        """
        if endpoint.kind in (Kind.GENERATED, Kind.TUNNELLED) and self._workers.config.disaggregated:
            message = (
                f"{endpoint.path} generates in one engine, but here prefill and decode are apart: "
                "use /v1/chat/completions or /v1/completions."
            )
            raise Refusal(501, "needs_aggregated_engine", message)
        roles = roles_for(endpoint.kind)

        def able() -> list[Worker]:
            return [w for w in self._workers if w.takes_work() and w.spec.role in roles]

        if not await self._workers.until(lambda: bool(able()), self._limits.no_engine_timeout_s):
            raise unavailable("no_engine", "No engine is up that could take the request.")
        having = [worker for worker in able() if worker.serves(model)]
        return min(having or able(), key=lambda worker: len(worker.legs))

    def headers(self, headers: Mapping[str, str], request_id: str) -> dict[str, str]:
        """Return those of a client's headers that go on to an engine, and the gateway's own."""
        dropped = self._dropped | nominated(headers)
        kept = {
            name: value
            for name, value in headers.items()
            if name.lower() not in dropped and not name.lower().startswith(_RESERVED)
        }
        return {**kept, **self._engine_headers, "x-request-id": request_id}


def check_query(query: str) -> None:
    """Raise Refusal (400) for a query that would not stay one on the way to an engine."""
    if not _QUERY.fullmatch(query):
        raise bad_request("The query holds characters that must be encoded.")


def _form_model(headers: Mapping[str, str], body: bytes) -> str | None:
    """Return the model that a form asks for; None when it names none, or the body is no form."""
    kind = headers.get("content-type", "")
    boundary = _BOUNDARY.search(kind)
    if boundary is None or not kind.lower().startswith("multipart/form-data"):
        return None
    mark = b"--" + boundary[1].encode("latin-1")
    parts = (part for piece in (body[:_FORM_BYTES], body[-_FORM_BYTES:]) for part in piece.split(mark))
    for head, _, value in (part.partition(b"\r\n\r\n") for part in parts):
        name, ends, more = value.partition(b"\r\n")
        if ends and not more and 0 < len(name) <= _LONGEST_NAME and _NAMES_MODEL.search(head):
            return name.decode(errors="replace")
    return None
