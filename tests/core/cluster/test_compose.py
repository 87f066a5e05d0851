"""From a spec to a policy: partners, roles, errors; and a request's way through two pools."""

import random
import sys
import types

import pytest
from cluster_scripts import dispatches, host_of, order, rejects

from headway.core.cluster import Immediate, create_cluster
from headway.core.cluster.baselines import LeastTokens, RoundRobin
from headway.core.cluster.compose import Disaggregated, check_cluster
from headway.core.cluster.decode_placement import IqrLexicographic
from headway.core.cluster.pab import Pab
from headway.core.cluster.staggered import Staggered
from headway.core.cluster.triage import Triage
from headway.core.errors import ConfigError
from headway.core.events import Cancelled, Failed, Finished, InstanceDown, InstanceDraining, PrefillDone
from headway.testing import arrived, pass_ended, up


def create(spec, *, disaggregated=False):
    return create_cluster(spec, disaggregated=disaggregated, rng=random.Random(0))


# Specs.


@pytest.mark.parametrize(
    ("spec", "prefill", "decode"),
    [
        ("staggered", Staggered, IqrLexicographic),
        ("triage", Triage, IqrLexicographic),
        ("round-robin", RoundRobin, RoundRobin),
        ("least-tokens+iqr-lexicographic", LeastTokens, IqrLexicographic),
        (" staggered + least-tokens ", Staggered, LeastTokens),
    ],
)
def test_two_pools_and_the_natural_partner(spec, prefill, decode):
    policy = create(spec, disaggregated=True)
    assert isinstance(policy, Disaggregated)
    assert (type(policy.prefill), type(policy.decode)) == (prefill, decode)


@pytest.mark.parametrize(
    ("spec", "cls"), [("staggered", Staggered), ("pab", Pab), ("least-tokens", LeastTokens)]
)
def test_one_pool(spec, cls):
    assert type(create(spec)) is cls


def test_settings_reach_their_policy():
    policy = create("staggered:spacing=0.5+iqr-lexicographic:fence=3", disaggregated=True)
    assert policy.prefill.settings.spacing == 0.5
    assert policy.decode.settings.fence == 3.0


def test_a_baseline_decodes_with_its_own_settings():
    policy = create("round-robin:max_hold_s=7", disaggregated=True)
    assert policy.decode.settings.max_hold_s == 7.0


@pytest.mark.parametrize(
    ("spec", "disaggregated", "message"),
    [
        ("stagered", False, "unknown policy 'stagered': did you mean 'staggered'?"),
        (
            "staggered+iqr-lexicografic",
            True,
            "unknown policy 'iqr-lexicografic': did you mean 'iqr-lexicographic'?",
        ),
        (
            "staggered:spaceing=1",
            False,
            "policy staggered: unknown setting 'spaceing': did you mean 'spacing'?",
        ),
        ("staggered:spacing=2", False, "policy staggered: spacing must be at most 1, got 2.0"),
        ("staggered+iqr-lexicographic", False, "policy 'staggered+iqr-lexicographic' names two policies"),
        ("a+b+c", True, "policy 'a+b+c' must be prefill or prefill+decode"),
        (
            "iqr-lexicographic",
            True,
            "policy 'iqr-lexicographic' cannot place prefill work, it is for: aggregated, decode",
        ),
        (
            "random+staggered",
            True,
            "policy 'staggered' cannot place decode work, it is for: aggregated, prefill",
        ),
        ("pab", True, "policy 'pab' cannot place prefill work, it is for: aggregated"),
        ("", False, "'' names no policy"),
        ("staggered+", True, "'' names no policy"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(spec, disaggregated, message):
    for build in (create, check_cluster):
        with pytest.raises(ConfigError) as caught:
            build(spec, disaggregated=disaggregated)
        assert str(caught.value).startswith(message)


class Longest(Immediate):
    """A policy of one's own: always the last rank."""

    def _choose(self, request, ranks):
        return ranks[-1]


def test_a_policy_of_ones_own_needs_no_registration(monkeypatch):
    module = types.ModuleType("their_cluster_policies")
    module.Longest = Longest
    monkeypatch.setitem(sys.modules, module.__name__, module)
    host = host_of("their_cluster_policies:Longest:max_hold_s=5")
    host.run([(0.0, up("engine-0", ranks=3)), (1.0, arrived("r1", at=1.0))])
    assert host.dispatched == {"r1": ("engine-0", 2)}
    both = create("their_cluster_policies:Longest+their_cluster_policies:Longest", disaggregated=True)
    assert type(both.decode) is Longest


# A request's way.

POOLS = [(0.0, up("prefill-0", chunk=1000)), (0.0, up("decode-0", ranks=2, kv_blocks=100, block_tokens=16))]


def two_pools(spec="least-requests", pools=POOLS):
    host = host_of(spec, disaggregated=True)
    host.run(pools)
    return host


def test_prefill_first_then_decode_placed_late():
    host = two_pools()
    host.run([(1.0, arrived("r1", at=1.0)), (1.5, PrefillDone("r1")), (3.0, Finished("r1", 20))])
    assert dispatches(host) == [(1.0, "r1", "prefill-0", 0), (1.5, "r1", "decode-0", 0)]
    assert host.policy.held() == []
    assert host.policy.decode.ledger.placements == host.policy.prefill.ledger.placements == {}


@pytest.mark.parametrize("end", [Finished("r1", 20), Cancelled("r1"), Failed("r1", "lost", False)])
def test_nothing_is_remembered_of_what_is_over(end):
    host = two_pools()
    host.run([(1.0, arrived("r1", at=1.0)), (1.5, PrefillDone("r1")), (3.0, end)])
    assert not host.policy._requests
    assert not host.policy._decoding


def test_what_finishes_with_its_prefill_is_over():
    host = two_pools()
    host.run([(1.0, arrived("r1", at=1.0)), (1.5, Finished("r1", 1))])
    assert order(host) == ["r1"]
    assert host.policy.prefill.ledger.placements == {}


def test_the_requests_of_a_pass_are_one_round_of_decode_placement():
    """Longest first: r2 goes to the first rank although r1's event came first."""
    host = two_pools("least-requests+iqr-lexicographic")
    host.run([(1.0, arrived("r1", at=1.0, prompt=20)), (1.0, arrived("r2", at=1.0, prompt=500))])
    host.run([(2.0, PrefillDone("r1")), (2.0, PrefillDone("r2"))])
    assert dispatches(host)[2:] == [(2.0, "r2", "decode-0", 0), (2.0, "r1", "decode-0", 1)]


def test_reports_reach_their_pool():
    host = two_pools()
    host.run([(1.0, pass_ended("decode-0", 1, ran=(0, 0), kv_blocks=(7, 9), acknowledged=0))])
    assert [rank.kv_blocks for rank in host.policy.decode.ledger.ranks] == [7, 9]
    host.run([(2.0, InstanceDraining("decode-0"))])
    assert host.policy.decode.ledger.ranks == []
    assert len(host.policy.prefill.ledger.ranks) == 1


def test_events_of_an_instance_nobody_announced_are_ignored():
    host = two_pools()
    assert (
        host.run(
            [(1.0, pass_ended("decode-7", 1, ran=(0,), acknowledged=0)), (1.0, InstanceDown("prefill-7"))]
        )
        == []
    )


@pytest.mark.parametrize("prompt", [1600, 10_000])
def test_too_long_for_the_kv_of_decode_is_refused_at_the_door(prompt):
    host = two_pools()
    host.run([(1.0, arrived("r1", at=1.0, prompt=1599)), (1.1, arrived("r2", at=1.1, prompt=prompt))])
    assert order(host) == ["r1"]
    assert rejects(host) == [(1.1, "r2", "prompt-too-long")]


def test_a_failure_in_prefill_with_retry_is_placed_again():
    host = two_pools()
    host.run([(1.0, arrived("r1", at=1.0)), (1.5, Failed("r1", "lost", True))])
    assert dispatches(host) == [(1.0, "r1", "prefill-0", 0), (1.5, "r1", "prefill-0", 0)]


def test_a_failure_in_decode_with_retry_restarts_at_prefill():
    host = two_pools()
    host.run(
        [(1.0, arrived("r1", at=1.0)), (1.5, PrefillDone("r1")), (2.0, Failed("r1", "decode died", True))]
    )
    host.run([(2.5, PrefillDone("r1")), (9.0, Finished("r1", 5))])
    assert [(at, instance) for at, _, instance, _ in dispatches(host)] == [
        (1.0, "prefill-0"),
        (1.5, "decode-0"),
        (2.0, "prefill-0"),
        (2.5, "decode-0"),
    ]
    assert host.policy.decode.ledger.placements == {}


def test_a_failure_while_waiting_for_decode_restarts_at_prefill():
    host = two_pools(pools=POOLS[:1])
    host.run([(1.0, arrived("r1", at=1.0)), (1.5, PrefillDone("r1"))])
    assert [h.request_id for h in host.policy.held()] == ["r1"]
    host.run([(2.0, Failed("r1", "its KV is gone", True)), (2.5, PrefillDone("r1")), (3.0, POOLS[1][1])])
    assert [(at, instance) for at, _, instance, _ in dispatches(host)] == [
        (1.0, "prefill-0"),
        (2.0, "prefill-0"),
        (3.0, "decode-0"),
    ]


@pytest.mark.parametrize("failed_in", ["prefill", "decode"])
def test_a_failure_without_retry_is_over(failed_in):
    host = two_pools()
    way = [(1.5, PrefillDone("r1"))] if failed_in == "decode" else []
    host.run([(1.0, arrived("r1", at=1.0)), *way, (2.0, Failed("r1", "lost", False))], until=200.0)
    assert len(order(host)) == 1 + len(way)
    assert host.policy.held() == []


@pytest.mark.parametrize("prefilled", [False, True])
def test_a_cancelled_request_is_forgotten_by_both_pools(prefilled):
    host = two_pools()
    way = [(1.5, PrefillDone("r1"))] if prefilled else []
    host.run([(1.0, arrived("r1", at=1.0)), *way, (2.0, Cancelled("r1")), (2.1, PrefillDone("r1"))])
    assert len(order(host)) == 1 + len(way)
    assert host.policy.decode.ledger.placements == host.policy.prefill.ledger.placements == {}


def test_prefill_done_said_twice_is_heard_once():
    host = two_pools()
    host.run([(1.0, arrived("r1", at=1.0)), (1.5, PrefillDone("r1")), (1.6, PrefillDone("r1"))])
    assert order(host) == ["r1", "r1"]


def test_held_explains_both_pools():
    host = two_pools(pools=[])
    host.run(
        [
            (1.0, arrived("r1", at=1.0)),
            (1.1, arrived("r2", at=1.1)),
            (2.0, POOLS[0][1]),
            (3.0, PrefillDone("r1")),
        ]
    )
    assert [h.request_id for h in host.policy.held()] == ["r1"]


def test_each_pool_is_woken_at_its_own_time():
    host = two_pools("round-robin:max_hold_s=10+round-robin:max_hold_s=3", pools=[])
    host.run(
        [
            (1.0, arrived("r1", at=1.0)),
            (2.0, POOLS[0][1]),
            (2.5, PrefillDone("r1")),
            (2.6, InstanceDown("prefill-0")),
        ]
    )
    host.run([(3.0, arrived("r2", at=3.0))], until=60.0)
    assert rejects(host) == [(5.5, "r1", "held-too-long"), (13.0, "r2", "held-too-long")]


def test_a_prompt_that_came_while_nothing_was_up_is_refused_when_it_fits_nowhere():
    host = host_of("least-tokens")
    host.run(
        [(0.0, arrived("big", at=0.0, prompt=5000)), (1.0, up("engine-0", ranks=1, chunk=512, kv_blocks=100))]
    )
    assert rejects(host) == [(1.0, "big", "prompt-too-long")]


def test_what_instances_could_hold_is_remembered_while_they_are_down():
    host = host_of("least-tokens")
    host.run(
        [
            (0.0, up("engine-0", ranks=1, chunk=512, kv_blocks=100)),
            (1.0, InstanceDown("engine-0")),
            (2.0, arrived("big", at=2.0, prompt=5000)),
        ]
    )
    assert rejects(host) == [(2.0, "big", "prompt-too-long")]
