"""The picker under a lease, in virtual time: who does not lead answers nobody, who leads shows its token."""

import asyncio
import json

from parts import Envoy, Stage

from headway.core.cluster.led import Led
from headway.core.events import Failed, LeaseHeld, LeaseLost
from headway.core.leadership import FENCE_HEADER


class Lease:
    """An elector of two words: `token` None is that it does not lead."""

    def __init__(self):
        self.token = None

    def leads(self):
        return self.token is not None

    def headers(self):
        return {} if self.token is None else {FENCE_HEADER: str(self.token)}


class LedStage(Stage):
    """A stage that does not lead yet."""

    def __init__(self, **tables):
        super().__init__(**tables)
        self.lease = self.picks._elector = Lease()
        self.driver._policy = Led(self.policy, wait_s=4.0)
        for worker in self.workers:
            self.driver.feed(worker.up_event())

    def lead(self, token, until_s=100.0):
        self.lease.token = token
        self.driver.feed(LeaseHeld(until_s))
        self.clock.advance(self.clock.time() + 0.25)  # the engines say nothing


def run(test):
    async def bounded():
        async with asyncio.timeout(5.0):
            await test

    asyncio.run(bounded())


async def asking(stage, **headers):
    envoy = Envoy(stage)
    envoy.headers(**headers)
    envoy.body()
    await envoy.turn()
    return envoy


def test_a_follower_holds_until_it_leads_and_then_shows_its_token():
    async def test():
        stage = LedStage()
        envoy = await asking(stage, x_headway_fence="999")
        assert envoy.heard == []
        stage.lead(7)
        await envoy.turn()
        *_, headers, removed = envoy.destination
        assert headers[FENCE_HEADER] == "7"
        assert FENCE_HEADER not in removed  # ours has overwritten the client's
        await envoy.end()

    run(test())


def test_without_a_lease_a_client_cannot_pretend_to_one():
    async def test():
        stage = Stage()
        envoy = await asking(stage, x_headway_fence="999")
        *_, headers, removed = envoy.destination
        assert FENCE_HEADER not in headers and FENCE_HEADER in removed
        await envoy.end()

    run(test())


def test_a_follower_refuses_what_has_waited_for_long_enough():
    async def test():
        stage = LedStage()
        envoy = await asking(stage)
        stage.clock.advance(4.0)
        await envoy.turn()
        refusal = envoy.heard[-1].immediate_response
        assert refusal.status.code == 503
        assert json.loads(refusal.body)["error"]["code"] == "not_leader"
        stage.nothing_left()

    run(test())


def test_a_place_that_was_given_before_the_lease_was_lost_is_not_told_to_envoy():
    """The policy decided, and in the same turn the lease went: the request waits for the next term."""

    async def test():
        stage = LedStage()
        envoy = await asking(stage)
        stage.lead(7)
        stage.lease.token = None
        stage.driver.feed(LeaseLost())
        await envoy.turn()
        assert [event.retry for event in stage.heard(Failed)] == [True]
        assert not any(each.HasField("dynamic_metadata") for each in envoy.heard)
        stage.lead(9)
        await envoy.turn()
        *_, headers, _ = envoy.destination
        assert headers[FENCE_HEADER] == "9"
        await envoy.end()

    run(test())


def test_a_subset_hint_is_no_way_around_the_leader():
    async def test():
        stage = LedStage()
        envoy = await asking(stage, subset="10.0.0.1:8000")
        refusal = envoy.heard[-1].immediate_response
        assert refusal.status.code == 503
        stage.lead(7)
        envoy = await asking(stage, subset="10.0.0.1:8000")
        assert envoy.destination[0] == "10.0.0.1:8000"
        await envoy.end()

    run(test())
