"""Two gateways before the same engines, under one lease in a real Valkey server."""

import asyncio
import json
import logging
from contextlib import AsyncExitStack

import pytest
from leading import LEASE_S, FencedEngine, ready, replica, valkey
from standins import CHAT, chat, error_of, until

from headway.core.leadership import FENCE_HEADER


@pytest.fixture(scope="module")
def server():
    with valkey() as running:
        yield running


@pytest.fixture(autouse=True)
def clean(server):
    server.ask("FLUSHALL")


def run(test):
    async def bounded():
        async with asyncio.timeout(30.0):
            await test

    asyncio.run(bounded())


class Pair:
    """A leader and a follower before one engine; `wait_s`: how long they hold requests without leading."""

    def __init__(self, server, *, wait_s=10.0):
        self.server, self.wait_s = server, wait_s

    async def __aenter__(self):
        self.stack = await AsyncExitStack().__aenter__()
        self.engine = await self.stack.enter_async_context(FencedEngine())
        leading = replica([self.engine], self.server, "gw-0", wait_s=self.wait_s)
        self.leader, self.client = await self.stack.enter_async_context(leading)
        await until(self.leader.elector.leads, "a leader")
        following = replica([self.engine], self.server, "gw-1", wait_s=self.wait_s)
        self.follower, self.other = await self.stack.enter_async_context(following)
        await until(lambda: self.follower.elector.standing()["leader"], "a follower that knows")
        return self

    async def __aexit__(self, *_):
        await self.stack.__aexit__(*_)


def samples(text):
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("headway_leader"))


def test_one_leads_and_the_other_is_not_ready_and_says_who_does(server):
    async def test():
        async with Pair(server) as pair:
            is_ready, standing = await ready(pair.client)
            assert is_ready and standing["leads"] and standing["token"] > 0
            is_ready, standing = await ready(pair.other)
            assert not is_ready
            assert standing["leader"].startswith("gw-0/")
            assert standing["why"] == f"{standing['leader']} leads"
            async with pair.other.get("/health") as answer:  # it lives
                assert answer.status == 200
            async with pair.client.get("/metrics") as answer:
                told = samples(await answer.text())
            assert told == {
                'headway_leader{pool="default"}': "1.0",
                'headway_leader_terms_total{pool="default"}': "1.0",
            }
            async with pair.other.get("/metrics") as answer:
                assert samples(await answer.text())['headway_leader{pool="default"}'] == "0.0"

    run(test())


def test_what_a_leader_sends_shows_its_token(server):
    async def test():
        async with Pair(server) as pair:
            status, _, _ = await chat(pair.client)
            assert status == 200
            token = pair.leader.elector.standing()["token"]
            assert pair.engine.tokens() == [token]
            await until(lambda: token in pair.engine.shown, "a health check of the leader")
            assert set(pair.engine.shown) <= {None, token}  # the follower's show none

    run(test())


def test_a_follower_holds_a_request_until_it_leads(server):
    async def test():
        async with Pair(server) as pair:
            held = asyncio.create_task(chat(pair.other))
            await until(lambda: pair.follower.driver.held(), "a held request")
            assert pair.follower.driver.held()[0].why == "this replica does not lead the pool"
            first = pair.leader.elector.standing()["token"]
            await pair.leader.stop()
            status, _, _ = await held
            assert status == 200
            assert pair.engine.tokens()[0] > first

    run(test())


def test_without_patience_a_follower_refuses_and_says_when_to_come_back(server):
    async def test():
        async with Pair(server, wait_s=0.0) as pair:
            status, headers, body = await chat(pair.other)
            assert (status, error_of(body), headers["Retry-After"]) == (503, "not_leader", "1")
            assert pair.engine.requests == []

    run(test())


def test_an_engine_that_has_seen_a_newer_leader_refuses_and_the_request_is_placed_in_a_newer_term(server):
    """As after a pause: this replica believes that it leads, and somebody led meanwhile."""

    async def test():
        async with Pair(server) as pair:
            token = pair.leader.elector.standing()["token"]
            newer = token + 1_000_000
            pair.engine.fence.admits(newer)
            status, _, _ = await chat(pair.client)
            assert status == 200
            assert pair.engine.refused == 1
            assert pair.engine.tokens()[0] > newer
            assert pair.leader.elector.terms == 2

    run(test())


def test_valkey_gone_the_leader_steps_down_in_time_and_goes_on_when_it_is_back(caplog):
    """The request that came meanwhile is held, and served."""
    caplog.set_level(logging.INFO, "headway.leader")

    def said(message):
        return [record for record in caplog.records if record.getMessage() == message]

    async def test(server):
        async with AsyncExitStack() as stack:
            engine = await stack.enter_async_context(FencedEngine())
            front, client = await stack.enter_async_context(replica([engine], server, wait_s=20.0))
            await until(front.elector.leads, "a leader")
            first = front.elector.standing()["token"]
            await asyncio.to_thread(server.stop)
            async with asyncio.timeout(10 * LEASE_S):
                while front.elector.leads():
                    await asyncio.sleep(0.01)
            is_ready, standing = await ready(client)
            assert not is_ready
            assert standing["why"].startswith("the store of leases does not answer: ")
            await until(lambda: said("this replica leads no more"), "a line in the log")
            assert "does not answer" in said("this replica leads no more")[0].reason
            held = asyncio.create_task(chat(client))
            await until(lambda: front.driver.held(), "a held request")
            assert engine.requests == []
            await asyncio.to_thread(server.start)
            status, _, _ = await held
            assert status == 200
            assert engine.tokens()[0] > first
            assert len(said("the store of leases does not answer")) == 1  # not once a try
            assert len(said("the store of leases answers again")) == 1
            assert len(said("this replica leads")) == 2

    with valkey() as server:
        run(test(server))


def test_a_leader_that_drains_gives_the_lease_back_when_its_streams_have_begun(server):
    async def test():
        async with Pair(server) as pair:
            pair.engine.more.clear()
            async with pair.client.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
                await answer.content.readany()
                draining = asyncio.create_task(pair.leader.drain())
                await until(pair.follower.elector.leads, "the next leader")
                assert not draining.done()
                pair.engine.more.set()
                rest = await answer.content.read()
                assert rest.endswith(b"data: [DONE]\n\n")
            assert await draining

    run(test())


def test_the_page_and_the_operators_see_who_leads(server):
    async def test():
        async with Pair(server) as pair, pair.other.get("/admin/live") as answer:
            assert answer.status == 200
            line = b""
            while not line.startswith(b"data:"):
                line = await answer.content.readline()
            told = json.loads(line.removeprefix(b"data:"))
            assert not told["ready"]
            assert told["leader"]["leads"] is False and told["leader"]["leader"].startswith("gw-0/")

    run(test())


def test_a_client_cannot_set_the_token(server):
    async def test():
        async with Pair(server) as pair:
            status, _, _ = await chat(pair.client, headers={FENCE_HEADER: "999999999999999"})
            assert status == 200
            assert pair.engine.tokens() == [pair.leader.elector.standing()["token"]]

    run(test())
