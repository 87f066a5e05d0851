"""The gateway's driver on a virtual clock: parity with the scripted host, timers, and what waiters hear."""

import heapq
import random
from itertools import count

import pytest

from headway.core.actions import Dispatch, Poll, Recall, Reject
from headway.core.cluster import cluster_policies, create_cluster
from headway.core.cluster.contract import ClusterPolicy
from headway.core.decision_log import DecisionLog
from headway.core.errors import InvariantError
from headway.core.events import (
    Arrived,
    Cancelled,
    Failed,
    Finished,
    InstanceDown,
    PrefillDone,
    Role,
    TimerFired,
)
from headway.front.driver import IDLE_WAKE_DELAY_S, MAX_IDLE_WAKES, Driver
from headway.testing import ScriptedHost, arrived, pass_ended, request, up

SEED = 7


class VirtualClock:
    """A loop's `time` and `call_at`, in virtual time. Timers come after the events of the same instant."""

    def __init__(self):
        self.now = 0.0
        self._timers = []
        self._numbers = count()

    def time(self):
        return self.now

    def call_at(self, when, callback, *args):
        timer = Timer()
        heapq.heappush(self._timers, (when, next(self._numbers), timer, callback, args))
        return timer

    def advance(self, until, *, inclusive=False):
        while self._timers and (self._timers[0][0] < until or (inclusive and self._timers[0][0] == until)):
            when, _, timer, callback, args = heapq.heappop(self._timers)
            if not timer.cancelled:
                self.now = max(self.now, when)
                callback(*args)
        self.now = until


class Timer:
    cancelled = False

    def cancel(self):
        self.cancelled = True


class Waits:
    """A waiter that notes what it hears."""

    def __init__(self):
        self.heard = []

    def dispatched(self, action):
        self.heard.append(action)

    rejected = recalled = dispatched


def drive(policy, observers=(), poll=lambda instance: None):
    clock = VirtualClock()
    return clock, Driver(policy, clock=clock.time, call_at=clock.call_at, poll=poll, observers=observers)


def through_the_gateways_driver(policy, script):
    log = DecisionLog()
    clock, driver = drive(policy, [log])
    for at_s, event in script:
        clock.advance(at_s)
        if isinstance(event, Arrived):
            driver.arrive(event.request, Waits())
        else:
            driver.feed(event)
            if isinstance(event, Finished | Cancelled):
                driver.leave(event.request_id)
    clock.advance(script[-1][0], inclusive=True)
    return log.text()


TWO_POOLS = [
    (0.0, up("prefill-0", ranks=2, chunk=1000)),
    (0.0, up("prefill-1", ranks=2, chunk=1000)),
    (0.0, up("decode-0", ranks=4, chunk=64, kv_blocks=500)),
    (0.10, arrived("a", at=0.10, prompt=900)),
    (0.10, arrived("b", at=0.10, prompt=2500)),
    (0.11, arrived("c", at=0.11, prompt=100)),
    (0.11, arrived("too long", at=0.11, prompt=9000)),
    (0.40, PrefillDone("a")),
    (0.40, pass_ended("prefill-0", 1, ran=(900, 1000), acknowledged=2, queued=(0, 1500), duration=0.3)),
    (0.45, arrived("d", at=0.45, prompt=700)),
    (0.70, InstanceDown("prefill-0")),
    (0.70, Failed("b", "instance-failed", True)),
    (0.80, Finished("a", 8)),
    (9.00, up("prefill-0", ranks=2, chunk=1000, epoch=1)),
    (9.50, arrived("e", at=9.5, prompt=30)),
    (9.60, Cancelled("d")),
]
ONE_POOL = [
    (0.0, up("engine-0", chunk=512)),
    (0.0, up("engine-1", chunk=512)),
    (1.0, arrived("a", at=1.0, prompt=300)),
    (1.0, arrived("b", at=1.0, prompt=700)),
    (1.2, arrived("c", at=1.2, prompt=50)),
    (1.3, PrefillDone("a")),
    (
        1.3,
        pass_ended("engine-0", 1, ran=(300,), acknowledged=1, running=(1,), waiting=(0,), pab_tokens=(40,)),
    ),
    (1.4, arrived("d", at=1.4, prompt=500)),
    (1.5, Finished("a", 3)),
    (2.5, pass_ended("engine-1", 1, ran=(512,), acknowledged=1, queued=(188,), pab_tokens=(0,))),
    (9.0, arrived("e", at=9.0, prompt=10)),
]


def specs(role):
    return [name for name in cluster_policies.names() if role in cluster_policies.find(name)[0].roles]


CASES = [
    *[(f"{policy}+least-requests", TWO_POOLS) for policy in specs(Role.PREFILL)],
    *[(f"round-robin+{policy}", TWO_POOLS) for policy in specs(Role.DECODE)],
    *[(policy, ONE_POOL) for policy in specs(Role.AGGREGATED)],
]


@pytest.mark.parametrize(("policy", "script"), CASES)
def test_a_script_gives_one_decision_log_in_the_scripted_host_and_here(policy, script):
    two = script is TWO_POOLS
    here, scripted = (create_cluster(policy, disaggregated=two, rng=random.Random(SEED)) for _ in range(2))
    host = ScriptedHost(scripted)
    host.run(script)
    assert host.log.lines and through_the_gateways_driver(here, script) == host.log.text()


class Puppet(ClusterPolicy):
    """Answers events with the actions it was given, and wants to be woken when it was told."""

    def __init__(self, *answers, wake_s=None):
        self.answers = list(answers)
        self.wake_s = wake_s
        self.woken = 0

    def handle(self, event, now):
        self.woken += isinstance(event, TimerFired)
        return self.answers.pop(0) if self.answers else []

    def wake_at(self):
        return self.wake_s

    def held(self):
        return []


def test_a_waiter_hears_what_becomes_of_its_request_in_order():
    actions = [Recall("a", "x"), Dispatch("a", "y", 0, 1), Poll("z"), Reject("a", "full", 1.0)]
    polled, waiter = [], Waits()
    _, driver = drive(Puppet(actions), poll=polled.append)
    driver.arrive(request("a"), waiter)
    assert waiter.heard == [actions[0], actions[1], actions[3]] and polled == ["z"]
    driver.leave("a")
    assert driver.requests == 0


def test_an_action_for_nobody_is_a_bug_told_after_the_others_are_carried_out():
    waiter = Waits()
    _, driver = drive(Puppet([Dispatch("ghost", "x", 0, 1), Dispatch("a", "x", 0, 2)]))
    with pytest.raises(InvariantError, match="ghost"):
        driver.arrive(request("a"), waiter)
    assert waiter.heard == [Dispatch("a", "x", 0, 2)]


def test_a_request_cannot_arrive_twice():
    _, driver = drive(Puppet())
    driver.arrive(request("a"), Waits())
    with pytest.raises(InvariantError, match="arrived twice"):
        driver.arrive(request("a"), Waits())


def test_a_policy_that_wakes_for_nothing_is_slowed_down_and_the_door_stays_open():
    policy = Puppet(wake_s=0.0)
    clock, driver = drive(policy)
    driver.feed(InstanceDown("x"))
    clock.advance(1.0)
    assert MAX_IDLE_WAKES < policy.woken <= MAX_IDLE_WAKES + 2 + 1.0 / IDLE_WAKE_DELAY_S
