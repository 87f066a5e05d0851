"""The simulator's driver: when a policy is woken, and what observers see."""

import pytest

from headway.core.actions import Poll
from headway.core.cluster.contract import ClusterPolicy
from headway.core.errors import InvariantError
from headway.core.events import InstanceDown, TimerFired
from headway.hosts.sim.driver import Driver, Recorder
from headway.hosts.sim.kernel import REPORT, Kernel


class Alarm(ClusterPolicy):
    """Does as it is told: each InstanceDown's name is the next time to wake up at."""

    acts = False

    def __init__(self):
        self.wake_s = None
        self.woken = []

    def handle(self, event, now):
        if isinstance(event, InstanceDown):
            self.wake_s = float(event.instance) if event.instance else None
            return [Poll("a")]
        self.woken.append(now)
        self.wake_s = self.next_wake_s(now)
        return [Poll("b")] if self.acts else []

    def next_wake_s(self, now):
        return None

    def wake_at(self):
        return self.wake_s

    def held(self):
        return []


def drive(policy, *times, observers=()):
    """Feed `InstanceDown(next wake time)` at each (time, wake time)."""
    kernel, done = Kernel(), []
    driver = Driver(policy, kernel, lambda now, action: done.append((now, action)), observers)
    for at_s, wake in times:
        kernel.at(at_s, REPORT, lambda now, w=wake: driver.feed(InstanceDown(w), now))
    kernel.run()
    return done


def test_a_policy_is_woken_at_the_time_it_asks_for():
    policy = Alarm()
    assert drive(policy, (1.0, "3.0")) == [(1.0, Poll("a"))]
    assert policy.woken == [3.0]


def test_a_wake_up_time_can_move_later_earlier_and_away():
    later, earlier, away = Alarm(), Alarm(), Alarm()
    drive(later, (1.0, "2.0"), (1.5, "4.0"))
    drive(earlier, (1.0, "4.0"), (1.5, "2.0"))
    drive(away, (1.0, "4.0"), (1.5, ""))
    assert (later.woken, earlier.woken, away.woken) == ([4.0], [2.0], [])


def test_a_wake_up_time_in_the_past_means_now_after_the_other_things_of_the_instant():
    policy, order = Alarm(), []
    note = lambda now, event, actions: order.append((now, type(event).__name__))  # noqa: E731
    drive(policy, (1.0, "0.5"), (1.0, "0.25"), observers=[note])
    assert order == [(1.0, "InstanceDown"), (1.0, "InstanceDown"), (1.0, "TimerFired")]


def test_a_policy_that_wakes_for_nothing_again_and_again_is_a_bug():
    policy = Alarm()
    policy.next_wake_s = lambda now: now
    with pytest.raises(InvariantError, match=r"Alarm wants to be woken at 2\.0 s again and again"):
        drive(policy, (1.0, "2.0"))


def test_observers_see_events_with_their_actions_and_the_recorder_leaves_timers_out():
    policy, recorder, seen = Alarm(), Recorder(), []
    policy.acts = True
    drive(policy, (1.0, "3.0"), observers=[recorder, lambda *what: seen.append(what)])
    assert seen == [(1.0, InstanceDown("3.0"), [Poll("a")]), (3.0, TimerFired(), [Poll("b")])]
    assert recorder.script == [(1.0, InstanceDown("3.0"))]
