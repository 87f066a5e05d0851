"""Clusters that are quick and easy to reckon, and a client, for the emulator's tests."""

import asyncio
import json
from contextlib import asynccontextmanager

import aiohttp

from headway.core.events import Role
from headway.hosts.emulator import Emulator
from headway.model.cluster import ClusterSpec, NetworkSpec, PoolSpec
from headway.model.costs import DenseCosts

#: 10 ms a pass, 0.1 ms a token.
COSTS = DenseCosts(0.010, 0, 0.0001, 0.0001, 0.0, 0.0)


def pool(role: Role = Role.AGGREGATED, **changes) -> PoolSpec:
    spec = {"role": role, "ranks": 2, "token_cap": 256, "max_running": 64, "kv_blocks": 500}
    spec |= {"block_tokens": 16, "costs": COSTS, "host_gap_s": 0.0, "jitter": 0.0} | changes
    return PoolSpec(**spec)


def cluster(*pools: PoolSpec) -> ClusterSpec:
    return ClusterSpec(
        name="tiny",
        kv_bytes_per_token=1000,
        network=NetworkSpec(kv_latency_s=0.02, kv_bandwidth_bytes_s=1e9),
        pools=pools or (pool(),),
    )


def disaggregated() -> ClusterSpec:
    return cluster(pool(Role.PREFILL), pool(Role.DECODE))


@asynccontextmanager
async def running(spec: ClusterSpec | None = None, **options):
    """An emulator and a client session."""
    options = {"speed": 10.0} | options
    async with Emulator(spec or cluster(), **options) as emulator, aiohttp.ClientSession() as session:
        yield emulator, session


async def post(session, url, path, body, **headers):
    """Return status and decoded answer."""
    data = body if isinstance(body, bytes) else json.dumps(body)
    async with session.post(url + path, data=data, headers=headers) as response:
        return response.status, json.loads(await response.read())


async def completion(session, url, prompt="abcdefgh", tokens=5, **more):
    headers = more.pop("headers", {})
    body = {"prompt": prompt, "max_tokens": tokens} | more
    return await post(session, url, "/v1/completions", body, **headers)


async def events_of(response) -> list[str]:
    """The data of each server-sent event of a response."""
    text = (await response.read()).decode()
    assert text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in text.split("\n\n")[:-1]]


async def until(condition, timeout_s: float = 4.0) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
