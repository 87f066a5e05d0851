"""Speaks with Envoy about one HTTP request: an ext_proc stream from its first message to its end.

FULL_DUPLEX_STREAMED   headers and body come, nothing is answered before it is known where to; then the answer
                       to the headers names the place, and the body goes back in the pieces that came.
BUFFERED               headers are answered at once, the body comes whole, and its answer names the place.
                       Envoy keeps the body, and its `message_timeout` runs: it is asked for more time.
no body                the answer to the headers names the place.

Rule 1. An error of the client's is an ImmediateResponse with OpenAI's error shape; one of Envoy's ends the
        stream with a gRPC status, which Envoy turns into a 500 or lets pass (`failure_mode_allow`).
Rule 2. A stream that is cancelled before its answer is a client that went away: the request is withdrawn.
Rule 3. While a request is held no message of Envoy's is kept, and of the body only what goes back.
"""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, Protocol
from urllib.parse import unquote

import grpc

from headway.core.events import Role
from headway.core.request import Slo
from headway.front.body_reader import BodyReader
from headway.front.errors import Refusal, bad_request
from headway.front.lengths import Lengths
from headway.front.request_ids import given_request_id
from headway.front.requests import (
    GENERATIONS,
    Call,
    plain_path,
    read_targets,
    targets_for_engines,
)
from headway.front.token_stream import EventWeights
from headway.hosts.envoy.accounting import AnswerAccount, headers_of
from headway.hosts.envoy.config import EppConfig, ObjectiveSpec
from headway.hosts.envoy.desk import Answer, Asked, Desk, Served
from headway.hosts.envoy.messages import BUFFERED, FULL_DUPLEX_STREAMED
from headway.hosts.envoy.replies import SUBSET, SUBSET_NAMESPACE, Replies
from headway.hosts.envoy.upload import Upload, budget_of

__all__ = ["Context", "Streams", "Tools"]

PROFILE_HEADER = "epp-profile"
FLOW_HEADERS = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
#: A flow's id is the client's text, and kept while it is held.
MOST_FLOW = 128

_ENDPOINT = re.compile(r"(\d{1,3}(\.\d{1,3}){3}|\[[0-9A-Fa-f:.]+\]):\d{1,5}")
_PHASES = {"prefill": Role.PREFILL, "decode": Role.DECODE}


class Context(Protocol):
    """What is used of grpc.aio's context."""

    async def read(self) -> Any:
        """Return the next message; something without `WhichOneof` at the end."""

    async def write(self, message: Any) -> None:
        """Send a message."""

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        """End the stream with a status."""

    def peer(self) -> str:
        """Return the other end of the connection."""


class _ProtocolError(Exception):
    """Envoy is not set up as it has to be, or is no Envoy."""


class _SilentStreamError(Exception):
    """A stream was opened and nothing came."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What all streams of a process use. `refused(path, request_id, refusal)` hears of requests refused at
    the door; `reads_prefixes`: whether the policy looks at prefixes.
    """

    config: EppConfig
    desk: Desk
    lengths: Lengths
    reader: BodyReader
    clock: Callable[[], float]
    refused: Callable[[str, str, Refusal], None]
    reads_prefixes: bool = False
    weights: EventWeights = field(default_factory=EventWeights)


class Streams:
    """Serves ext_proc streams. `note(peer)` hears of the connection of each.

    `arriving`: streams whose request is not complete. They are bounded as what waits is.
    """

    def __init__(self, tools: Tools, note: Callable[[str], None] = lambda peer: None) -> None:
        self.tools = tools
        self.note = note
        self.budget = budget_of(tools.config)
        self.open = 0
        self.arriving = 0
        self._boot = secrets.token_hex(4)
        self._numbers = count(1)

    async def process(self, _: AsyncIterator[Any], context: Context) -> None:
        """Serve one stream: the handler of `ExternalProcessor.Process`."""
        if self.arriving >= self.tools.config.limits.buffer_requests:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests are arriving")
        self.open += 1
        try:
            await _Stream(self, context).run()
        except _ProtocolError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except _SilentStreamError as error:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        finally:
            self.open -= 1

    @contextmanager
    def arrival(self) -> Iterator[None]:
        """Count a stream whose request is arriving."""
        self.arriving += 1
        try:
            yield
        finally:
            self.arriving -= 1

    def name(self) -> str:
        """Return an id for a request that has none."""
        return f"req-{self._boot}-{next(self._numbers)}"


class _Stream:
    def __init__(self, streams: Streams, context: Context) -> None:
        tools = self._tools = streams.tools
        self._streams = streams
        self._name = streams.name
        self._peer = context.peer()
        streams.note(self._peer)
        self._upload = Upload(streams.budget, tools.config.limits.max_body_bytes)
        self._config = tools.config
        self._desk = tools.desk
        self._context = context
        self._replies = Replies()
        self._full_duplex = self._answer_full_duplex = True
        self._by_response = tools.config.accounting.by == "response"
        self._call: Call | None = None

    async def run(self) -> None:
        """Answer the request, then see its answer by."""
        try:
            key = await self._place()
        finally:
            self._upload.release()
        if key is not None:
            await self._see_by(key)

    async def _place(self) -> str | None:
        """Answer the request; return its key, None when it was refused."""
        first = await self._first()
        if first is None or first.WhichOneof("kind") != "request_headers":
            raise _ProtocolError("an ext_proc stream begins with request_headers")
        self._set_modes(first)
        headers = headers_of(first.request_headers.headers)
        try:
            subset = _subset(first.metadata_context)
            ends = first.request_headers.end_of_stream
            del first  # nothing of Envoy's is kept while it is held
            return await self._answer(headers, subset, ends)
        except Refusal as refusal:
            path = headers.get(":path", "")
            self._tools.refused(path, headers.get("x-request-id", ""), refusal)
            await self._context.write(self._replies.refusal(refusal))
            return None

    async def _first(self) -> Any:
        """Return the first message; a stream that has none in time is ended."""
        limit_s = self._config.limits.header_timeout_s
        try:
            with self._streams.arrival():
                async with asyncio.timeout(limit_s) as timer:
                    return await self._next()
        except TimeoutError:
            if not timer.expired():
                raise
            raise _SilentStreamError(f"no message in {limit_s:g} s") from None

    def _set_modes(self, first: Any) -> None:
        """Take in how Envoy sends bodies."""
        modes = first.protocol_config
        default = BUFFERED if self._config.picker.body_mode == "buffered" else FULL_DUPLEX_STREAMED
        mode = modes.request_body_mode if first.HasField("protocol_config") else default
        ends = first.request_headers.end_of_stream
        if mode not in (BUFFERED, FULL_DUPLEX_STREAMED) and not ends:
            raise _ProtocolError(
                "processing_mode.request_body_mode must be FULL_DUPLEX_STREAMED or BUFFERED: a body is needed"
            )
        self._full_duplex = mode == FULL_DUPLEX_STREAMED
        self._answer_full_duplex = modes.response_body_mode == FULL_DUPLEX_STREAMED

    # The request

    async def _answer(self, headers: Mapping[str, str], subset: frozenset[str] | None, ends: bool) -> str:
        """Decide where the request goes and tell Envoy; return its key."""
        path = headers.get(":path", "").partition("?")[0]
        generates = headers.get(":method") == "POST" and plain_path(unquote(path)) in GENERATIONS
        phase = _phase(headers) if self._config.picker.handover == "phases" else None
        if ends:
            if generates:
                raise bad_request("The request has no body.", code="invalid_json")
            answer = await self._desk.aside(phase, subset)
            await self._tell(answer, headers, [self._replies.destination(answer, {}, at_body=False)])
            return answer.key
        if not self._full_duplex:
            await self._context.write(self._replies.go_on())
        with self._streams.arrival():
            trailers = await self._read_body()
        pieces = self._upload.finish()
        if generates:
            answer, passed = await self._hold(headers, plain_path(unquote(path)), pieces, phase, subset)
        else:
            await self._tools.reader.check_passed_on(pieces)
            answer, passed = await self._desk.aside(phase, subset), {}
        at_body = not self._full_duplex
        replies: Iterable[Any] = [self._replies.destination(answer, passed, at_body=at_body)]
        if self._full_duplex:
            replies = chain(replies, self._replies.body(pieces, ends=not trailers))
        if trailers:
            replies = chain(replies, [self._replies.trailers()])
        await self._tell(answer, headers, replies)
        return answer.key

    async def _tell(self, answer: Answer, headers: Mapping[str, str], replies: Iterable[Any]) -> None:
        """Send what takes a request on its way.

        Envoy resets the stream when it has read what it needs, so that being cancelled here says nothing: its
        log does. Where there is none the stream is all that tells.
        """
        self._desk.told(answer.key, headers.get("x-request-id", ""), self._peer)
        self._streams.note(self._peer)  # should the connection be gone by now, it is reported again
        try:
            for reply in replies:
                await self._context.write(reply)
        except BaseException:
            if self._by_response:
                self._desk.over(answer.key, Served(0))
            raise

    async def _read_body(self) -> bool:
        """Take the body in; return whether trailers came after it. Raises Refusal (413, 429, 408)."""
        try:
            async with asyncio.timeout(self._config.limits.body_timeout_s) as timer:
                while True:
                    message = await self._next()
                    kind = None if message is None else message.WhichOneof("kind")
                    if kind == "request_trailers":
                        return True
                    if kind != "request_body":
                        raise _ProtocolError("a request's body is missing")
                    self._upload.add(message.request_body.body)
                    if message.request_body.end_of_stream or not self._full_duplex:
                        return False
        except TimeoutError:
            if not timer.expired():
                raise
            message = f"No complete body in {self._config.limits.body_timeout_s:g} s."
            raise Refusal(408, "body_timeout", message) from None

    async def _hold(
        self,
        headers: Mapping[str, str],
        path: str,
        pieces: list[bytes],
        phase: Role | None,
        subset: frozenset[str] | None,
    ) -> tuple[Answer, dict[str, str]]:
        """Hold a generation until it has its place; return that, and headers for the engine."""
        if "content-encoding" in headers:
            raise Refusal(400, "content_encoding", "A compressed body is not accepted.")
        objective = self._objective(headers)
        slo, priority = read_targets(headers, objective.over(self._config.slo).slo())
        if "x-priority" not in headers:
            priority = objective.priority
        request_id, passed = self._request_id(headers), targets_for_engines(headers)
        if phase is Role.DECODE:
            await self._ask_for_time()
            await self._read(path, pieces, phase)
            self._let_go()
            return await self._desk.second(request_id, subset), passed
        flow = next((headers[each][:MOST_FLOW] for each in FLOW_HEADERS if each in headers), "")
        await self._ask_for_time()  # reading and counting tokens may take longer than Envoy's patience
        asked = await self._measure(path, pieces, request_id, slo, priority, flow, phase, subset)
        self._let_go()
        return await self._desk.place(asked), passed

    async def _measure(
        self,
        path: str,
        pieces: list[bytes],
        request_id: str,
        slo: Slo,
        priority: int,
        flow: str,
        phase: Role | None,
        subset: frozenset[str] | None,
    ) -> Asked:
        """Read a body; return what is kept of it."""
        arrived_s, lengths = self._tools.clock(), self._tools.lengths
        call = self._call = await self._read(path, pieces, phase)
        tokens = lengths.measure(call)
        return Asked(
            request_id,
            arrived_s,
            call.path,
            call.model,
            call.stream,
            call.max_tokens,
            tokens,
            lengths.exact(call),
            slo,
            priority,
            size=self._upload.size,
            flow=flow,
            phase=phase,
            subset=subset,
            prefix=call.prefix,
            block_tokens=call.block_tokens(tokens),
        )

    async def _read(self, path: str, pieces: list[bytes], phase: Role | None) -> Call:
        """Read a body; that of a phase may hold what a coordinator hands over."""
        tools = self._tools
        return await tools.reader.read(path, pieces, steered=phase is not None, prefixes=tools.reads_prefixes)

    def _let_go(self) -> None:
        """Keep no body that Envoy keeps."""
        if not self._full_duplex:
            self._upload.release()

    async def _ask_for_time(self) -> None:
        """Where Envoy's clock runs, ask it to wait as long as a request may be held."""
        if not self._full_duplex:
            await self._context.write(self._replies.more_time(self._config.limits.queue_timeout_s + 1.0))

    def _objective(self, headers: Mapping[str, str]) -> ObjectiveSpec:
        name = next((headers[each] for each in OBJECTIVE_HEADERS if each in headers), None)
        return self._config.objectives.get(name or "", ObjectiveSpec())

    def _request_id(self, headers: Mapping[str, str]) -> str:
        return given_request_id(headers) or self._name()

    # Its answer

    async def _see_by(self, key: str) -> None:
        """Let the engine's answer pass, where it comes by here, until the stream ends."""
        account = (
            AnswerAccount(self._desk, key, self._learn, self._tools.weights) if self._by_response else None
        )
        try:
            while (message := await self._next()) is not None:
                reply = self._replies.response(message, full_duplex=self._answer_full_duplex)
                if reply is not None:
                    await self._context.write(reply)
                if account is not None:
                    account.hear(message)
        finally:
            if account is not None:
                account.end()

    def _learn(self, prompt_tokens: int) -> None:
        """Take in what the engine counted."""
        if self._call is not None:
            self._tools.lengths.learn(self._call, prompt_tokens)

    async def _next(self) -> Any:
        message = await self._context.read()
        return message if hasattr(message, "WhichOneof") else None


def _phase(headers: Mapping[str, str]) -> Role | None:
    return _PHASES.get(headers.get(PROFILE_HEADER, "").strip().lower())


def _subset(metadata: Any) -> frozenset[str] | None:
    """Read a subset hint: a list, or text with commas. Raises Refusal (400) for what is neither."""
    if SUBSET_NAMESPACE not in metadata.filter_metadata:
        return None
    fields = metadata.filter_metadata[SUBSET_NAMESPACE].fields
    if SUBSET not in fields:
        return None
    value = fields[SUBSET]
    kind = value.WhichOneof("kind")
    if kind == "list_value":
        endpoints = [each.string_value for each in value.list_value.values]
    elif kind == "string_value":
        endpoints = value.string_value.split(",") if value.string_value else []
    else:
        raise bad_request(f"The metadata {SUBSET} must be a list of ip:port.", param=SUBSET)
    for endpoint in endpoints:
        if not _ENDPOINT.fullmatch(endpoint.strip()):
            raise bad_request(
                f"The metadata {SUBSET} has {endpoint[:60]!r}, which is no ip:port.", param=SUBSET
            )
    return frozenset(endpoint.strip() for endpoint in endpoints)
