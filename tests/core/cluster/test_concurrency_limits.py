"""An instance at its concurrency limit gets nothing new; what is held goes there when a place is free."""

import random

import pytest

from headway.core.actions import Dispatch, Reject
from headway.core.cluster import create_cluster
from headway.core.events import ConcurrencyLimited, Failed, Finished, InstanceDown, PrefillDone
from headway.testing import ScriptedHost, arrived, up

AGGREGATED = ["least-requests", "least-tokens", "power-of-two", "random", "round-robin", "vllm-dp", "pab"]
AGGREGATED += ["staggered", "triage", "iqr-lexicographic"]


def host(policy, *, disaggregated=False):
    return ScriptedHost(create_cluster(policy, disaggregated=disaggregated, rng=random.Random(1)))


def at(scripted, instance):
    return sorted(name for name, (where, _) in scripted.dispatched.items() if where == instance)


@pytest.mark.parametrize("policy", AGGREGATED)
def test_no_more_requests_than_the_limit_are_at_an_instance(policy):
    scripted = host(policy)
    scripted.run([(0.0, up("e", ranks=2, chunk=100_000)), (0.0, ConcurrencyLimited("e", 4))])
    scripted.run([(1.0, arrived(f"r{n}", at=1.0)) for n in range(9)], until=1.5)
    assert len(at(scripted, "e")) == 4
    scripted.run([(2.0, Finished(at(scripted, "e")[0], 5))], until=2.5)
    assert len(at(scripted, "e")) == 4
    assert {held.why for held in scripted.policy.held()} == {"every engine is at its concurrency limit"}
    scripted.run([(3.0, ConcurrencyLimited("e", None))], until=4.0)
    assert not scripted.policy.held()


@pytest.mark.parametrize("policy", AGGREGATED)
def test_what_one_instance_refused_goes_to_another_that_has_room(policy):
    scripted = host(policy)
    scripted.run([(0.0, up("a")), (0.0, arrived("r", prompt=10))], until=0.1)
    scripted.run([(1.0, ConcurrencyLimited("a", 0)), (1.0, Failed("r", "queue full", retry=True))], until=1.5)
    assert not scripted.dispatched
    scripted.run([(2.0, up("b"))], until=2.5)
    assert scripted.dispatched == {"r": ("b", 0)}


@pytest.mark.parametrize("policy", AGGREGATED)
def test_a_limit_ends_with_the_instance_and_a_hold_at_the_limit_is_bounded(policy):
    scripted = host(f"{policy}:max_hold_s=10")
    scripted.run([(0.0, up("e")), (0.0, ConcurrencyLimited("e", 0)), (1.0, arrived("r", at=1.0))], until=20.0)
    assert [type(action) for _, action in scripted.actions] == [Reject]
    scripted.run(
        [(21.0, InstanceDown("e")), (22.0, up("e", epoch=1)), (22.0, arrived("s", at=22.0))], until=23.0
    )
    assert scripted.dispatched == {"s": ("e", 0)}


def test_the_limits_of_prefill_and_decode_engines_are_apart():
    scripted = host("least-requests+least-requests", disaggregated=True)
    scripted.run([(0.0, up("prefill-0")), (0.0, up("decode-0")), (0.0, ConcurrencyLimited("prefill-0", 1))])
    scripted.run([(1.0, arrived("a", at=1.0)), (1.0, arrived("b", at=1.0))])
    assert scripted.dispatched == {"a": ("prefill-0", 0)}
    scripted.run([(1.5, ConcurrencyLimited("decode-0", 1)), (2.0, PrefillDone("a")), (3.0, PrefillDone("b"))])
    assert scripted.dispatched == {"a": ("decode-0", 0)}
    scripted.run([(4.0, Finished("a", 3))])
    assert scripted.dispatched == {"b": ("decode-0", 0)}


def test_requests_of_another_model_do_not_wait_behind_an_instance_at_its_limit():
    scripted = host("least-requests")
    scripted.run(
        [
            (0.0, up("a", models=["base"], adapters=["x"])),
            (0.0, up("b", models=["base"], adapters=["y"])),
            (0.0, ConcurrencyLimited("a", 0)),
            (1.0, arrived("to-x", model="x")),
            (1.0, arrived("to-y", model="y")),
            (2.0, ConcurrencyLimited("b", 1)),
            (3.0, arrived("second-y", model="y")),
        ]
    )
    assert scripted.dispatched == {"to-y": ("b", 0)}
    scripted.run([(4.0, ConcurrencyLimited("a", 1)), (5.0, Finished("to-y", 1))])
    assert scripted.dispatched == {"to-x": ("a", 0), "second-y": ("b", 0)}
    assert all(isinstance(action, Dispatch) for _, action in scripted.actions)
