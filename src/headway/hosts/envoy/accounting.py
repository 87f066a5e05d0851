"""Finds out which requests are over, and how: from Envoy's gRPC access log, or answers that come by.

An entry of the log names its request by dynamic metadata that the picker's answer set. One without was
refused here, or broke off while the answer was on its way: then Envoy's own id of it tells. Entries written
in mid-stream are skipped. Envoy sends them in batches: it should flush often (`buffer_flush_interval`), for
until then the request's load is reserved.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from headway.front.headers import read_retry_after
from headway.front.token_stream import TAIL_BYTES, EventWeights, TokenStream
from headway.front.usage import error_status, usage_of
from headway.hosts.envoy.desk import Desk, Served
from headway.hosts.envoy.messages import StreamAccessLogsResponse
from headway.hosts.envoy.replies import KEY, KEY_NAMESPACE, NAMESPACE, SERVED

__all__ = ["AccessLogs", "AnswerAccount", "headers_of"]


class AccessLogs:
    """The access log service. `stop` ends its streams, which Envoy never would. `note(peer)` hears of the
    connection of each.
    """

    def __init__(self, desk: Desk, note: Callable[[str], None] = lambda peer: None) -> None:
        self._desk = desk
        self._note = note
        self._stopped = asyncio.Event()

    async def listen(self, messages: AsyncIterator[Any], context: Any) -> Any:
        """Take in one Envoy's log: the handler of `AccessLogService.StreamAccessLogs`."""
        peer = context.peer()
        self._note(peer)
        reading = asyncio.create_task(self._read(messages, peer))
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait((reading, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, stopped):
                task.cancel()
            await asyncio.gather(reading, stopped, return_exceptions=True)
        return StreamAccessLogsResponse()

    def stop(self) -> None:
        """Let the streams come to their end."""
        self._stopped.set()

    async def _read(self, messages: AsyncIterator[Any], peer: str) -> None:
        async for message in messages:
            self.hear(message, peer)

    def hear(self, message: Any, peer: str = "") -> None:
        """Take in a batch of entries that came by a connection."""
        for entry in message.http_logs.log_entry:
            self._hear(entry, peer)

    def _hear(self, entry: Any, peer: str) -> None:
        common = entry.common_properties
        metadata = common.metadata.filter_metadata
        if common.intermediate_log_entry:
            return
        if KEY_NAMESPACE in metadata:
            key = metadata[KEY_NAMESPACE].fields[KEY].string_value
            self._desk.over(key, _served(entry, metadata), peer)
        elif entry.request.request_id:
            self._desk.broke_off(entry.request.request_id, Served(0), peer)


class AnswerAccount:
    """The account of one request whose answer comes by here. `end` when nothing more comes.

    `learn(tokens)` hears how many its prompt had.
    """

    def __init__(self, desk: Desk, key: str, learn: Callable[[int], None], weights: EventWeights) -> None:
        self._desk = desk
        self._key = key
        self._learn = learn
        self._status = 0
        self._endpoint: str | None = None
        self._retry_after_s: float | None = None
        self._weights = weights
        self._tokens: TokenStream | None = None  # of an answer that streams
        self._tail = b""  # of one that does not
        self._began = self._over = False

    def hear(self, message: Any) -> None:
        """Take in a message about the answer."""
        kind = message.WhichOneof("kind")
        if kind == "response_headers":
            headers = headers_of(message.response_headers.headers)
            self._status = _status(headers)
            self._retry_after_s = read_retry_after(headers)
            if headers.get("content-type", "").startswith("text/event-stream"):
                self._tokens = TokenStream()
            self._endpoint = _served_by(message.metadata_context.filter_metadata)
            self._ended(message.response_headers.end_of_stream)
        elif kind == "response_body":
            if message.response_body.body:
                self._piece(message.response_body.body)
            self._ended(message.response_body.end_of_stream)
        elif kind == "response_trailers":
            self._ended(True)

    def end(self) -> None:
        """Note that nothing more comes: what is not over by now broke off."""
        self._status = 0
        self._ended(True)

    def _piece(self, piece: bytes) -> None:
        if self._tokens is None:
            self._tail = (self._tail + piece)[-TAIL_BYTES:]
        else:
            self._tokens.add(piece)
        begins = self._tokens is None or self._tokens.started
        if self._status < 300 and begins and not self._began:
            self._began = True
            self._desk.first_byte(self._key)

    def _count(self, prompt_tokens: int | None, output_tokens: int | None) -> None:
        if prompt_tokens is not None or output_tokens is not None:
            self._desk.tokens(self._key, prompt_tokens, output_tokens)
        if prompt_tokens is not None:
            self._learn(prompt_tokens)

    def _ended(self, ended: bool) -> None:
        if ended and not self._over:
            self._over = True
            if self._tokens is None:
                self._count(*usage_of(self._tail))
            else:
                self._tokens.finish()
                self._count(*self._tokens.usage(self._weights, self._endpoint or ""))
                if self._tokens.error is not None and 0 < self._status < 400:
                    self._status = error_status(self._tokens.error)
            self._desk.over(
                self._key, Served(self._status, endpoint=self._endpoint, retry_after_s=self._retry_after_s)
            )


def headers_of(of: Any) -> dict[str, str]:
    """Return a HeaderMap's headers; Envoy writes them in bytes."""
    return {
        each.key: each.raw_value.decode("latin-1") if each.raw_value else each.value for each in of.headers
    }


def _status(headers: Mapping[str, str]) -> int:
    text = headers.get(":status", "")
    return int(text) if text.isdigit() else 0


def _served_by(metadata: Any) -> str | None:
    """Read who served a request, where Envoy says so."""
    if NAMESPACE not in metadata:
        return None
    fields = metadata[NAMESPACE].fields
    return fields[SERVED].string_value or None if SERVED in fields else None


def _served(entry: Any, metadata: Any) -> Served:
    common, flags = entry.common_properties, entry.common_properties.response_flags
    endpoint = None
    if common.HasField("upstream_remote_address"):
        address = common.upstream_remote_address.socket_address
        host = f"[{address.address}]" if ":" in address.address else address.address
        endpoint = f"{host}:{address.port_value}"
    endpoint = _served_by(metadata) or endpoint
    gone = flags.downstream_connection_termination
    status = 0 if gone else entry.response.response_code.value
    if flags.upstream_connection_termination or flags.upstream_remote_reset or flags.upstream_protocol_error:
        status = max(status, 502)  # it broke off, whatever its head said
    return Served(
        status,
        ttft_s=_seconds(common, "time_to_first_upstream_rx_byte"),
        duration_s=_seconds(common, "duration"),
        endpoint=endpoint,
        unreached=flags.upstream_connection_failure,
        blame=endpoint is not None,
    )


def _seconds(common: Any, name: str) -> float | None:
    if not common.HasField(name):
        return None
    duration = getattr(common, name)
    return float(duration.seconds + duration.nanos * 1e-9)
