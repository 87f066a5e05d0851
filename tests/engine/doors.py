"""The gateway in front of real engines, and a client that asks it: what the tests here have in common."""

import asyncio
import json
import tomllib
from collections.abc import Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from servers import Engine, Server, free_ports

from headway.hosts.gateway import Gateway, GatewayConfig

STOCK = "stock"
#: vLLM's own scheduler, then Headway's, which publishes pass events.
SCHEDULERS = [
    STOCK,
    pytest.param(
        "fair",
        marks=pytest.mark.skipif(
            find_spec("headway.hosts.vllm") is None, reason="there is no headway.hosts.vllm"
        ),
    ),
]
#: CPU engines are slow, and share their cores with whatever else there is.
TEST_S = 180.0
BLOCK_TOKENS = 128
EXAMPLES = Path(__file__).parents[2] / "examples" / "vllm"


@dataclass
class Place:
    """An engine to be, and how the gateway's configuration calls it."""

    engine: Engine
    table: dict[str, Any] = field(default_factory=dict)

    def at(self, server: Server, **fields: object) -> dict[str, Any]:
        """Return its entry in `instances`."""
        return {"url": server.url, **self.table, **fields}


def place(scheduler: str, engine: Engine, name: str, *, lockstep: bool = False) -> Place:
    """Prepare an engine with this scheduler; `fair` publishes its passes."""
    table = {
        "name": name,
        "ranks": engine.ranks,
        "lockstep": lockstep,
        "chunk_tokens": engine.batch_tokens,
        "block_tokens": BLOCK_TOKENS,
    }
    if scheduler == STOCK:
        return Place(engine, table)
    events, snapshots = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    told = {"policy": scheduler, "name": name, "events": events, "snapshots": snapshots}
    engine = replace(
        engine,
        scheduler="headway.hosts.vllm.FairScheduler",
        additional_config={"headway": told},
        arguments=[*engine.arguments, "--middleware", "headway.hosts.vllm.Middleware"],
    )
    return Place(engine, table | {"events": events, "snapshots": snapshots})


def example(name: str, places: Sequence[Place], servers: Sequence[Server]) -> dict[str, Any]:
    """Return `instances` and `policy` of a file in `examples/vllm`, with these servers' addresses in it."""
    data = tomllib.loads((EXAMPLES / name).read_text())
    instances = []
    for table, each, server in zip(data["instances"], places, servers, strict=True):
        own = {key: value for key, value in table.items() if key not in ("events", "snapshots")}
        told = {key: each.table[key] for key in ("events", "snapshots", "block_tokens") if key in each.table}
        instances.append(own | told | {"url": server.url})
    return {"instances": instances, "policy": data["policy"]["cluster"]}


class Client:
    """Asks for generations. Every answer is its token ids, its text and its usage."""

    def __init__(self, session: aiohttp.ClientSession, model: str) -> None:
        self.session = session
        self.model = model

    async def chat(self, text: str, tokens: int = 24, **fields: object) -> "Answer":
        body = {"messages": [{"role": "user", "content": text}]}
        return await self.ask("/v1/chat/completions", body | {"max_tokens": tokens, **fields})

    async def complete(self, prompt: str | list[int], tokens: int, **fields: object) -> "Answer":
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        return await self.ask("/v1/completions", body | fields)

    async def ask(self, path: str, body: dict[str, Any]) -> "Answer":
        body = {"model": self.model, "temperature": 0.0, "return_token_ids": True, "stream": True} | body
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        async with self.session.post(path, json=body) as response:
            if response.status != 200 or not body["stream"]:
                return Answer.whole(response.status, await response.read())
            answer = Answer()
            with suppress(aiohttp.ClientPayloadError):  # cut short: the last event said why
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        answer.add(json.loads(line[6:]))
            return answer


@dataclass
class Answer:
    """What came back. `error`: what an engine or the gateway said instead."""

    status: int = 200
    text: str = ""
    ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def whole(cls, status: int, body: bytes) -> "Answer":
        answer, data = cls(status), json.loads(body)
        if status == 200:
            answer.add(data)
        else:
            answer.error = data["error"]
        return answer

    def add(self, data: dict[str, Any]) -> None:
        """Take in a whole answer, or a piece of a stream."""
        if "error" in data:
            self.error = data["error"]
        for choice in data.get("choices", ()):
            said = choice.get("message") or choice.get("delta") or choice
            self.text += said.get("content") or said.get("text") or ""
            self.ids += choice.get("token_ids") or []
        self.usage = data.get("usage") or self.usage


class Door:
    """A gateway that runs, its client, and every event its policy saw."""

    def __init__(self, gateway: Gateway, client: Client, events: list[Any]) -> None:
        self.gateway = gateway
        self.client = client
        self.events = events

    def seen(self, kind: type, instance: str | None = None) -> list[Any]:
        return [e for e in self.events if isinstance(e, kind) and instance in (None, e.instance)]


@asynccontextmanager
async def door(
    instances: Sequence[dict[str, Any]], model: str, *, policy: str = "staggered", **tables: object
):
    """Open a gateway; nothing may be left in it when the test is done."""
    events: list[Any] = []
    data = {
        "server": {"port": 0},
        "instances": list(instances),
        "policy": {"cluster": policy},
        "slo": {"ttft_s": 30.0, "tpot_s": 5.0},
        "health": {"interval_s": 0.5, "timeout_s": 20.0},  # an engine that computes answers late
    }
    config = GatewayConfig.parse(data | tables)
    async with Gateway(config, observers=[lambda now, event, actions: events.append(event)]) as gateway:
        async with talking_to(gateway.url, model) as client:
            yield Door(gateway, client, events)
        await until(lambda: gateway.driver.requests == gateway.serving.buffer.in_flight == 0)
        assert not any(worker.legs for worker in gateway.workers)


@asynccontextmanager
async def talking_to(url: str, model: str):
    """Talk to a gateway or, past it, to an engine."""
    patience = aiohttp.ClientTimeout(total=TEST_S)
    async with aiohttp.ClientSession(url, timeout=patience) as session:
        yield Client(session, model)


async def until(condition) -> None:
    """Wait until something is so; a coroutine function is asked again and again."""
    async with asyncio.timeout(30.0):
        while not (await condition() if asyncio.iscoroutinefunction(condition) else condition()):
            await asyncio.sleep(0.02)


async def metric(server: Server, name: str) -> dict[str, float]:
    """Return a metric of vLLM's by rank, of all its other labels together."""
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if line.startswith(f"{name}{{"):
            rank = line.partition('engine="')[2].partition('"')[0]
            found[rank] = found.get(rank, 0.0) + float(line.rpartition(" ")[2])
    return found


def run(test) -> None:
    """Run a test's coroutine, for so long and no longer."""

    async def bounded() -> None:
        async with asyncio.timeout(TEST_S):
            await test

    asyncio.run(bounded())


def numbers(seed: int, count: int) -> list[int]:
    """Return token ids for a prompt that no other seed begins with."""
    return [1000 + (seed * 7919 + position * 104729) % 40000 for position in range(count)]
