"""Passes on what is no generation (`/v1/embeddings` and whatever engines add): to the engine with the
least to do.

The policy is not asked: what it schedules are prompts and their tokens, of which it learns nothing here.
For the rest these requests are like the others: they count against the bounds, a drain waits for them, and
an engine's silence ends them. Tried once only, because nobody knows here what it would mean to do it twice.
"""

import asyncio
import re
from collections.abc import Mapping
from urllib.parse import unquote

from headway.core.events import Role
from headway.front.buffer import Buffer
from headway.front.config import LimitsSpec
from headway.front.errors import Refusal, bad_request, engine_failed, unavailable
from headway.front.headers import CREDENTIALS, headers_for_client
from headway.front.requests import GENERATIONS, check_passed_on, plain_path
from headway.front.transport import Answer, ExhaustedError, Sink, Transport, TransportError
from headway.front.worker import Worker
from headway.front.workers import Workers
from headway.hosts.gateway.legs import Idle

__all__ = ["Passthrough"]

_HOP_BY_HOP = frozenset(
    (
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "expect",
    )
)
#: Headers that steer engines or are ours.
_RESERVED = ("x-data-parallel-rank", "x-headway-", "x-request-id")
#: The path, decoded: no empty segment, nothing encoded twice, no slash at the end.
_PATH = re.compile(r"/v1(/[A-Za-z0-9._~:@-]+)+")
_DOTS = re.compile(r"\.\.|/\.(/|$)")
_QUERY = re.compile(r"[^\s#]*")


class _Passing:
    """A request at an engine: its worker's leg, ended by whoever gives up on it."""

    def __init__(self, sink: Sink, scope: asyncio.Timeout, why: Exception) -> None:
        self.why = why  # once the scope has expired
        self._sink = sink
        self._scope = scope

    def abandon(self, worker: Worker) -> None:
        """See `Leg.abandon`."""
        if not self._sink.started:
            self.end(engine_failed(503))

    def answered(self) -> None:
        """The answer's head is there: from now on it is its silence that ends it."""
        if not self._scope.expired():
            self._scope.reschedule(None)

    def end(self, why: Exception) -> None:
        """End the request with `why`."""
        if not self._scope.expired():
            self.why = why
            self._scope.reschedule(asyncio.get_running_loop().time())


class Passthrough:
    """Sends a request on as it is."""

    def __init__(
        self,
        workers: Workers,
        transport: Transport,
        buffer: Buffer,
        limits: LimitsSpec,
        *,
        engine_headers: Mapping[str, str],
        keep_authorization: bool,
    ) -> None:
        self._workers = workers
        self._transport = transport
        self._buffer = buffer
        self._limits = limits
        self._engine_headers = dict(engine_headers)
        # Engines would see two keys: ours goes in place of the client's.
        given = {name.lower() for name in engine_headers}
        self._dropped = (
            _HOP_BY_HOP | CREDENTIALS | given | (set() if keep_authorization else {"authorization"})
        )
        self._clock = asyncio.get_running_loop().time

    async def serve(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes, request_id: str, sink: Sink
    ) -> int:
        """Pass a request on and its answer back; return its status.

        Raises Refusal when the client is to be told no, and ConnectionError when it is gone or does not read.
        """
        _check_target(target)
        check_passed_on(body)
        worker = self._choose()
        self._buffer.admit(0, len(body))
        self._buffer.leave(0, len(body))  # it waits for nothing
        try:
            return await self._pass_on(worker, method, target, self._headers(headers, request_id), body, sink)
        except ExhaustedError as error:
            raise unavailable("exhausted", f"{error}.") from None
        except TransportError as error:
            self._workers.failed(worker, str(error), refused=error.refused)
            raise engine_failed(502) from None
        finally:
            self._buffer.done()

    async def _pass_on(
        self, worker: Worker, method: str, target: str, headers: dict[str, str], body: bytes, sink: Sink
    ) -> int:
        """Send it and stream its answer until somebody gives up on it."""
        silence = engine_failed(504)
        scope = asyncio.timeout(self._limits.first_byte_timeout_s)
        passing = _Passing(sink, scope, silence)
        worker.legs.add(passing)
        try:
            async with scope:
                answer = await self._transport.send(method, worker.spec.url + target, headers, body or None)
                try:
                    passing.answered()
                    worker.answered_s = self._clock()
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
        idle.start()
        try:
            await sink.start(answer.status, _kept(answer.headers, worker.spec.url))
            async for chunk in answer.chunks():
                idle.active = idle.writing = True
                await sink.write(chunk)
                idle.writing = False
        finally:
            idle.stop()
        await sink.end()

    def _blame(self, worker: Worker, sink: Sink) -> None:
        """Count a silence as the engine's failure, if it answered nobody else meanwhile."""
        patience_s = self._limits.idle_timeout_s if sink.started else self._limits.first_byte_timeout_s
        if self._clock() - worker.answered_s >= patience_s:
            self._workers.failed(worker, f"{worker.name} was silent for too long", refused=False)

    def _choose(self) -> Worker:
        able = [w for w in self._workers if w.takes_work() and w.spec.role is not Role.DECODE]
        if not able:
            raise unavailable("no_engine", "No engine is up that could take the request.")
        return min(able, key=lambda worker: len(worker.legs))

    def _headers(self, headers: Mapping[str, str], request_id: str) -> dict[str, str]:
        dropped = self._dropped | _nominated(headers)
        kept = {
            name: value
            for name, value in headers.items()
            if name.lower() not in dropped and not name.lower().startswith(_RESERVED)
        }
        return {**kept, **self._engine_headers, "x-request-id": request_id}


def _check_target(target: str) -> None:
    """Raise Refusal for a target that an engine, or a proxy before it, might take for another one."""
    path, _, query = target.partition("?")
    path = unquote(path)
    plain = plain_path(path)
    if plain in GENERATIONS:
        raise Refusal(404, "unknown_path", f"There is no {path[:100]!r} here: use POST {plain}.")
    if not _PATH.fullmatch(path) or _DOTS.search(path) or not _QUERY.fullmatch(query):
        raise bad_request("The path is not one of an OpenAI-compatible API.")


def _kept(headers: Mapping[str, str], engine_url: str) -> dict[str, str]:
    """Of an answer's headers, return what goes on to the client; no header may come twice."""
    dropped = _HOP_BY_HOP | _nominated(headers)
    kept = {n: value for n, value in headers_for_client(headers, engine_url).items() if n not in dropped}
    if "cache-control" in kept:
        kept["Cache-Control"] = kept.pop("cache-control")  # as the sink spells its own
    return kept


def _nominated(headers: Mapping[str, str]) -> frozenset[str]:
    """Return the headers that are for this connection only (RFC 9110 §7.6.1)."""
    listed = headers.get("connection", "")
    return frozenset(name.strip().lower() for name in listed.split(","))
