"""The public test host: scripts read like specifications, and a policy that breaks the contract is caught."""

import random

import pytest

import headway.core.cluster  # noqa: F401  registers the policies
from headway.core.actions import Dispatch, Poll, Recall, Reject
from headway.core.cluster.compose import create_cluster
from headway.core.cluster.contract import ClusterPolicy
from headway.core.errors import InvariantError
from headway.core.events import (
    Cancelled,
    Failed,
    Finished,
    InstanceDown,
    InstanceDraining,
    PrefillDone,
    TimerFired,
)
from headway.testing import ScriptedHost, arrived, pass_ended, up


class Parrot(ClusterPolicy):
    """Answers the n-th event with the n-th list of actions."""

    def __init__(self, *answers, wake_s=None):
        self.answers = list(answers)
        self.wake_s = wake_s
        self.woken = []

    def handle(self, event, now):
        if isinstance(event, TimerFired):
            self.woken.append(now)
            self.wake_s = None
            return []
        return self.answers.pop(0) if self.answers else []

    def wake_at(self):
        return self.wake_s

    def held(self):
        return []


SEND = Dispatch("r1", "engine-0", 0, 1)
ONCE_MORE = Dispatch("r1", "engine-0", 0, 2)
LOST = Failed("r1", "lost", True)
TO_PREFILL, TO_DECODE = Dispatch("r1", "prefill-0", 0, 1), Dispatch("r1", "decode-0", 0, 1)


def test_a_real_policy_under_a_script():
    host = ScriptedHost(create_cluster("least-tokens", disaggregated=False, rng=random.Random(0)))
    host.run(
        [
            (0.0, up("engine-0", ranks=2, chunk=512)),
            (1.0, arrived("r1", at=1.0, prompt=300)),
            (1.1, arrived("r2", at=1.1, prompt=100)),
            (1.5, pass_ended("engine-0", 1, ran=(300, 100), acknowledged=2)),
            (1.5, Finished("r1", 1)),
        ]
    )
    assert host.dispatched == {"r2": ("engine-0", 1)}
    assert [at for at, _ in host.actions] == [1.0, 1.1]
    assert len(host.log.lines) == 2


def test_timers_fire_between_events_and_after_those_of_their_instant():
    policy = Parrot(wake_s=1.0)
    host = ScriptedHost(policy)
    host.run([(0.0, up("engine-0")), (2.0, up("engine-1"))])
    assert policy.woken == [1.0]
    policy.wake_s = 3.0
    host.run([(3.0, up("engine-2"))])
    assert policy.woken == [1.0, 3.0] and host.now == 3.0


def test_a_late_host_lets_other_events_come_first():
    policy = Parrot(wake_s=1.0)
    seen = []
    policy.handle = lambda event, now, handle=policy.handle: (
        seen.append((now, type(event).__name__)),
        handle(event, now),
    )[1]
    ScriptedHost(policy, lateness_s=0.25).run([(0.0, up("a")), (1.2, up("b"))], until=2.0)
    assert seen == [(0.0, "InstanceUp"), (1.2, "InstanceUp"), (1.25, "TimerFired")]


def test_time_goes_forward_only():
    with pytest.raises(InvariantError, match=r"goes back from 2\.0 s to 1\.0 s"):
        ScriptedHost(Parrot()).run([(2.0, up("a")), (1.0, up("b"))])


def test_waking_for_nothing_for_ever_is_caught():
    policy = Parrot()
    policy.wake_at = lambda: 1.0
    with pytest.raises(InvariantError, match=r"woken at 1\.0 s again and again"):
        ScriptedHost(policy).run([(1.0, up("a"))])


@pytest.mark.parametrize(
    ("script", "answers"),
    [
        ([up("engine-0"), arrived("r1"), LOST], [[], [SEND], [ONCE_MORE]]),
        (
            [up("engine-0"), arrived("r1"), up("engine-1")],
            [[], [SEND], [Recall("r1", "engine-0"), Reject("r1", "no")]],
        ),
        (
            [up("engine-0"), arrived("r1"), InstanceDown("engine-0"), LOST, up("engine-0", epoch=1)],
            [[], [SEND], [], [], [SEND]],
        ),
        (
            [up("prefill-0"), up("decode-0"), arrived("r1"), PrefillDone("r1")],
            [[], [], [TO_PREFILL], [TO_DECODE]],
        ),
    ],
)  # fmt: skip
def test_what_the_contract_allows(script, answers):
    ScriptedHost(Parrot(*answers)).run([(0.0, event) for event in script])


@pytest.mark.parametrize(
    ("script", "answers", "breach"),
    [
        ([up("engine-0"), arrived("r1")], [[], [SEND, Dispatch("r1", "engine-0", 0, 2)]], "placed already"),
        ([up("engine-0"), arrived("r2")], [[], [SEND]], "not in the policy's hands"),
        ([up("engine-0"), arrived("r1"), Cancelled("r1")], [[], [], [SEND]], "not in the policy's hands"),
        ([up("engine-0"), arrived("r1")], [[], [Dispatch("r1", "engine-0", 1, 1)]], "1 ranks"),
        ([up("engine-0"), arrived("r1")], [[], [Dispatch("r1", "engine-0", 0, 2)]], "after 0 is due"),
        ([up("engine-1"), arrived("r1")], [[], [SEND]], "takes no work"),
        ([up("engine-0"), InstanceDraining("engine-0"), arrived("r1")], [[], [], [SEND]], "takes no work"),
        ([up("engine-0"), InstanceDown("engine-0"), arrived("r1")], [[], [], [SEND]], "takes no work"),
        ([up("decode-0"), arrived("r1")], [[], [TO_DECODE]], "wrong role"),
        ([up("engine-0"), arrived("r1")], [[], [SEND, Reject("r1", "no")]], "not in the policy's hands"),
        ([up("engine-0"), arrived("r1")], [[], [Recall("r1", "engine-0")]], "is at None"),
        (
            [up("engine-0"), arrived("r1"), PrefillDone("r1")],
            [[], [SEND], [Recall("r1", "engine-0")]],
            "first token is with the client",
        ),
        (
            [up("engine-0"), arrived("r1"), Failed("r1", "lost", False)],
            [[], [SEND], [Dispatch("r1", "engine-0", 0, 2)]],
            "not in the policy's hands",
        ),
        ([arrived("r1")], [[Poll("engine-0")]], "not up"),
    ],
)
def test_what_the_contract_forbids(script, answers, breach):
    with pytest.raises(InvariantError, match=breach):
        ScriptedHost(Parrot(*answers)).run([(0.0, event) for event in script])
