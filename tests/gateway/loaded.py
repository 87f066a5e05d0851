"""A gateway under load: engines in processes of their own, which can be killed, and clients that keep count.

    python loaded.py ENGINE JOURNAL    (what a child process runs)

Each engine writes the id of every request it gets into a journal that outlives it.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp

from headway.core.events import Role
from headway.model.cluster import ClusterSpec, NetworkSpec, PoolSpec
from headway.model.costs import DenseCosts

#: A full pass takes 36 ms: 10 ms and 0.1 ms a token.
COSTS = DenseCosts(0.010, 0, 0.0001, 0.0001, 0.0, 0.0)
ENGINES = 3


def cluster(*roles: Role) -> ClusterSpec:
    shape = {"ranks": 2, "token_cap": 256, "max_running": 256, "kv_blocks": 4000, "block_tokens": 16}
    shape |= {"instances": ENGINES, "costs": COSTS, "host_gap_s": 0.0, "jitter": 0.0}
    pools = [PoolSpec(role=role, **shape) for role in roles or (Role.AGGREGATED,)]
    return ClusterSpec(name="tiny", kv_bytes_per_token=1000, network=NetworkSpec(), pools=tuple(pools))


# An engine's process


def run_engine(name: str, journal: str) -> None:
    """Emulate one engine; print where it is."""
    from headway.hosts.emulator import emulator, run_emulator, server

    class Recorded(server.Server):
        async def _generate(self, request, *, chat):
            os.write(written, f"{request.headers['X-Request-Id']}\n".encode())
            return await super()._generate(request, chat=chat)

    def ready(endpoints):
        from headway.cli.embedded import gateway_data

        print(json.dumps(gateway_data(cluster(), endpoints)["instances"][0]), flush=True)

    written = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    emulator.Server = Recorded
    run_emulator(cluster(), base_port=0, only=[name], on_ready=ready)


class Engine:
    """An engine's process. `instance`: its table in a gateway's configuration."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._journal = folder / name
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, str(self._journal)], stdout=subprocess.PIPE
        )

    async def started(self) -> None:
        assert self._process.stdout is not None
        line = await asyncio.get_running_loop().run_in_executor(None, self._process.stdout.readline)
        self.instance = json.loads(line)
        self.url = self.instance["url"]

    def kill(self) -> None:
        """Kill it with -9."""
        self._process.kill()
        self._process.communicate()

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
            self._process.communicate()

    def requests(self) -> list[str]:
        """The ids that came, each with the number of the try: load-7-12.1."""
        with suppress(FileNotFoundError):
            return self._journal.read_text().split()
        return []


# Clients


class Asked:
    """One streaming request and what its client saw."""

    def __init__(self, number: int, tokens: int) -> None:
        self.id = f"load-{number}"
        self.tokens = tokens
        self.prompt = f"{number} " * 25
        self.status = 0
        self.body = b""
        self.cut = False  # the connection broke
        self.task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        return self.body.startswith(b"data: ")

    @property
    def whole(self) -> bool:
        """Every token once, in order, then usage and the end."""
        if self.status != 200 or self.cut or not self.body.endswith(b"data: [DONE]\n\n"):
            return False
        *events, done = self._events()
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        usage = events[-1]["usage"]["completion_tokens"]
        return (
            done is None and text == " ".join(f"tok{n}" for n in range(self.tokens)) and usage == self.tokens
        )

    @property
    def broken(self) -> bool:
        """It had begun, and was told that this is not the end."""
        return self.status == 200 and self.begun and "error" in (self._events()[-1] or {})

    def _events(self):
        data = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n") if event]
        return [None if each == b"[DONE]" else json.loads(each) for each in data]

    async def send(self, client: aiohttp.ClientSession) -> None:
        body = {"model": "tiny", "prompt": self.prompt, "max_tokens": self.tokens, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        headers = {"x-request-id": self.id}
        async with client.post("/v1/completions", json=body, headers=headers) as answer:
            self.status = answer.status
            try:
                async for chunk in answer.content.iter_any():
                    self.body += chunk
            except aiohttp.ClientPayloadError:
                self.cut = True


# The whole


class Loaded:
    """Gateway, engines, clients. `asked`: all requests so far."""

    def __init__(self, engines, start_engine, front, client) -> None:
        self.engines: list[Engine] = engines
        self.start_engine = start_engine
        self.front = front
        self.asked: list[Asked] = []
        self._client: aiohttp.ClientSession = client

    def ask(self, count: int, *, tokens: int = 20) -> list[Asked]:
        """Send that many requests at once."""
        first = len(self.asked)
        new = [Asked(number, tokens) for number in range(first, first + count)]
        for each in new:
            each.task = asyncio.create_task(each.send(self._client))
        self.asked += new
        return new

    async def answered(self, asked: "Sequence[Asked] | None" = None) -> None:
        """Wait for these clients, else for all, those that left too."""
        tasks = [each.task for each in (self.asked if asked is None else asked)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        wrong = [result for result in results if isinstance(result, Exception)]
        assert not wrong, wrong[0]

    async def add_engine(self) -> Engine:
        """Start one more, which the gateway does not know of yet."""
        engine = self.start_engine()
        self.engines.append(engine)
        await engine.started()
        return engine

    def held(self) -> set[str]:
        """Ids of the requests that are not dispatched."""
        return {_client_id(held.request_id) for held in self.front.driver.held()}

    async def fault(self, engine: Engine, **fault) -> None:
        async with self._client.post(f"{engine.url}/fault", json=fault) as answer:
            assert answer.status == 200

    def sent(self) -> dict[str, list[str]]:
        """The engines that got a request, by its id, in the order of its tries. None got a try twice."""
        tries = defaultdict(dict)
        for engine in self.engines:
            for name in engine.requests():
                request, _, number = name.rpartition(".")
                assert number not in tries[_client_id(request)], f"{name} went out twice"
                tries[_client_id(request)][number] = engine.name
        return {name: [made[n] for n in sorted(made, key=int)] for name, made in tries.items()}

    async def at_engines(self) -> float:
        """Requests that the living engines still have."""
        total = 0.0
        for engine in self.engines:
            with suppress(aiohttp.ClientError):
                async with self._client.get(f"{engine.url}/metrics") as answer:
                    total += _sum(await answer.text(), "vllm:num_requests_")
        return total

    async def left(self) -> dict[str, float]:
        """What is not zero though nothing is under way."""
        front, buffer = self.front, self.front.serving.buffer
        async with self._client.get("/metrics") as answer:
            shown = await answer.text()
        counts = {
            "driver": front.driver.requests,
            "held": len(front.driver.held()),
            "buffer.requests": buffer.requests,
            "buffer.tokens": buffer.tokens,
            "buffer.bytes": buffer.bytes,
            "buffer.in_flight": buffer.in_flight,
            "legs": sum(len(worker.legs) for worker in front.workers),
            "connections": len(front.scheduler.transport.connections),
            "gauges": _sum(shown, "headway_held_requests", "headway_held_tokens", "headway_held_bytes")
            + _sum(shown, "headway_in_flight_requests", "headway_worker_legs"),
            "at engines": await self.at_engines(),
        }
        return {name: count for name, count in (counts | self._ledger()).items() if count}

    def _ledger(self) -> dict[str, int]:
        ledger = self.front.driver._policy.groups[0].policy.ledger
        ranks = [rank for load in ledger.instances.values() for rank in load.ranks]
        names = ("requests", "prompt_tokens", "own_blocks", "unacked_tokens", "unacked_blocks")
        sums = {f"ledger.{name}": sum(getattr(rank, name) for rank in ranks) for name in names}
        return sums | {"ledger.placements": len(ledger.placements)}


def _client_id(request: str) -> str:
    """What the client called it; the gateway has put a number behind."""
    return request.rpartition("-")[0]


def _sum(exposition: str, *prefixes: str) -> float:
    lines = [line for line in exposition.splitlines() if line.startswith(prefixes)]
    assert lines, prefixes
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@asynccontextmanager
async def loaded(folder: Path, *, policy: str = "staggered", **tables):
    """Run it all; in the end nothing may be left anywhere."""
    from headway.hosts.gateway import Gateway, GatewayConfig

    async with AsyncExitStack() as stack:
        names = iter(cluster().pools[0].instance_names())

        def start_engine() -> Engine:
            engine = Engine(next(names), folder)
            stack.callback(engine.close)
            return engine

        running = [start_engine() for _ in range(2)]
        await asyncio.gather(*(engine.started() for engine in running))
        data = {
            "server": {"port": 0},
            "admin": {"port": 0},
            "instances": [engine.instance for engine in running],
            "policy": {"cluster": policy},
            "health": {"interval_s": 0.1, "timeout_s": 0.5, "eject_after": 2},
            "logs": {"level": "error"},
        }
        front = await stack.enter_async_context(Gateway(GatewayConfig.parse(data | tables)))
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        client = aiohttp.ClientSession(front.url, connector=connector, timeout=timeout)
        made = Loaded(running, start_engine, front, await stack.enter_async_context(client))
        yield made
        await made.answered()
        await until(lambda: not front.serving.buffer.in_flight, "an empty gateway")
        for _ in range(200):
            left = await made.left()
            if not left:
                break
            await asyncio.sleep(0.01)
        assert not left


async def until(condition, what="the condition", timeout_s: float = 15.0) -> None:
    """Wait for something to become true."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"{what} did not come true") from None


def run(test) -> None:
    """Run a test's coroutine; none may take longer than 40 s."""

    async def bounded():
        async with asyncio.timeout(40.0):
            await test

    asyncio.run(bounded())


if __name__ == "__main__":
    run_engine(*sys.argv[1:])
