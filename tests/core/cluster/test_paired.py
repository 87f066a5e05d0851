"""Two pools at once: both legs are placed at the prefill's dispatch, and live and die together."""

import random

import pytest

from headway.core.actions import Dispatch, Recall, Reject
from headway.core.cluster import Paired, create_cluster
from headway.core.events import (
    Cancelled,
    Failed,
    Finished,
    InstanceDown,
    InstanceDraining,
    PrefillDone,
    TimerFired,
)
from headway.testing import arrived, pass_ended, up


class Pair:
    """A paired policy in front of a prefill and a decode instance, and what it did of late."""

    def __init__(self, spec="least-requests", *, prefills=("prefill-0",), decodes=("decode-0",)):
        two = create_cluster(spec, disaggregated=True, rng=random.Random(0))
        self.policy = Paired(two.prefill, two.decode)
        for name in (*prefills, *decodes):
            self.feed(up(name, kv_blocks=100), 0.0)

    def feed(self, event, now):
        return [_short(action) for action in self.policy.handle(event, now)]

    def is_empty(self):
        policy = self.policy
        pools = (policy.prefill, policy.decode)
        kept = [policy._requests, policy._decoding, policy.held()]
        return not any([*kept, *(pool.ledger.placements for pool in pools)])


def _short(action):
    if isinstance(action, Dispatch):
        return (action.request_id, action.instance)
    return (type(action).__name__, action.request_id) if isinstance(action, Reject | Recall) else action


BOTH = [("r1", "prefill-0"), ("r1", "decode-0")]


def test_both_legs_are_placed_when_the_prefill_is():
    pair = Pair()
    assert pair.feed(arrived("r1"), 1.0) == BOTH
    assert pair.feed(PrefillDone("r1"), 2.0) == []
    assert pair.feed(Finished("r1", 9), 3.0) == []
    assert pair.is_empty()


def test_a_prefill_that_is_held_keeps_its_decode_leg_back():
    pair = Pair("staggered+least-requests")
    assert pair.feed(arrived("r1", prompt=1000), 1.0) == BOTH
    assert pair.feed(arrived("r2", prompt=1000), 1.1) == []
    done = pass_ended("prefill-0", 1, ran=(1000,), acknowledged=1)
    assert pair.feed(done, 2.0) == [("r2", "prefill-0"), ("r2", "decode-0")]


def test_a_round_of_decode_placement_comes_with_its_timer():
    pair = Pair("least-requests+iqr-lexicographic")
    assert pair.feed(arrived("r1"), 1.0) == BOTH[:1]
    assert pair.policy.wake_at() == 1.0
    assert pair.feed(TimerFired(), 1.0) == BOTH[1:]


@pytest.mark.parametrize("end", [Cancelled("r1"), Finished("r1", 1), Failed("r1", "lost", False)])
@pytest.mark.parametrize("prefilled", [False, True])
def test_nothing_is_remembered_of_what_is_over(end, prefilled):
    pair = Pair()
    pair.feed(arrived("r1"), 1.0)
    if prefilled:
        pair.feed(PrefillDone("r1"), 2.0)
    assert pair.feed(end, 3.0) == []
    assert pair.is_empty()


@pytest.mark.parametrize("prefilled", [False, True])
def test_a_leg_that_fails_takes_the_other_along_and_both_are_placed_anew(prefilled):
    pair = Pair(decodes=("decode-0", "decode-1"))
    assert pair.feed(arrived("r1"), 1.0) == BOTH
    if prefilled:
        pair.feed(PrefillDone("r1"), 1.5)
    pair.feed(InstanceDraining("decode-0"), 2.0)
    assert pair.feed(Failed("r1", "refused", True), 2.0) == [("r1", "prefill-0"), ("r1", "decode-1")]
    pair.feed(Finished("r1", 5), 3.0)
    assert pair.is_empty()


@pytest.mark.parametrize(
    "end", [Cancelled("r1"), Finished("r1", 1), Failed("r1", "lost", False), Failed("r1", "refused", True)]
)
def test_the_place_that_a_request_leaves_is_given_to_the_next_one_with_both_legs(end):
    pair = Pair("staggered+least-requests")
    assert pair.feed(arrived("r1", prompt=1000), 1.0) == BOTH
    assert pair.feed(arrived("r2", prompt=1000), 1.1) == []
    assert pair.feed(end, 2.0) == [("r2", "prefill-0"), ("r2", "decode-0")]
    assert ("r1" in pair.policy.prefill.buffer) == (isinstance(end, Failed) and end.retry)


def test_the_prefill_leg_of_an_instance_that_falls_silent_is_recalled_with_its_decode_leg():
    pair = Pair("staggered:watchdog_floor_s=1:watchdog_factor=1+least-requests")
    assert pair.feed(arrived("r1"), 1.0) == BOTH
    recalled, now = [], 1.0
    while not recalled and now < 20.0:
        now = max(now, pair.policy.wake_at())
        recalled = [action for action in pair.feed(TimerFired(), now) if isinstance(action, tuple)]
    assert recalled == [("Recall", "r1")]
    assert not pair.policy.decode.ledger.placements and len(pair.policy.held()) == 1


def test_what_decode_can_never_hold_is_refused_before_its_prefill():
    pair = Pair()
    assert pair.feed(arrived("r1", prompt=5000), 1.0) == [("Reject", "r1")]
    assert pair.is_empty()


def test_without_a_decode_instance_the_second_place_comes_when_one_is_up():
    pair = Pair(decodes=())
    assert pair.feed(arrived("r1"), 1.0) == BOTH[:1]
    assert pair.feed(up("decode-0"), 2.0) == BOTH[1:]


def test_an_instance_that_goes_down_takes_only_its_own_pool_along():
    pair = Pair(prefills=("prefill-0", "prefill-1"))
    pair.feed(arrived("r1"), 1.0)
    pair.feed(InstanceDown("prefill-0"), 2.0)
    assert pair.feed(Failed("r1", "down", True), 2.0) == [("r1", "prefill-1"), ("r1", "decode-0")]
