"""What holds whatever the network, the clocks and the processes do: never two leaders who can act."""

from itertools import chain, cycle, repeat

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lease_world import Clock, World

from headway.core.leadership import DRIFT

LEASE_S = 6.0

rates = st.floats(1.0 - DRIFT, 1.0 + DRIFT)
clocks = st.builds(Clock, rates, st.floats(-1e6, 1e6))
late_s = st.one_of(st.just(0.001), st.floats(0.0, LEASE_S / 4), st.floats(0.0, 30.0), st.none())
fates = st.lists(late_s, max_size=60)
#: (who, what, for how long and until the next step)
steps = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["dispatch"] * 4 + ["pause", "cut", "cut", "wait"]),
        st.floats(0.0, LEASE_S),
    ),
    max_size=40,
)


def world_of(replicas, store, fates, **more):
    """Once the fates are told, every message takes a millisecond."""
    return World(replicas, store, LEASE_S, chain(fates, repeat(0.001)), **more)


def play(world, script):
    for who, what, wait_s in script:
        replica = world.replicas[who % len(world.replicas)]
        if what == "pause":
            replica.paused_until_s = world.true_s + 2 * wait_s
        elif what == "cut":
            replica.cut_until_s = world.true_s + 2 * wait_s
        elif what == "dispatch":
            world.at(world.true_s, replica, replica.dispatch)
        world.run(world.true_s + wait_s)


@settings(max_examples=300, deadline=None)
@given(st.lists(clocks, min_size=2, max_size=3), clocks, fates, steps)
def test_no_two_replicas_lead_at_one_moment_and_no_engine_serves_an_older_one(replicas, store, fates, script):
    """`World.check` says so, after every single event."""
    play(world_of(replicas, store, fates), script)


@settings(max_examples=200, deadline=None)
@given(
    clocks,
    clocks,
    clocks,
    st.floats(0.0, LEASE_S / 4),
    st.floats(0.0, LEASE_S / 4),
    st.floats(0.0, LEASE_S / 3),
)
def test_a_leader_that_is_cut_off_has_stepped_down_when_the_next_one_leads(
    one, other, store, there_s, back_s, cut_s
):
    """The tightest case: slow answers, clocks that disagree, a follower that waits for the very moment."""
    world = world_of([one, other], store, [])
    world.replicas[0].fates = iter([there_s, back_s])
    world.replicas[1].fates = iter([LEASE_S / 4])  # asks first, and is late
    world.run(cut_s)
    world.replicas[0].cut_until_s = 1e9
    while world.true_s < 3 * LEASE_S:
        world.run(world.true_s + 0.05)
    assert "gw-1" in world.leaders()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(clocks, min_size=2, max_size=3), clocks, fates, steps, st.lists(st.integers(0, 39), max_size=3)
)
def test_a_store_that_loses_its_memory_cannot_make_an_engine_serve_an_older_one(
    replicas, store, fates, script, forgets
):
    """Two may believe that they lead for a while then; it is the engine that tells them apart."""
    world = world_of(replicas, store, fates, forgetful=True)
    for number, step in enumerate(script):
        if number in forgets:
            world.record.forget()
            world.record.token = 1000 * (number + 1)  # stores begin at a clock's time, which has gone on
        play(world, [step])


@settings(max_examples=150, deadline=None)
@given(st.lists(clocks, min_size=2, max_size=3), clocks, fates, steps)
def test_when_the_trouble_is_over_somebody_leads_and_is_served(replicas, store, fates, script):
    world = world_of(replicas, store, fates)
    play(world, script)
    over_s = max([world.true_s, *(max(r.paused_until_s, r.cut_until_s) for r in world.replicas)])
    world.run(over_s + 60.0 + 4 * LEASE_S)  # what was late by up to 30 s is there, claims and answers
    assert len(world.leaders()) == 1
    leader = next(r for r in world.replicas if r.name in world.leaders())
    before = len(world.accepted)
    leader.dispatch()
    world.run(world.true_s + 1.0)
    assert len(world.accepted) == before + 1


@settings(max_examples=100, deadline=None)
@given(clocks, clocks, clocks, st.floats(0.0, 20.0))
def test_a_leader_that_dies_is_followed_within_the_bound(one, other, store, dies_s):
    world = world_of([one, other], store, [])
    world.run(dies_s)
    assume(world.leaders())
    leader = next(r for r in world.replicas if r.name in world.leaders())
    follower = next(r for r in world.replicas if r is not leader)
    leader.paused_until_s = 1e9
    slowest = 1.0 - DRIFT
    world.run(dies_s + follower.lead.takeover_s / slowest + 0.1)
    assert follower.name in world.leaders()


def test_an_engine_refuses_who_slept_with_a_decision_in_hand():
    """gw-0 looks at its clock, stands still for 20 s, and sends what it had decided."""
    world = world_of([Clock(), Clock()], Clock(), cycle([0.001]))
    world.run(1.0)
    sleeper, successor = world.replicas
    token = sleeper.lead.token(sleeper.now())
    assert token == 1
    sleeper.paused_until_s = 21.0
    world.run(20.0)
    assert world.leaders() == ["gw-1"]
    successor.dispatch()
    world.run(21.0)
    world.send(sleeper, lambda: world.arrive(sleeper, token))  # the decision it had taken before it slept
    world.run(22.0)
    assert world.accepted == [(2, "gw-1")]
    assert world.refused == 1
    assert world.leaders() == ["gw-1"]
