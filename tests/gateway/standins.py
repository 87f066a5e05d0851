"""Stand-in engines and a few words the gateway's tests share.

A `StandIn` answers like a small OpenAI-compatible engine and does as a test tells it: fail, hang, break off.
"""

import asyncio
import json
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
from aiohttp import web

from headway.hosts.gateway import Gateway, GatewayConfig

EVENT = b'data: {"choices":[{"delta":{"content":"tok"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWER = {
    "id": "x",
    "choices": [{"message": {"content": "hi"}}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3},
}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


def run(test):
    """Run a test's coroutine; none may take longer than 5 s."""

    async def bounded():
        async with asyncio.timeout(5.0):
            await test

    asyncio.run(bounded())


async def until(condition, what="the condition"):
    """Wait for something to become true."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"{what} did not come true")


class StandIn:
    """One engine. Set its attributes to change what it does."""

    def __init__(self, models=("tiny",)):
        self.models = models  # names, or entries of /v1/models
        self.asked_for_models = 0
        self.requests = []  # (path, headers, body as parsed)
        self.bodies = []  # as they came
        self.aborted = 0
        self.under_way = 0
        self.healthy = True
        self.status = 200
        self.says = "no"  # when its status is not 200
        self.chunks = [EVENT, EVENT, USAGE, DONE]
        self.go = asyncio.Event()  # answers begin when it is set
        self.go.set()
        self.more = asyncio.Event()  # streams go on after the first chunk when it is set
        self.more.set()
        self.break_after = None  # chunks after which the connection is cut
        self.extra = {}  # more fields of a JSON answer
        self.answers = {}  # JSON answers of other paths
        self.metrics = ""
        self.scraped = 0
        self.answers_checks = asyncio.Event()  # /health answers when it is set
        self.answers_checks.set()
        self.nodelay = []

    async def __aenter__(self):
        self._runner = web.ServerRunner(
            web.Server(self._handle, handler_cancellation=True), shutdown_timeout=0.05
        )
        await self._runner.setup()
        await self._listen(0)
        return self

    async def _listen(self, port):
        self._site = web.TCPSite(self._runner, "127.0.0.1", port)
        await self._site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def kill(self):
        """Close the port and every connection, as a killed process does."""
        await self._site.stop()
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def _handle(self, request):
        if request.path == "/health":
            await self.answers_checks.wait()
            return web.Response(status=200 if self.healthy else 500)
        if request.path == "/v1/models":
            self.asked_for_models += 1
            listed = [{"id": n, "max_model_len": 1000} if isinstance(n, str) else n for n in self.models]
            return web.json_response({"data": listed})
        if request.path == "/metrics":
            self.scraped += 1
            return web.Response(text=self.metrics, status=200 if self.metrics else 404)
        return await self._generate(request)

    async def _generate(self, request):
        raw = await request.read()
        is_json = raw[:1] in (b"{", b"[")
        body = json.loads(raw) if is_json else {}
        self.bodies.append(raw)
        self.requests.append((request.path, request.headers.copy(), body))
        self.under_way += 1
        try:
            await self.go.wait()
            if self.status != 200:
                return web.json_response({"error": {"message": self.says}}, status=self.status)
            if request.path in self.answers:
                return web.json_response(self.answers[request.path])
            if body.get("stream"):
                return await self._stream(request)
            return web.json_response(ANSWER | self.extra)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.under_way -= 1

    async def _stream(self, request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number, chunk in enumerate(self.chunks):
            if number == self.break_after:
                request.transport.abort()
            await response.write(chunk)
            await self.more.wait()
        return response


def instances(engines, **more):
    return [{"name": f"engine-{n}", "url": engine.url} | more for n, engine in enumerate(engines)]


@asynccontextmanager
async def gateway(engines, policy="round-robin", *, instance=None, **tables):
    """Run a gateway in front of aggregated stand-ins, and a client; checks that nothing is left behind."""
    data = {
        "server": {"port": 0, "drain_timeout_s": 2.0},
        "instances": instances(engines, **(instance or {})),
        "policy": {"cluster": policy},
        "health": {"interval_s": 0.02},
    }
    for name, table in tables.items():
        data[name] = data[name] | table if isinstance(data.get(name), dict) else table
    async with running(data) as pair:
        yield pair


@asynccontextmanager
async def running(data, **options):
    """Run a gateway from plain data, and a client."""
    async with AsyncExitStack() as stack:
        front = await stack.enter_async_context(Gateway(GatewayConfig.parse(data), **options))
        client = await stack.enter_async_context(aiohttp.ClientSession(front.url))
        yield front, client
        await until(lambda: front.driver.requests == 0, "an empty gateway")
        buffer = front.serving.buffer
        assert (buffer.requests, buffer.tokens, buffer.bytes, buffer.in_flight) == (0, 0, 0, 0)
        assert not any(worker.legs for worker in front.workers)
        assert not any(pool.ledger.placements for pool in pools(front))


def pools(front):
    policy = front.driver._policy
    policy = getattr(policy, "_policy", policy)  # under a lease
    policies = [group.policy for group in policy.groups]
    return [
        pool
        for each in policies
        for pool in ([each.prefill, each.decode] if hasattr(each, "prefill") else [each])
    ]


async def chat(client, body=None, *, headers=None, path="/v1/chat/completions", **fields):
    """Post a chat; return (status, headers, body bytes)."""
    data = body if isinstance(body, bytes) else json.dumps((CHAT if body is None else body) | fields).encode()
    async with client.post(path, data=data, headers=headers) as answer:
        return answer.status, answer.headers, await answer.read()


def error_of(body):
    """Return the code of an OpenAI-shaped error."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error["code"]
