"""What holds for every cluster policy, whatever happens: random scripts under the contract check.

The script is random, the world it happens in is not: only what is placed finishes, a dead instance loses what
it had. Reports may be lost, late, repeated or overtaken, and tell of any load.
"""

import pytest
from cluster_scripts import host_of
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.actions import Dispatch, Reject
from headway.core.cluster import cluster_policies
from headway.core.events import (
    Cancelled,
    ConcurrencyLimited,
    Failed,
    Finished,
    InstanceDown,
    InstanceDraining,
    LeaseHeld,
    LeaseLost,
    PassEnded,
    PassStarted,
    PrefillDone,
    Role,
    Snapshot,
)
from headway.core.request import Slo
from headway.testing import arrived, up

RANKS = 2
AGGREGATED = ("engine-0", "engine-1")
TWO_POOLS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def specs(role):
    names = [name for name in cluster_policies.names() if role in cluster_policies.find(name)[0].roles]
    hasty = "saturation_passes=0.5:watchdog_floor_s=0.4:watchdog_factor=1:spacing=1.0:max_hold_s=5"
    turned = [f"{name}:{hasty}" for name in names if name in ("staggered", "triage")]
    return names + turned


ONE_POOL = [(spec, AGGREGATED) for spec in specs(Role.AGGREGATED)]
PAIRS = [(spec, TWO_POOLS) for spec in specs(Role.PREFILL)]
every_policy = pytest.mark.parametrize(("spec", "instances"), ONE_POOL + PAIRS)


class World:
    """Turns steps into events that make sense where things stand."""

    def __init__(self, spec, instances, *, lateness_s=0.0, led=False):
        self.host = host_of(
            spec, disaggregated=instances is TWO_POOLS, seed=7, lateness_s=lateness_s, led=led
        )
        self.now = 0.0
        self.epochs = dict.fromkeys(instances, 0)
        self.alive = set()
        self.sequence = 0
        self.arrivals = 0
        self.overtaken = []

    def tell(self, event):
        self.host.feed(event, self.now)
        self.agree()

    def agree(self):
        """What the policy says it holds is what it was given and has not placed, refused or lost."""
        assert {h.request_id for h in self.host.policy.held()} == self.host.check.held

    def step(self, kind, which, number, wait_s):
        self.now += wait_s
        self.host.wait(self.now, inclusive=False)
        self.agree()
        getattr(self, kind)(which, number)

    def _instance(self, which):
        return sorted(self.epochs)[which % len(self.epochs)]

    def _placed(self, which):
        placed = sorted(self.host.dispatched)
        return placed[which % len(placed)] if placed else None

    def arrive(self, which, number):
        self.arrivals += 1
        slo = Slo(ttft_s=(0.1, 2.0)[which % 2])
        self.tell(arrived(f"r{self.arrivals}", at=self.now, prompt=1 + number, slo=slo))

    def bring_up(self, which, number):
        name = self._instance(which)
        if name not in self.alive:
            self.alive.add(name)
            self.tell(
                up(name, ranks=RANKS, chunk=1000, kv_blocks=150, max_running=4, epoch=self.epochs[name])
            )

    def take_down(self, which, number):
        name = self._instance(which)
        if name in self.alive:
            self.alive.remove(name)
            self.epochs[name] += 1
            self.tell(InstanceDown(name))
            for request_id, (place, _) in sorted(self.host.dispatched.items()):
                if place == name:
                    self.tell(Failed(request_id, "instance-down", retry=number % 3 > 0))

    def restart(self, which, number):
        """It comes back before anybody said that it was gone."""
        name = self._instance(which)
        if name in self.alive:
            lost = [r for r, (place, _) in sorted(self.host.dispatched.items()) if place == name]
            self.epochs[name] += 1
            self.alive.remove(name)
            self.bring_up(which, number)
            for request_id in lost:
                if self.host.dispatched.get(request_id, ("",))[0] == name:
                    self.tell(Failed(request_id, "restarted", retry=True))

    def drain(self, which, number):
        if self._instance(which) in self.alive:
            self.tell(InstanceDraining(self._instance(which)))

    def limit(self, which, number):
        if self._instance(which) in self.alive:
            self.tell(ConcurrencyLimited(self._instance(which), (None, 0, 1, 2, 5)[number % 5]))

    def report(self, which, number):
        self._report(PassEnded, which, number, 0.2, (number % 1000, 0))

    def snapshot(self, which, number):
        self._report(Snapshot, which, number, number % 2 == 0)

    def _report(self, kind, which, number, *what):
        """Every third report is lost, or comes again behind a later one."""
        name = self._instance(which)
        self.sequence += 1
        known = self.host.check.numbers.get(name, 0)
        values = None if number % 5 == 0 else (number % 2000, 0)
        seen = max(0, known - which // 4)
        event = kind(
            name, self.epochs[name], self.sequence, seen, *what, values, values, values, values, values
        )
        self.overtaken.append(event)
        if number % 3:
            self.tell(event)

    def overtake(self, which, number):
        if self.overtaken:
            self.tell(self.overtaken[number % len(self.overtaken)])

    def start_pass(self, which, number):
        name = self._instance(which)
        self.tell(PassStarted(name, self.epochs[name], max(0, self.sequence - number % 3)))

    def prefill_done(self, which, number):
        request_id = self._placed(which)
        if request_id and request_id not in self.host.check.prefilled:
            self.tell(PrefillDone(request_id))

    def finish(self, which, number):
        request_id = self._placed(which)
        if request_id:
            self.tell(Finished(request_id, 1 + number))

    def fail(self, which, number):
        request_id = self._placed(which)
        if request_id:
            self.tell(Failed(request_id, "lost", retry=number % 2 == 0))

    def cancel(self, which, number):
        if self.arrivals:
            self.tell(Cancelled(f"r{1 + number % self.arrivals}"))

    def hold_lease(self, which, number):
        self.tell(LeaseHeld(self.now + (0.1, 0.5, 3.0)[which % 3]))

    def lose_lease(self, which, number):
        self.tell(LeaseLost())

    def fate(self):
        """Each request that was dispatched or refused at least once."""
        return {a.request_id for _, a in self.host.actions if isinstance(a, Dispatch | Reject)}


KINDS = ["arrive", "report", "snapshot", "overtake", "start_pass", "prefill_done", "finish", "fail", "cancel"]
OFTEN = ["arrive"] * 5 + ["report"] * 3 + ["prefill_done"] * 3 + ["finish"] * 2
RARE = ["bring_up", "take_down", "restart", "drain", "limit"]
steps = st.lists(
    st.tuples(
        st.sampled_from(OFTEN + KINDS + RARE),
        st.integers(0, 11),
        st.integers(0, 2600),
        st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.3, 2.0]),
    ),
    max_size=60,
)
led_steps = st.lists(
    st.tuples(
        st.sampled_from(OFTEN + KINDS + RARE + ["hold_lease"] * 6 + ["lose_lease"] * 2),
        st.integers(0, 11),
        st.integers(0, 2600),
        st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.3, 2.0]),
    ),
    max_size=60,
)
lateness = st.sampled_from([0.0, 0.0, 0.01, 1.0, 60.0])


def run(spec, instances, script, lateness_s, *, led=False):
    world = World(spec, instances, lateness_s=lateness_s, led=led)
    for which in range(len(instances)):
        world.bring_up(which, 0)
    for step in script:
        world.step(*step)
    return world


@every_policy
@settings(max_examples=20, deadline=None)
@given(steps, lateness)
def test_the_contract_is_kept_and_nothing_is_lost(spec, instances, script, lateness_s):
    """After every event, what is held is what arrived and has no other fate. And every hold ends."""
    world = run(spec, instances, script, lateness_s)
    world.host.wait(world.now + 1000.0)
    world.agree()
    assert world.host.policy.held() == []
    cancelled = {f"r{n}" for n in range(1, world.arrivals + 1)} - world.fate()
    assert len(cancelled) <= sum(1 for kind, *_ in script if kind == "cancel")


@every_policy
@settings(max_examples=20, deadline=None)
@given(led_steps, lateness)
def test_under_a_lease_nothing_is_placed_without_it_and_nothing_is_lost(spec, instances, script, lateness_s):
    """The contract's rule 7 after every event; and what waits for a leader in vain is refused."""
    world = run(spec, instances, script, lateness_s, led=True)
    world.host.wait(world.now + 1000.0)
    world.agree()
    assert world.host.policy.held() == []


@every_policy
@settings(max_examples=5, deadline=None)
@given(steps, lateness)
def test_the_same_script_and_seed_give_the_same_log(spec, instances, script, lateness_s):
    first, again = (run(spec, instances, script, lateness_s) for _ in range(2))
    assert first.host.log.text() == again.host.log.text()


@every_policy
@settings(max_examples=10, deadline=None)
@given(steps)
def test_a_timer_is_asked_for_only_when_it_is_due(spec, instances, script):
    """Being woken for nothing changes nothing: `wake_at` never falls behind what was handled."""
    world = run(spec, instances, script, 0.0)
    world.host.wait(world.now)
    wake_s = world.host.policy.wake_at()
    assert wake_s is None or wake_s > world.now


@pytest.mark.parametrize(("spec", "instances"), [pair for pair in ONE_POOL + PAIRS if ":" not in pair[0]])
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 2300), min_size=1, max_size=30))
def test_in_a_calm_world_every_request_is_dispatched_once_and_none_refused(spec, instances, prompts):
    """All instances up, every pass reported: whatever comes is placed, and placed once in each pool."""
    world = run(spec, instances, [], 0.0)
    for prompt in prompts:
        world.step("arrive", 1, prompt - 1, 0.05)
    for _ in range(4 * len(prompts)):
        world.now += 0.1
        for request_id in sorted(world.host.dispatched):
            if request_id not in world.host.check.prefilled:
                world.tell(PrefillDone(request_id))
        for name in instances:
            world.sequence += 1
            acknowledged = world.host.check.numbers[name]
            nothing = (0,) * RANKS
            world.tell(
                PassEnded(
                    name, 0, world.sequence, acknowledged, 0.1, (1, 1), nothing, pab_tokens=(10**6,) * RANKS
                )
            )
        world.host.wait(world.now)
    sent = [a.request_id for _, a in world.host.actions if isinstance(a, Dispatch)]
    pools = 2 if instances is TWO_POOLS else 1
    assert sorted(sent) == sorted([f"r{n}" for n in range(1, len(prompts) + 1)] * pools)
    assert not any(isinstance(a, Reject) for _, a in world.host.actions)
