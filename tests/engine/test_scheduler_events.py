"""What a real scheduler of ours tells of its passes."""

import asyncio
from functools import partial

import pytest

pytest.importorskip("vllm")

import zmq
from scheduler_kit import Bench
from vllm.v1.request import RequestStatus

from headway.core.events import InstanceUp, PassEnded, Snapshot
from headway.hosts.vllm import FairScheduler, hub
from headway.wire.publisher import Publisher
from headway.wire.subscriber import Subscriber

ANY = {"events": "tcp://127.0.0.1:0", "snapshots": "tcp://127.0.0.1:0", "name": "engine-0"}


@pytest.fixture
def it(tmp_path):
    bench = Bench(tmp_path, FairScheduler, headway=ANY, seats=8, tokens=256)
    yield bench
    bench.close()


async def until(true):
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def heard(it, act):
    """Run `act(got)` while somebody listens; return what was heard."""
    got = []
    its_hub = it.scheduler.headway._hub

    async def listen():
        async with Subscriber(its_hub.endpoint, its_hub.snapshot_endpoint, got.append):
            await until(lambda: any(isinstance(event, Snapshot) for event in got))
            await act(got)

    asyncio.run(listen())
    return got


def passes(got):
    return [event for event in got if isinstance(event, PassEnded)]


def test_each_pass_is_told_with_the_state_after_it(it):
    async def act(got):
        it.add(300, 3, name="a", headway_dispatch=1)
        it.add(100, 2, name="b", headway_dispatch=2)
        while it.scheduler.requests:
            it.step()
        await until(lambda: len(passes(got)) == 4)

    got = heard(it, act)
    up = got[0]
    assert isinstance(up, InstanceUp)
    assert (up.instance, up.ranks, up.lockstep, up.chunk_tokens, up.kv_blocks) == (
        "engine-0",
        1,
        False,
        256,
        4096,
    )
    assert [event.ran_tokens for event in passes(got)] == [(256,), (144,), (0,), (0,)]
    assert [event.queued_tokens for event in passes(got)] == [(144,), (0,), (0,), (0,)]
    assert [event.running for event in passes(got)] == [(1,), (2,), (1,), (0,)]
    assert [event.waiting for event in passes(got)] == [(1,), (0,), (0,), (0,)]
    assert [event.kv_blocks for event in passes(got)][:2] == [(16,), (26,)]
    assert {event.acknowledged for event in passes(got)} == {2}


def test_a_withdrawal_that_leaves_nothing_is_told(it):
    async def act(got):
        it.add(1000, name="a")
        it.step()
        await until(lambda: passes(got))
        got.clear()
        it.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
        await until(lambda: any(isinstance(event, Snapshot) for event in got))

    snapshot = heard(it, act)[-1]
    assert not snapshot.busy
    assert (snapshot.queued_tokens, snapshot.kv_blocks, snapshot.running) == ((0,), (0,), (0,))


def test_the_learned_model_and_the_admission_budget_are_told(it):
    async def act(got):
        for n in range(80):
            it.add(40, 30, name=f"r{n}")
            it.step()
        await until(lambda: any(event.mixed_models for event in got if isinstance(event, PassEnded)))
        await until(lambda: any(event.pab_tokens is not None for event in passes(got)))

    got = heard(it, act)
    (model,) = next(event.mixed_models for event in passes(got) if event.mixed_models)
    assert model.steps >= 16
    assert model.margin >= 1.0


def test_a_subscriber_that_never_reads_holds_up_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "Publisher", partial(Publisher, high_water_mark=1))
    told = ANY | {"events": f"ipc://{tmp_path}/events"}  # its buffers are smaller than TCP's
    it = Bench(tmp_path, FairScheduler, headway=told, seats=8, tokens=256)
    its_hub, tally = it.scheduler.headway._hub, it.scheduler.headway.driver.tally
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    socket.connect(its_hub.endpoint)
    it.add(8, 6000, name="a")
    while not socket.poll(10):
        it.step()  # until it is there; it never reads

    async def told_all():
        await until(lambda: its_hub._merge._sequence >= tally.steps)

    while it.scheduler.requests:
        it.step()
        if tally.steps % 500 == 0:  # half of what a rank may have on its way
            asyncio.run(told_all())
    asyncio.run(told_all())
    assert tally.steps == 6000
    assert (tally.dropped, tally.failures) == (0, 0)
    read = 0
    while socket.poll(100):
        socket.recv_multipart()
        read += 1
    assert read < 6000, "it was never behind"
    socket.close(linger=0)
    it.close()
