"""Notices when a connection of Envoy's is gone: gRPC tells of streams only, and most of a request has none.

gRPC keeps a list of its connections (channelz). It is read a few times a second.
"""

import asyncio
from collections.abc import Callable

from grpc_channelz.v1 import channelz_pb2
from grpc_channelz.v1.channelz import ChannelzServicer

__all__ = ["OPTIONS", "Connections", "open_peers"]

#: How often it is looked which connections are open.
LOOK_S = 0.25
#: A server has to list its connections, and to notice one whose other end went away without a word.
OPTIONS = (
    ("grpc.enable_channelz", 1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


class Connections:
    """The connections that streams came by. `broke(peer)` hears of each that is gone."""

    def __init__(self, broke: Callable[[str], None], open_now: Callable[[], set[str]] | None = None) -> None:
        self._broke = broke
        self._open_now = open_now or open_peers
        self._used: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def note(self, peer: str) -> None:
        """Note that a stream came by a connection."""
        self._used.add(peer)

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def look(self) -> None:
        """Report the connections that are gone."""
        if not self._used:
            return
        gone = self._used - self._open_now()
        self._used -= gone
        for peer in sorted(gone):
            self._broke(peer)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()


def open_peers() -> set[str]:
    """Return the peers of all gRPC connections to this process, as a call's context names them."""
    peers: set[str] = set()
    for server in _servers():
        first, ends = 0, False
        while not ends:
            request = channelz_pb2.GetServerSocketsRequest(server_id=server, start_socket_id=first)
            answer = ChannelzServicer.GetServerSockets(request, None)
            peers |= {each.name.rpartition(" ")[2] for each in answer.socket_ref}
            ends = answer.end or not answer.socket_ref
            first = max((each.socket_id for each in answer.socket_ref), default=0) + 1
    return peers


def _servers() -> list[int]:
    answer = ChannelzServicer.GetServers(channelz_pb2.GetServersRequest(start_server_id=0), None)
    return [each.ref.server_id for each in answer.server]
