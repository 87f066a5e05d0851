"""Send one request to every engine and join the answers: loads for clients, operations for operators.

Loads (`/load`, `/v1/loads`, `/get_load`) are joined in the format of a single engine, so that a client need
not know how many engines there are; they name no engine. Operations (`/flush_cache`, adapters, profiles,
sleep) answer with one entry per engine: its name, the status, and what it said. An operation succeeds when
every engine said yes; one that is down is listed as not asked.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from headway.front.body_reader import BodyReader
from headway.front.buffer import Buffer
from headway.front.errors import Refusal, unavailable
from headway.front.protocol import Handler, HttpRequest, HttpResponse, Routes, json_answer
from headway.front.transport import Transport, TransportError
from headway.front.worker import State, Worker
from headway.front.workers import Workers
from headway.hosts.gateway.endpoints import ENDPOINTS, Endpoint, Kind
from headway.hosts.gateway.passthrough import check_query

__all__ = ["Broadcast"]

#: Each engine is given this long to report its load.
LOAD_S = 2.0
#: More of one engine's answer than this is not kept.
MOST_ANSWER_BYTES = 1 << 20
#: An engine is asked in these states; in others it is known not to answer.
_ASKED = (State.UP, State.EJECTED)


@dataclass(frozen=True, slots=True)
class _Reply:
    """What one engine answered; status 0 when it was not asked or did not answer, and why."""

    name: str
    status: int
    body: bytes = b""
    why: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether the engine said yes."""
        return 200 <= self.status < 300

    def described(self) -> dict[str, object]:
        """Return the reply as operators see it."""
        said: object
        try:
            said = msgspec.json.decode(self.body)
        except (msgspec.DecodeError, RecursionError):
            said = self.body.decode(errors="replace")
        return {"name": self.name, "status": self.status or None, "answer": self.why or said}


class Broadcast:
    """Ask every engine. `patience_s` bounds an operation at each; `body_timeout_s` the wait for its body."""

    def __init__(
        self,
        workers: Workers,
        transport: Transport,
        buffer: Buffer,
        *,
        reader: BodyReader,
        engine_headers: Mapping[str, str],
        patience_s: float,
        body_timeout_s: float,
    ) -> None:
        self._workers = workers
        self._transport = transport
        self._buffer = buffer
        self._headers = dict(engine_headers)
        self._patience_s = patience_s
        self._body_timeout_s = body_timeout_s
        self._reader = reader

    def operations(self) -> Routes:
        """Return the routes of all operations, for a side that lets in operators only."""
        operated = [each for each in ENDPOINTS if each.kind is Kind.OPERATED]
        return {(method, each.path): self._operation(each) for each in operated for method in each.methods}

    def _operation(self, endpoint: Endpoint) -> Handler:
        async def operate(request: HttpRequest) -> HttpResponse:
            body = await request.read(self._body_timeout_s)
            return await self.serve(endpoint, request.method, request.query_string, body)

        return operate

    async def serve(self, endpoint: Endpoint, method: str, query: str, body: bytes) -> HttpResponse:
        """Send a request to every engine and return the joined answer.

        Raises Refusal: 503 when there is no engine, 502 when a load cannot be read from any.
        """
        check_query(query)
        await self._reader.check_passed_on(body)
        self._buffer.admit(0, 0)  # its body is counted by the connection
        self._buffer.leave(0, 0)  # it does not wait
        try:
            if endpoint.kind is Kind.JOINED:
                return await self._loads(endpoint)
            return await self._operate(endpoint, method, query, body)
        finally:
            self._buffer.done()

    async def _operate(self, endpoint: Endpoint, method: str, query: str, body: bytes) -> HttpResponse:
        replies = await self._ask(method, endpoint.path, query, body, self._patience_s)
        succeeded = all(reply.succeeded for reply in replies)
        answer = {"success": succeeded, "engines": [reply.described() for reply in replies]}
        return json_answer(answer, 200 if succeeded else _worst(replies))

    async def _loads(self, endpoint: Endpoint) -> HttpResponse:
        replies = await self._ask("GET", endpoint.path, "", b"", LOAD_S)
        told = [reply for reply in replies if reply.succeeded]
        if not told:
            status = _worst(replies)
            raise Refusal(status, "no_load", f"No engine answers {endpoint.path}.")
        try:
            return json_answer(_JOIN[endpoint.path]([msgspec.json.decode(reply.body) for reply in told]))
        except (msgspec.DecodeError, RecursionError, AttributeError, KeyError, TypeError, ValueError):
            raise Refusal(
                502, "engine_error", f"An engine's answer to {endpoint.path} is not a load."
            ) from None

    async def _ask(self, method: str, path: str, query: str, body: bytes, patience_s: float) -> list[_Reply]:
        """Ask all engines at once; the replies are in the order of the engines."""
        targets = [(worker, url) for worker in self._workers for url in _urls(worker)]
        if not any(worker.state in _ASKED for worker, _ in targets):
            raise unavailable("no_engine", "No engine is up that could take the request.")
        suffix = f"{path}?{query}" if query else path
        return await asyncio.gather(
            *(self._one(worker, method, url + suffix, body, patience_s) for worker, url in targets)
        )

    async def _one(self, worker: Worker, method: str, url: str, body: bytes, patience_s: float) -> _Reply:
        if worker.state not in _ASKED:
            return _Reply(worker.name, 0, why=f"not asked: it is {worker.state.value}")
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        try:
            async with asyncio.timeout(patience_s):
                answer = await self._transport.send(method, url, headers, body if method == "POST" else None)
                try:
                    said = bytearray()
                    async for chunk in answer.chunks():
                        said += chunk
                        if len(said) > MOST_ANSWER_BYTES:
                            return _Reply(worker.name, 0, why="its answer is too long")
                    return _Reply(worker.name, answer.status, bytes(said))
                finally:
                    answer.close()
        except TimeoutError:
            return _Reply(worker.name, 0, why=f"no answer in {patience_s:g} s")
        except TransportError as error:
            return _Reply(worker.name, 0, why=str(error))


def _urls(worker: Worker) -> list[str]:
    """Return the base URL of each server of an engine: one, or one for each rank."""
    return list(dict.fromkeys(worker.spec.rank_url(rank) for rank in range(worker.ranks)))


def _worst(replies: list[_Reply]) -> int:
    """Return the status of an operation that did not succeed: the engines' own if they agree, else 502."""
    statuses = {reply.status for reply in replies if not reply.succeeded}
    return statuses.pop() if len(statuses) == 1 and min(statuses) >= 400 else 502


def _sum_of_loads(told: list[Any]) -> object:
    """Join answers of vLLM's /load."""
    return {"server_load": sum(each["server_load"] for each in told)}


def _reports(told: list[Any]) -> object:
    """Join answers of SGLang's /v1/loads; ranks are numbered on from engine to engine."""
    joined = dict(told[0])
    joined["loads"] = _renumbered([load for each in told for load in each["loads"]])
    if "num_accelerators" in joined:
        joined["num_accelerators"] = sum(each.get("num_accelerators") or 0 for each in told)
    return joined


def _lists(told: list[Any]) -> object:
    """Join answers of SGLang's older /get_load."""
    return _renumbered([load for each in told for load in each])


def _renumbered(loads: list[Any]) -> list[Any]:
    return [{**load, "dp_rank": number} for number, load in enumerate(loads)]


_JOIN = {"/load": _sum_of_loads, "/v1/loads": _reports, "/get_load": _lists}
