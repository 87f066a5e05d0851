"""An event loop that stands still does not lose the lease, and does not act on one it lost."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest
from leading import LEASE_S, FencedEngine, replica, valkey
from standins import chat, until

from headway.front.lease import renewal
from headway.hosts.envoy import EppConfig, Picker


@pytest.fixture(scope="module")
def server():
    with valkey() as running:
        yield running


@pytest.fixture(autouse=True)
def clean(server):
    server.ask("FLUSHALL")


def run(test):
    asyncio.run(asyncio.wait_for(test, 30.0))


@asynccontextmanager
async def gateway(engine, server):
    async with replica([engine], server) as (front, _):
        yield front


@asynccontextmanager
async def picker(engine, server):
    tables = {
        "server": {"host": "127.0.0.1", "grpc_port": 0, "grpc_health_port": 0, "drain_timeout_s": 1.0},
        "metrics": {"host": "127.0.0.1", "port": 0},
        "instances": [{"name": "e0", "url": engine.url}],
        "tls": {"mode": "off"},
        "leader": {"backend": "valkey", "url": server.url, "lease_s": LEASE_S, "replica": "p-0"},
    }
    async with Picker(EppConfig.parse(tables)) as front:
        yield front


FRONTS = pytest.mark.parametrize("front", [gateway, picker])


def block(seconds):
    """Keep the event loop from turning."""
    time.sleep(seconds)


@FRONTS
def test_a_loop_that_stands_still_for_three_leases_goes_on_leading(server, front):
    async def test():
        async with FencedEngine() as engine, front(engine, server) as door:
            await until(door.elector.leads, "the lease")
            token = door.elector.headers()
            block(3 * LEASE_S)
            assert door.elector.leads()
            await asyncio.sleep(0.05)
            assert (door.elector.terms, door.elector.headers()) == (1, token)

    run(test())


@FRONTS
def test_a_lease_that_ran_out_while_the_loop_stood_still_is_over_before_the_loop_turns(server, front):
    async def test():
        async with FencedEngine() as engine, front(engine, server) as door:
            await until(door.elector.leads, "the lease")
            server.stop()
            block(1.5 * LEASE_S)
            assert not door.elector.leads()
            assert door.elector.headers() == {}

    try:
        run(test())
    finally:
        server.start()


@FRONTS
def test_a_loop_that_is_stuck_gives_its_lease_up(server, front, monkeypatch):
    monkeypatch.setattr(renewal, "STALL_S", 0.5)

    async def test():
        async with FencedEngine() as engine, front(engine, server) as door:
            await until(door.elector.leads, "the lease")
            block(0.5 + 2 * LEASE_S)
            assert not door.elector.leads()
            (record,) = server.ask("KEYS", "headway:leader:*")
            now, _ = server.ask("TIME")
            assert float(server.ask("HGET", record, "until_ms")) / 1000 <= int(now) + 1
            await until(door.elector.leads, "the lease again")

    run(test())


def test_requests_are_served_after_a_block_as_before_it(server):
    async def test():
        async with FencedEngine() as engine, replica([engine], server) as (front, client):
            await until(front.elector.leads, "the lease")
            assert (await chat(client))[0] == 200
            block(2 * LEASE_S)
            assert (await chat(client))[0] == 200
            assert len(set(engine.tokens())) == 1 and engine.refused == 0

    run(test())
