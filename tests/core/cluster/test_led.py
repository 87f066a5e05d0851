"""A policy under a lease: it places from the moment it leads until the very end of what it was granted."""

from cluster_scripts import dispatches, host_of, rejects, snapshot

from headway.core.actions import Poll
from headway.core.events import InstanceDown, LeaseHeld, LeaseLost, PrefillDone
from headway.testing import arrived, pass_ended, up


def following(spec="least-tokens", *, wait_s=4.0, **more):
    return host_of(spec, led=True, wait_s=wait_s, **more)


def test_a_follower_holds_what_arrives_until_it_leads():
    host = following()
    host.run([(0.0, up("engine-0")), (1.0, arrived("r1", at=1.0))])
    assert dispatches(host) == []
    assert [(h.request_id, h.why) for h in host.policy.held()] == [
        ("r1", "this replica does not lead the pool")
    ]
    host.run([(2.0, LeaseHeld(5.0)), (2.1, snapshot("engine-0", 1))])
    assert dispatches(host) == [(2.1, "r1", "engine-0", 0)]


def test_the_first_batch_waits_until_every_engine_has_told_its_load():
    """What the leader before placed on engine-0 is in its report, and the request goes to engine-1."""
    host = following()
    host.run([(0.0, up("engine-0")), (0.0, up("engine-1")), (1.0, arrived("r1", at=1.0))])
    host.run([(2.0, LeaseHeld(5.0))])
    assert [action for _, action in host.actions] == [Poll("engine-0"), Poll("engine-1")]
    busy = pass_ended("engine-0", 1, ran=(100,), acknowledged=0, queued=(900,))
    host.run([(2.01, busy), (2.02, snapshot("engine-1", 1))])
    assert dispatches(host) == [(2.02, "r1", "engine-1", 0)]


def test_an_engine_that_does_not_answer_delays_the_first_batch_by_a_quarter_second():
    host = following()
    host.run([(0.0, up("engine-0")), (1.0, arrived("r1", at=1.0)), (2.0, LeaseHeld(5.0))], until=3.0)
    assert dispatches(host) == [(2.25, "r1", "engine-0", 0)]


def test_nor_does_one_that_is_gone_by_then():
    host = following()
    host.run([(0.0, up("engine-0")), (0.0, up("engine-1")), (1.0, arrived("r1", at=1.0))])
    host.run([(2.0, LeaseHeld(5.0)), (2.1, snapshot("engine-0", 1)), (2.2, InstanceDown("engine-1"))])
    assert dispatches(host) == [(2.2, "r1", "engine-0", 0)]


def leading(until_s, spec="least-tokens", **more):
    host = following(spec, **more)
    host.run([(0.0, LeaseHeld(until_s)), (0.0, up("engine-0"))])
    return host


def test_the_lease_ends_at_its_moment_whether_a_timer_fires_or_not():
    """On a host that is late by 9 s an event at the end of the lease finds that it has ended."""
    host = leading(3.0, lateness_s=9.0)
    host.run([(2.999, arrived("r1", at=2.999)), (3.0, arrived("r2", at=3.0))])
    assert dispatches(host) == [(2.999, "r1", "engine-0", 0)]


def test_renewed_in_time_it_goes_on():
    host = leading(3.0)
    host.run([(1.0, LeaseHeld(4.0)), (3.5, arrived("r1", at=3.5))])
    assert dispatches(host) == [(3.5, "r1", "engine-0", 0)]


def test_granted_too_late_to_be_believed_it_changes_nothing():
    host = following()
    host.run([(0.0, up("engine-0")), (5.0, LeaseHeld(4.9)), (5.0, arrived("r1", at=5.0))], until=6.0)
    assert dispatches(host) == []


def test_lost_is_lost_at_once():
    host = leading(9.0)
    host.run([(1.0, LeaseLost()), (1.0, arrived("r1", at=1.0))], until=2.0)
    assert dispatches(host) == []


def test_a_request_waits_for_a_leader_as_long_as_it_may():
    host = following(wait_s=4.0)
    host.run([(0.0, up("engine-0")), (1.0, arrived("r1", at=1.0)), (2.0, arrived("r2", at=2.0))], until=9.0)
    assert rejects(host) == [(5.0, "r1", "not-leader"), (6.0, "r2", "not-leader")]


def test_without_patience_it_is_refused_at_the_door():
    host = following(wait_s=0.0)
    host.run([(1.0, arrived("r1", at=1.0))])
    assert rejects(host) == [(1.0, "r1", "not-leader")]


def test_what_was_held_when_the_lease_was_lost_waits_from_then_on():
    host = leading(3.0, "staggered", wait_s=4.0)
    host.run(
        [
            (0.0, arrived("r1", prompt=1000)),
            (0.1, arrived("r2", at=0.1, prompt=1000)),
            (0.2, arrived("r3", at=0.2, prompt=1000)),
        ],
        until=8.0,
    )
    held = {"r2", "r3"} - {request_id for _, request_id, *_ in dispatches(host)}
    assert held
    assert {(at, request_id) for at, request_id, why in rejects(host) if why == "not-leader"} == {
        (7.0, request_id) for request_id in held
    }


def test_a_prefill_that_ends_without_the_lease_gets_its_decode_with_the_next():
    host = following(disaggregated=True)
    host.run([(0.0, LeaseHeld(3.0)), (0.0, up("prefill-0")), (0.0, up("decode-0", kv_blocks=100))])
    host.run([(1.0, arrived("r1", at=1.0)), (3.5, PrefillDone("r1"))])
    assert dispatches(host) == [(1.0, "r1", "prefill-0", 0)]
    host.run([(4.0, LeaseHeld(7.0))], until=4.3)
    assert dispatches(host)[1:] == [(4.25, "r1", "decode-0", 0)]


def test_reports_count_while_it_follows():
    """It heard that engine-0 is full before it led, and needs no second report to know."""
    host = following()
    host.run([(0.0, up("engine-0")), (0.0, up("engine-1"))])
    host.run([(0.5, pass_ended("engine-0", 1, ran=(100,), acknowledged=0, queued=(900,)))])
    host.run([(1.0, LeaseHeld(5.0)), (1.3, arrived("r1", at=1.3))])
    assert dispatches(host) == [(1.3, "r1", "engine-1", 0)]
