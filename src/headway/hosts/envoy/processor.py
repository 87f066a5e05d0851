"""Serves Envoy's streams on one port: external processing, its access log, and health checks.

A picker has one of these in its own process, or several in processes of their own (`processors.py`); who
decides is behind the desk either way.
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from headway.core.errors import ConfigError
from headway.hosts.envoy import connections
from headway.hosts.envoy.accounting import AccessLogs
from headway.hosts.envoy.config import EppConfig
from headway.hosts.envoy.connections import Connections
from headway.hosts.envoy.health import Health
from headway.hosts.envoy.messages import (
    ACCESS_LOG,
    EXT_PROC,
    ProcessingRequest,
    ProcessingResponse,
    StreamAccessLogsMessage,
    StreamAccessLogsResponse,
)
from headway.hosts.envoy.secure import Pem, credentials
from headway.hosts.envoy.stream import Streams, Tools

__all__ = ["Processor", "address", "listen"]

#: What came over the wire beside a body, in one message.
MESSAGE_ROOM_BYTES = 1 << 20
#: Entries of the access log that Envoy may send in one message (`buffer_size_bytes` in deploy/envoy).
LOG_BYTES = 16 << 20
#: gRPC keeps new streams in a queue until they are asked for, and sheds them when it is long or they are old.
#: Every stream is a held request here, bounded by `[limits]`, so that nothing may be shed below. Nor are the
#: streams of a connection bounded: Envoy opens more before it has heard of a bound, and fails those.
_MANY = 1 << 20
_OPTIONS = (
    ("grpc.server.max_pending_requests", _MANY),
    ("grpc.server.max_pending_requests_hard_limit", _MANY),
    ("grpc.server_max_unrequested_time_in_server", 3600),
    ("grpc.max_concurrent_streams", (1 << 31) - 1),
)


class Processor:
    """One port for Envoy, in plain text without `pem`. `shared`: other processes listen on it too."""

    def __init__(self, tools: Tools, health: Health, pem: Pem | None, *, shared: bool = False) -> None:
        self._config = tools.config
        self._health = health
        self._pem = pem
        self._shared = shared
        self._connections = Connections(tools.desk.broke)
        self._streams = Streams(tools, self._connections.note)
        self._access_logs = AccessLogs(tools.desk, self._connections.note)
        self._server: grpc.aio.Server | None = None

    @property
    def open(self) -> int:
        """How many ext_proc streams are open."""
        return self._streams.open

    async def start(self, port: int) -> int:
        """Listen; return the port. Raises ConfigError when it cannot be bound."""
        self._server, bound = await listen(
            self._config,
            port,
            credentials(self._pem),
            self._health,
            handlers=self._handlers(),
            shared=self._shared,
        )
        self._connections.start()
        return bound

    @property
    def serves(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    async def drain(self, patience_s: float) -> bool:
        """Let open streams come to their end, and take no further ones (GOAWAY); whether all did in time."""
        await self._connections.stop()  # they end now, and not because an Envoy did
        self._access_logs.stop()
        if self._server is None:
            return True
        clock = asyncio.get_running_loop().time
        began_s = clock()
        await self._server.stop(patience_s)
        return clock() - began_s < patience_s

    async def stop(self) -> None:
        """End everything at once."""
        await self._connections.stop()
        self._access_logs.stop()
        if self._server is not None:
            await self._server.stop(None)

    def _handlers(self) -> tuple[Any, ...]:
        process = grpc.stream_stream_rpc_method_handler(
            self._streams.process,
            request_deserializer=ProcessingRequest.FromString,
            response_serializer=ProcessingResponse.SerializeToString,
        )
        log = grpc.stream_unary_rpc_method_handler(
            self._access_logs.listen,
            request_deserializer=StreamAccessLogsMessage.FromString,
            response_serializer=StreamAccessLogsResponse.SerializeToString,
        )
        return (
            grpc.method_handlers_generic_handler(EXT_PROC, {"Process": process}),
            grpc.method_handlers_generic_handler(ACCESS_LOG, {"StreamAccessLogs": log}),
        )


def address(config: EppConfig, port: int) -> str:
    """Write down where a port is."""
    host = config.server.host
    return f"{f'[{host}]' if ':' in host else host}:{port}"


async def listen(
    config: EppConfig,
    port: int,
    secure: grpc.ServerCredentials | None,
    health: Health,
    *,
    handlers: tuple[Any, ...] = (),
    shared: bool = False,
) -> tuple[grpc.aio.Server, int]:
    """Serve gRPC, health checks at least; return the server and its port. Raises ConfigError when the port
    cannot be bound.
    """
    limit = max(config.limits.max_body_bytes, LOG_BYTES) + MESSAGE_ROOM_BYTES
    own = (("grpc.max_receive_message_length", limit), ("grpc.so_reuseport", int(shared)))
    server = grpc.aio.server(options=(*_OPTIONS, *connections.OPTIONS, *own))
    add_HealthServicer_to_server(health.servicer, server)
    server.add_generic_rpc_handlers(handlers)
    where = address(config, port)
    try:
        bound = server.add_insecure_port(where) if secure is None else server.add_secure_port(where, secure)
    except RuntimeError:
        raise ConfigError(f"cannot listen on {where}: it is taken, or not ours") from None
    await server.start()
    return server, int(bound)
