"""One instance out of what its ranks tell; times are literal."""

import asyncio
import logging

import pytest

from headway.core.events import InstanceUp, PassEnded, Role, Snapshot, StepModel
from headway.hosts.vllm.exposition import Collector
from headway.hosts.vllm.hub import Hub
from headway.hosts.vllm.merge import GAP_S, GATHER_S, Merge, Receipts
from headway.hosts.vllm.reports import Ended, Reporter, Shown, Started, Tally, Up
from headway.wire.schema import decode, encode
from headway.wire.subscriber import Subscriber


def up(rank=0, ranks=1, lockstep=False):
    return Up(rank, ranks, "aggregated", 2048, 100, 16, 64, lockstep)


def ended(rank=0, ran=10, seconds=0.1, dispatches=(), **shown):
    return Ended(rank, Shown(**shown), Tally(), list(dispatches), ran, seconds)


def joined(ranks, *, lockstep):
    merge = Merge("e", 1000)
    for rank in range(ranks):
        merge.take(up(rank, ranks if lockstep else 1, lockstep), 0.0)
    return merge


# Receipts


def test_numbers_are_acknowledged_in_a_row():
    receipts = Receipts()
    for number, acknowledged in ((2, 0), (1, 2), (4, 2), (3, 4)):
        receipts.receive(number, 0.0)
        assert receipts.acknowledged == acknowledged


def test_a_number_that_stays_away_is_passed_over():
    receipts = Receipts()
    receipts.receive(1, 0.0)
    receipts.receive(3, 1.0)
    receipts.catch_up(1.0 + GAP_S / 2)
    assert receipts.acknowledged == 1
    receipts.catch_up(1.0 + GAP_S)
    assert receipts.acknowledged == 3


def test_a_scheduler_that_restarts_counts_anew():
    receipts = Receipts()
    for number in range(1, 8):
        receipts.receive(number, 0.0)
    receipts.receive(1, 5.0)
    assert receipts.acknowledged == 1
    receipts.receive(50_000, 6.0)
    assert receipts.acknowledged == 50_000


# Merge


def test_independent_ranks_are_told_one_by_one_in_one_sequence():
    merge = joined(2, lockstep=False)
    assert merge.snapshot()[0] == InstanceUp("e", Role.AGGREGATED, 2, 2048, 100, 16, 64, False, 1001)
    (first,) = merge.take(ended(1, 7, 0.2, [1], queued_tokens=5, running=2, pab_tokens=9), 1.0)
    (second,) = merge.take(ended(0, 3, 0.1, [2]), 1.1)
    assert first.first_rank == 1
    assert (first.ran_tokens, first.queued_tokens, first.running, first.pab_tokens) == (
        (7,),
        (5,),
        (2,),
        (9,),
    )
    assert second.first_rank == 0
    assert second.sequence == first.sequence + 1
    assert (first.acknowledged, second.acknowledged) == (1, 2)


def test_lockstep_is_told_once():
    merge = joined(2, lockstep=True)
    merge.take(Started(0), 0.0)
    merge.take(Started(1), 0.0)
    assert merge.take(ended(0, 7, 0.20, running=1), 1.0) == []
    (passed,) = merge.take(ended(1, 5, 0.21, running=2), 1.001)
    assert passed.ran_tokens == (7, 5)
    assert passed.running == (1, 2)
    assert passed.duration_s == 0.21
    assert passed.first_rank == 0


def test_an_idle_rank_is_not_waited_for():
    merge = joined(2, lockstep=True)
    merge.take(Started(0), 0.0)
    (passed,) = merge.take(ended(0, 7), 1.0)
    assert passed.ran_tokens == (7, 0)


def test_a_late_rank_is_waited_for_but_not_long():
    merge = joined(2, lockstep=True)
    merge.take(Started(0), 0.0)
    merge.take(Started(1), 0.0)
    merge.take(ended(0, 7), 1.0)
    assert merge.flush(1.0 + GATHER_S / 2) == []
    (passed,) = merge.flush(1.0 + GATHER_S)
    assert passed.ran_tokens == (7, 0)
    assert merge.due_s is None
    (passed,) = merge.take(ended(1, 5), 1.1)
    assert passed.ran_tokens == (0, 5)


def test_a_rank_left_empty_makes_a_snapshot():
    merge = joined(1, lockstep=False)
    merge.take(ended(0, 7, queued_tokens=50, waiting=1), 1.0)
    (told,) = merge.take(ended(0, None), 2.0)
    assert isinstance(told, Snapshot)
    assert not told.busy
    assert told.queued_tokens == (0,)


def test_the_learned_model_travels():
    merge = joined(1, lockstep=False)
    model = StepModel(0.01, 1e-4, 1e-7, 0.0, 64, 0.03, 1.1)
    message = Ended(0, Shown(), Tally(), [], 5, 0.1, None, model)
    (passed,) = merge.take(message, 0.0)
    assert decode(encode(passed)).mixed_models == (model,)
    assert decode(encode(passed)).decode_models is None


def test_a_rank_nobody_knows_is_not_heard():
    assert Merge("e", 0).take(ended(3), 0.0) == []


# The hub


@pytest.fixture
def hub(tmp_path):
    reports, stats = (f"ipc://{tmp_path}/{what}" for what in ("reports", "stats"))
    hub = Hub("e", reports, stats, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0", logging.getLogger("test"))
    hub.start()
    reporter, collector = Reporter(reports), Collector(stats)
    yield hub, reporter, collector
    for each in (reporter, collector, hub):
        each.close()


async def until(true):
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def test_from_a_rank_to_a_subscriber_and_to_metrics(hub):
    hub, reporter, collector = hub
    tally, got = Tally(), []

    def samples():
        return {
            (s.name, *s.labels.values()): s.value for family in collector.collect() for s in family.samples
        }

    async def listen():
        async with Subscriber(hub.endpoint, hub.snapshot_endpoint, got.append):
            reporter.up(up())
            await until(lambda: any(isinstance(event, Snapshot) for event in got))
            assert isinstance(got[0], InstanceUp)
            reporter.received(1)
            tally.count(300, 4, 0.03)
            reporter.ended(0, Shown(queued_tokens=12, running=5), tally, (300, 0.03), None)
            await until(lambda: any(isinstance(event, PassEnded) for event in got))
            # Until the front end listens, what is told to it is lost; counts are of all time, so none is.
            while ("headway_prompt_tokens_total", "0") not in samples():
                reporter.ended(0, Shown(queued_tokens=12, running=5), tally, (0, 0.01), None)
                await asyncio.sleep(0.05)

    asyncio.run(listen())
    passed = next(event for event in got if isinstance(event, PassEnded))
    assert (passed.ran_tokens, passed.queued_tokens, passed.running) == ((300,), (12,), (5,))
    assert passed.acknowledged == 1
    shown = samples()
    assert shown["headway_prompt_tokens_total", "0"] == 300
    assert shown["headway_queued_tokens", "0"] == 12
    assert shown["headway_step_seconds_bucket", "0", "0.02"] == 0
    assert shown["headway_step_seconds_bucket", "0", "0.03"] == 1


def test_a_rank_without_a_hub_goes_on(tmp_path):
    reporter = Reporter(f"ipc://{tmp_path}/nobody")
    tally = Tally()
    for number in range(3000):
        reporter.received(number)
        reporter.ended(0, Shown(), tally, (1, 0.01), None)
    reporter.close()
    assert tally.dropped > 0
    assert sorted(reporter._dispatches) == list(range(2000, 3000)), "the highest, and no more"


def test_garbage_does_not_end_the_hub(hub, tmp_path):
    hub, reporter, _ = hub
    reporter._socket.send(b"garbage")
    got = []

    async def listen():
        async with Subscriber(hub.endpoint, hub.snapshot_endpoint, got.append):
            reporter.up(up())
            await until(lambda: got)

    asyncio.run(listen())
    assert isinstance(got[0], InstanceUp)
