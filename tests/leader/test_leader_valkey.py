"""The lease in a real Valkey server: what the script gives, keeps and refuses."""

import asyncio

import pytest
from leading import valkey
from standins import run

from headway.core.leadership import Claim
from headway.front.lease.contract import Granted, StoreError, Taken
from headway.front.lease.valkey import ValkeyStore

KEY = "headway:leader:llama"


@pytest.fixture(scope="module")
def server():
    with valkey() as running:
        yield running


@pytest.fixture(autouse=True)
def clean(server):
    server.ask("FLUSHALL")


class Stores:
    """Two replicas."""

    def __init__(self, server, *, lease_s=60.0, **more):
        more = {"timeout_s": 2.0, "password": None} | more
        self.a, self.b = (ValkeyStore(server.url, "llama", name, lease_s, **more) for name in ("a", "b"))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.a.close()
        await self.b.close()


def claim(above=0):
    return Claim(1, 0.0, above)


def test_the_first_gets_it_and_keeps_it_with_its_token(server):
    async def test():
        async with Stores(server) as stores:
            first = await stores.a.claim(claim())
            assert isinstance(first, Granted)
            assert await stores.a.claim(claim()) == first
            other = await stores.b.claim(claim())
            assert isinstance(other, Taken)
            assert other.leader == "a" and 59.0 < other.free_in_s <= 60.0

    run(test())


def test_run_out_it_goes_to_who_asks_next_with_a_larger_token(server):
    async def test():
        async with Stores(server, lease_s=0.02) as stores:
            first = await stores.a.claim(claim())
            answer = await stores.b.claim(claim())
            while isinstance(answer, Taken):
                await asyncio.sleep(answer.free_in_s)
                answer = await stores.b.claim(claim())
            assert answer.token > first.token

    run(test())


def test_given_back_it_is_free_at_once(server):
    async def test():
        async with Stores(server) as stores:
            first = await stores.a.claim(claim())
            await stores.b.release(first.token)  # it is not b's to give
            assert isinstance(await stores.b.claim(claim()), Taken)
            await stores.a.release(first.token)
            second = await stores.b.claim(claim())
            assert second.token > first.token
            await stores.a.release(first.token)  # late, of the term before
            assert isinstance(await stores.a.claim(claim()), Taken)

    run(test())


def test_a_token_is_above_what_engines_have_seen(server):
    async def test():
        async with Stores(server) as stores:
            first = await stores.a.claim(claim())
            assert await stores.a.claim(claim(above=first.token + 5)) == Granted(first.token + 6)
            assert await stores.a.claim(claim(above=first.token + 5)) == Granted(first.token + 6)

    run(test())


def test_tokens_grow_though_the_server_has_lost_its_memory(server):
    async def test():
        async with Stores(server) as stores:
            first = await stores.a.claim(claim())
            server.ask("FLUSHALL")
            while server.ask("TIME")[0] * 1000 <= first.token:  # the next millisecond has come
                await asyncio.sleep(0.001)
            second = await stores.b.claim(claim())
            assert second.token > first.token

    run(test())


def test_a_clock_that_was_put_back_does_not_make_a_lease_longer(server):
    async def test():
        async with Stores(server, lease_s=0.05) as stores:
            first = await stores.a.claim(claim())
            server.ask("HSET", KEY, "until_ms", int(server.ask("HGET", KEY, "until_ms")) + 3_600_000)
            answer = await stores.b.claim(claim())
            assert isinstance(answer, Taken) and answer.free_in_s <= 0.05
            while isinstance(answer, Taken):
                await asyncio.sleep(answer.free_in_s)
                answer = await stores.b.claim(claim())
            assert answer.token > first.token

    run(test())


def test_pools_do_not_know_each_other(server):
    async def test():
        async with Stores(server) as stores:
            other = ValkeyStore(server.url, "qwen", "b", 60.0, timeout_s=2.0, password=None)
            assert isinstance(await stores.a.claim(claim()), Granted)
            assert isinstance(await other.claim(claim()), Granted)
            await other.close()

    run(test())


def test_what_is_wrong_with_the_server_is_told_in_one_line(server):
    async def test():
        async with Stores(server, password="wrong") as stores:
            with pytest.raises(StoreError, match="AUTH"):
                await stores.a.claim(claim())
        server.ask("SET", KEY, "of somebody else")
        async with Stores(server) as stores:
            with pytest.raises(StoreError, match="WRONGTYPE"):
                await stores.a.claim(claim())

    run(test())


def test_a_server_that_is_gone_and_comes_back():
    async def test():
        with valkey() as server:
            async with Stores(server) as stores:
                first = await stores.a.claim(claim())
                server.stop()
                with pytest.raises(StoreError) as error:
                    await stores.a.claim(claim())
                assert "\n" not in str(error.value)
                server.start()
                second = await stores.a.claim(claim())
                assert second.token > first.token

    run(test())
