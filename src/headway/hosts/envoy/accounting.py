"""Hears from Envoy's gRPC access log which requests are over, and how they went.

An entry names its request by dynamic metadata that the picker's answer set; one without was refused here, or
never came here. Entries that Envoy writes in mid-stream are skipped. Envoy sends them in batches: it should
flush often (`buffer_flush_interval`), for until then the request's load is reserved.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from headway.hosts.envoy.messages import StreamAccessLogsResponse
from headway.hosts.envoy.picks import Picks, Served
from headway.hosts.envoy.replies import KEY, KEY_NAMESPACE, NAMESPACE, SERVED

__all__ = ["AccessLogs"]


class AccessLogs:
    """The access log service. `stop` ends its streams, which Envoy never would."""

    def __init__(self, picks: Picks) -> None:
        self._picks = picks
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()

    async def listen(self, messages: AsyncIterator[Any], context: Any) -> Any:
        """Take in one Envoy's log: the handler of `AccessLogService.StreamAccessLogs`."""
        reading = asyncio.create_task(self._read(messages))
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

    async def _read(self, messages: AsyncIterator[Any]) -> None:
        async for message in messages:
            for entry in message.http_logs.log_entry:
                self._hear(entry)

    def _hear(self, entry: Any) -> None:
        common = entry.common_properties
        metadata = common.metadata.filter_metadata
        if common.intermediate_log_entry or KEY_NAMESPACE not in metadata:
            return
        key = metadata[KEY_NAMESPACE].fields[KEY].string_value
        self._picks.over(key, _served(entry, metadata))


def _served(entry: Any, metadata: Any) -> Served:
    common, flags = entry.common_properties, entry.common_properties.response_flags
    endpoint = None
    if common.HasField("upstream_remote_address"):
        address = common.upstream_remote_address.socket_address
        host = f"[{address.address}]" if ":" in address.address else address.address
        endpoint = f"{host}:{address.port_value}"
    if NAMESPACE in metadata and SERVED in metadata[NAMESPACE].fields:
        endpoint = metadata[NAMESPACE].fields[SERVED].string_value or endpoint
    gone = flags.downstream_connection_termination
    status = 0 if gone else entry.response.response_code.value
    if flags.upstream_connection_termination or flags.upstream_remote_reset:
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
