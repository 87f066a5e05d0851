"""Pass events over ZeroMQ into the policy, and the gateway in front of emulated engines."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from standins import StandIn, chat, gateway, run, running, until

from headway.core.events import InstanceDown, InstanceDraining, InstanceUp, PassEnded, Role, Snapshot
from headway.front.config import InstanceSpec
from headway.front.inference import Inference
from headway.front.worker import Worker
from headway.hosts.emulator.emulator import Emulator
from headway.model.presets import load_cluster
from headway.wire.publisher import Publisher

HELLO = InstanceUp("its-own-name", Role.AGGREGATED, 1, 4096, kv_blocks=777, epoch=5)


@asynccontextmanager
async def published(hello=HELLO, stand_in=None):
    """A stand-in that publishes events, with a gateway in front; yields what the policy hears."""
    stands = [hello]
    answers = lambda: (stands[0], Snapshot("its-own-name", stands[0].epoch, 1, 0, False, (0,)))  # noqa: E731
    async with (
        Publisher("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", answers) as publisher,
        stand_in or StandIn() as engine,
        gateway(
            [engine], instance={"events": publisher.endpoint, "snapshots": publisher.snapshot_endpoint}
        ) as (front, client),
    ):
        heard = []
        front.driver._observers += (lambda now, event, actions: heard.append(event),)
        yield front, client, publisher, heard, stands


def ended(sequence, acknowledged, epoch=5):
    return PassEnded("its-own-name", epoch, sequence, acknowledged, 0.1, (300,), (0,))


def test_an_engine_introduces_itself_and_its_passes_are_heard_under_our_name():
    async def check():
        async with published() as (front, client, publisher, heard, _):
            told = front.workers.named("engine-0").told
            assert (told.instance, told.epoch, told.chunk_tokens, told.kv_blocks) == (
                "engine-0",
                5,
                4096,
                777,
            )
            await chat(client)
            publisher.publish(ended(2, 1))
            await until(lambda: any(isinstance(event, PassEnded) for event in heard))
            passes = [event for event in heard if isinstance(event, PassEnded)]
            assert passes == [replace(ended(2, 1), instance="engine-0")]  # and none was worked out

    run(check())


def test_a_restart_is_a_new_epoch():
    async def check():
        async with published() as (_, client, publisher, heard, stands):
            stands[0] = replace(HELLO, epoch=6)
            publisher.publish(stands[0])
            await until(lambda: any(isinstance(event, InstanceUp) for event in heard))
            assert next(event for event in heard if isinstance(event, InstanceUp)).epoch == 6
            assert (await chat(client))[0] == 200

    run(check())


def test_a_goodbye_is_believed_at_once():
    async def check():
        async with published() as (_, _, publisher, heard, _):
            publisher.publish(InstanceDown("its-own-name"))
            await until(lambda: InstanceDown("engine-0") in heard)

    run(check())


@pytest.mark.parametrize("word", [InstanceDown, InstanceDraining])
def test_an_engine_that_leaves_is_not_taken_back_because_it_still_passes_checks(word):
    async def check():
        async with published() as (front, _, publisher, _, stands):
            worker = front.workers.named("engine-0")
            publisher.publish(word("its-own-name"))
            await until(lambda: not worker.takes_work())
            passed = worker.health.passed
            await until(lambda: worker.health.passed > passed + 3, "checks that it passes")
            assert worker.state.value == ("down" if word is InstanceDown else "ejected")
            stands[0] = replace(HELLO, epoch=6)
            publisher.publish(stands[0])
            await until(worker.takes_work)
            assert worker.told.epoch == 6

    run(check())


@pytest.mark.parametrize("word", [InstanceDown, InstanceDraining])
def test_an_engine_that_left_is_taken_back_when_it_was_away(word):
    async def check():
        engine = StandIn()
        async with published(stand_in=engine) as (front, _, publisher, _, _):
            worker = front.workers.named("engine-0")
            publisher.publish(word("its-own-name"))
            await until(lambda: not worker.takes_work())
            engine.healthy = False
            await until(lambda: not worker.health.leaving)
            assert worker.state.value == "down"
            engine.healthy = True
            await until(worker.takes_work)

    run(check())


def test_a_poll_asks_the_engine():
    async def check():
        async with published() as (front, _, _, _, _):
            before = front.workers.named("engine-0").listener._subscriber.snapshots
            front.workers.poll("engine-0")
            await until(lambda: front.workers.named("engine-0").listener._subscriber.snapshots > before)

    run(check())


async def worker():
    made = Worker(InstanceSpec(name="a", url="http://h:1"))
    made.inference = Inference(made, print, print, clock=lambda: 0.0, call_at=lambda *a: None, gather_s=0.0)
    return made


def test_dispatch_numbers_go_on_over_the_wire_when_the_policys_begin_again():
    async def check():
        engine = await worker()
        assert [engine.wire_number(n) for n in (1, 2, 3)] == [1, 2, 3]
        engine.rebase()
        assert engine.wire_number(1) == 4
        assert [engine.acknowledged(n) for n in (3, 4)] == [0, 1]  # an old acknowledgement says nothing

    run(check())


def test_an_engine_that_counted_for_another_gateway_is_understood():
    async def check():
        engine = await worker()
        assert engine.acknowledged(500) == 0
        assert engine.wire_number(1) == 501
        assert engine.acknowledged(501) == 1

    run(check())


@asynccontextmanager
async def in_front_of(preset, policy, dialect, **options):
    """A gateway in front of emulated engines."""
    async with Emulator(load_cluster(preset), dialect=dialect, speed=20.0, **options) as emulator:
        listed = [
            {
                "name": e.instance,
                "url": e.url,
                "role": e.role.value,
                "ranks": e.ranks,
                "rank_by": e.rank_by,
                "dialect": dialect,
                "events": e.events,
                "snapshots": e.snapshots,
            }
            | ({"bootstrap_port": e.bootstrap_port} if e.bootstrap_port else {})
            for e in emulator.endpoints
        ]
        data = {"server": {"port": 0}, "instances": listed, "policy": {"cluster": policy}}
        async with running(data) as (front, client):
            yield emulator, front, client


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("policy", ["staggered", "round-robin+iqr-lexicographic"])
def test_emulated_prefill_and_decode(dialect, policy):
    async def check():
        async with in_front_of("dsv3-h200-pd", policy, dialect) as (emulator, front, client):
            heard = []
            front.driver._observers += (lambda now, event, actions: heard.append(event),)
            body = {"prompt": list(range(2000)), "max_tokens": 4, "stream": True}
            answers = await asyncio.gather(
                *(chat(client, body, path="/v1/completions") for _ in range(12)),
                *(chat(client, body | {"stream": False}, path="/v1/completions") for _ in range(4)),
            )
            assert {status for status, _, _ in answers} == {200}, answers
            assert any(isinstance(event, PassEnded) for event in heard)
            await until(lambda: not any(instance.requests for instance in emulator.instances))

    run(check())


def test_emulated_aggregated_engines():
    async def check():
        async with in_front_of("llama8b-h100-x4", "staggered", "vllm") as (_, _, client):
            calls = (chat(client, model=None, max_tokens=3, stream=True) for _ in range(9))
            answers = await asyncio.gather(*calls)
            assert {status for status, _, _ in answers} == {200}, answers

    run(check())


def test_a_new_term_counts_apart_from_what_another_leader_counted():
    async def check():
        engine = await worker()
        assert engine.acknowledged(500) == 0  # of the other leader's
        engine.count_anew()
        assert engine.wire_number(1) == 20_501
        assert [engine.acknowledged(n) for n in (500, 512, 20_500, 20_501)] == [0, 0, 0, 1]

    run(check())
