"""How KV gets from prefill to decode: blocks pulled once, legs that meet, and legs that do not."""

import asyncio

import pytest

from headway.hosts.emulator.dispatches import Dispatches
from headway.hosts.emulator.errors import ApiError
from headway.hosts.emulator.handover import KV_EXPIRES_S, KvStore, Rooms
from headway.model.instance import Inbox


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_kv_is_pulled_once():
    store = KvStore(Clock())
    blocks = store.keep("p", prompt_tokens=33, block_tokens=16)
    assert len(blocks) == 3
    store.pull("p", blocks, 33)
    with pytest.raises(ApiError, match="has no blocks"):
        store.pull("p", blocks, 33)


def test_kv_of_another_engine_or_another_prompt_is_not_there():
    store = KvStore(Clock())
    with pytest.raises(ApiError, match="has no blocks"):
        store.pull("q", store.keep("p", 10, 16), 10)
    with pytest.raises(ApiError, match="10 tokens were computed, the prompt has 11"):
        store.pull("p", store.keep("p", 10, 16), 11)
    with pytest.raises(ApiError, match="has no blocks"):
        store.pull("p", [], 10)


def test_kv_that_nobody_pulls_expires():
    clock = Clock()
    store = KvStore(clock)
    old = store.keep("p", 10, 16)
    clock.now_s = KV_EXPIRES_S / 2
    store.keep("p", 10, 16)
    clock.now_s = KV_EXPIRES_S
    with pytest.raises(ApiError, match="has no blocks"):
        store.pull("p", old, 10)
    assert len(store) == 1


def test_kv_dies_with_its_engine():
    store = KvStore(Clock())
    store.keep("p@1", 10, 16)
    store.keep("q@1", 10, 16)
    store.drop("p@1")
    assert len(store) == 1


def test_two_legs_meet_and_the_room_is_gone_afterwards():
    async def scenario():
        rooms = Rooms(timeout_s=5.0, abort_s=5.0)

        async def prefill():
            with rooms.join(8998, 1, "prefill") as room:
                await rooms.paired(room)
                room.computed()

        async def decode():
            with rooms.join(8998, 1, "decode") as room:
                await rooms.kv(room)

        await asyncio.gather(prefill(), decode())
        assert len(rooms) == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(("leg", "waits"), [("prefill", "paired"), ("decode", "kv")])
def test_a_leg_alone_fails_after_the_timeout(leg, waits):
    async def scenario():
        rooms = Rooms(timeout_s=0.01, abort_s=0.0)
        with (
            pytest.raises(ApiError, match=r"never came within 0\.01 s"),
            rooms.join(8998, 1, leg) as room,
        ):
            await getattr(rooms, waits)(room)
        await asyncio.sleep(0)  # forgotten by a timer of 0 s
        await asyncio.sleep(0)
        assert len(rooms) == 0

    asyncio.run(scenario())


def test_an_aborted_leg_takes_the_other_along_a_while_later():
    async def scenario():
        rooms = Rooms(timeout_s=5.0, abort_s=0.02)
        loop = asyncio.get_running_loop()
        with rooms.join(8998, 1, "decode") as room:
            with pytest.raises(ZeroDivisionError), rooms.join(8998, 1, "prefill"):
                1 / 0  # noqa: B018
            aborted_s = loop.time()
            with pytest.raises(ApiError, match="the other leg was aborted"):
                await rooms.kv(room)
            assert loop.time() - aborted_s >= 0.019

    asyncio.run(scenario())


def test_the_same_leg_twice_is_refused():
    async def scenario():
        rooms = Rooms(timeout_s=5.0, abort_s=5.0)
        with (
            rooms.join(8998, 1, "decode"),
            pytest.raises(ApiError, match="has its decode leg already"),
            rooms.join(8998, 1, "decode"),
        ):
            pass

    asyncio.run(scenario())


class Numbered:
    """An instance as far as its inbox goes."""

    def __init__(self) -> None:
        self.inbox = Inbox()


def acknowledged(script, wait_s: float = 0.0) -> int:
    """What is acknowledged after numbers were expected (+) and received (-)."""

    async def scenario():
        instance = Numbered()
        dispatches = Dispatches(instance)
        for number in script:
            (dispatches.expect if number > 0 else dispatches.receive)(abs(number))
        await asyncio.sleep(wait_s)
        return instance.inbox.acknowledged

    return asyncio.run(scenario())


def test_a_number_is_acknowledged_with_all_lower_ones():
    assert acknowledged([1, 2, 3, -1, -3]) == 1
    assert acknowledged([1, 2, 3, -1, -3, -2]) == 3


def test_receiving_twice_does_no_harm():
    assert acknowledged([1, -1, -1, 2, -2, -2]) == 2


def test_a_number_that_never_comes_is_passed_over(monkeypatch):
    monkeypatch.setattr("headway.hosts.emulator.dispatches.GAP_S", 0.01)
    assert acknowledged([1, -1, 3, -3], wait_s=0.05) == 3


def test_a_scheduler_that_starts_anew_begins_a_new_count():
    assert acknowledged([500, -500, 1, -1]) == 1
    assert acknowledged([50_000, -50_000, 7, -7]) == 7


def test_a_hostile_number_costs_nothing():
    assert acknowledged([1, -1, 10**15, -(10**15)]) == 10**15
