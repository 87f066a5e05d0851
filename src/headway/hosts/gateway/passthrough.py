"""Passes on what is no generation (`/v1/embeddings` and whatever engines add): to the engine with the
least to do.

The policy is not asked: what it schedules are prompts and their tokens, of which it learns nothing here.
"""

import re
from collections.abc import Mapping

from headway.core.events import Role
from headway.hosts.gateway.config import LimitsSpec
from headway.hosts.gateway.errors import Refusal, bad_request, unavailable
from headway.hosts.gateway.transport import ExhaustedError, Sink, Transport, TransportError
from headway.hosts.gateway.worker import Worker
from headway.hosts.gateway.workers import Workers

__all__ = ["Passthrough"]

_HOP_BY_HOP = frozenset(
    (
        "connection",
        "content-length",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "expect",
    )
)
#: Headers that steer engines or are ours.
_RESERVED = ("x-data-parallel-rank", "x-headway-", "x-request-id")
_PATH = re.compile(r"/v1/[A-Za-z0-9._~%/:@-]*(\?[^\s#]*)?")


class _Counted:
    """Keeps its worker's legs counted."""

    def abandon(self, worker: Worker) -> None:
        """Nothing can be made elsewhere: the connection tells."""


class Passthrough:
    """Sends a request on as it is."""

    def __init__(
        self,
        workers: Workers,
        transport: Transport,
        limits: LimitsSpec,
        *,
        engine_headers: Mapping[str, str],
        keep_authorization: bool,
    ) -> None:
        self._workers = workers
        self._transport = transport
        self._limits = limits
        self._engine_headers = dict(engine_headers)
        self._keep_authorization = keep_authorization

    async def serve(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, request_id: str, sink: Sink
    ) -> int:
        """Pass a request on and its answer back; return its status. Raises Refusal."""
        if not _PATH.fullmatch(path) or ".." in path or "%2e" in path.lower():
            raise bad_request("The path is not one of an OpenAI-compatible API.")
        worker = self._choose()
        leg = _Counted()
        worker.legs.add(leg)
        try:
            return await self._pass_on(worker, method, path, self._headers(headers, request_id), body, sink)
        except ExhaustedError as error:
            raise unavailable("exhausted", f"{error}.") from None
        except TransportError as error:
            self._workers.failed(worker, str(error), refused=error.refused)
            raise Refusal(502, "engine_error", f"The engine failed: {worker.name}: {error}.") from None
        finally:
            worker.legs.discard(leg)

    async def _pass_on(
        self, worker: Worker, method: str, path: str, headers: dict[str, str], body: bytes, sink: Sink
    ) -> int:
        answer = await self._transport.send(method, worker.spec.url + path, headers, body or None)
        try:
            kept = {n: v for n, v in answer.headers.items() if n.lower() not in _HOP_BY_HOP}
            await sink.start(answer.status, kept)
            async for chunk in answer.chunks():
                await sink.write(chunk)
            await sink.end()
        finally:
            answer.close()
        return answer.status

    def _choose(self) -> Worker:
        able = [w for w in self._workers if w.takes_work() and w.spec.role is not Role.DECODE]
        if not able:
            raise unavailable("no_engine", "No engine is up that could take the request.")
        return min(able, key=lambda worker: len(worker.legs))

    def _headers(self, headers: Mapping[str, str], request_id: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in headers.items()
            if name.lower() not in _HOP_BY_HOP
            and not name.lower().startswith(_RESERVED)
            and (self._keep_authorization or name.lower() != "authorization")
        }
        return {**kept, **self._engine_headers, "x-request-id": request_id}
