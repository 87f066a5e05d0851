"""Requests go to instances that serve their model, whatever the policy; models do not disturb each other."""

import random

import pytest
from cluster_scripts import dispatches, rejects
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cluster_properties import OFTEN, ONE_POOL, PAIRS, RANKS, TWO_POOLS, World, lateness

from headway.core.cluster import ByModel, create_cluster
from headway.core.cluster.led import Led
from headway.core.cluster.ledger import Ledger
from headway.core.errors import InvariantError
from headway.core.events import Failed, Finished, InstanceDown, InstanceDraining, LeaseHeld, PrefillDone
from headway.testing import ScriptedHost, arrived, request, up


def host_of(spec, *, disaggregated=False, led=False):
    policy = ByModel(
        lambda number: create_cluster(spec, disaggregated=disaggregated, rng=random.Random(number))
    )
    return ScriptedHost(Led(policy, wait_s=4.0) if led else policy)


def places(host):
    return {request_id: instance for request_id, (instance, _) in host.dispatched.items()}


every_aggregated_policy = pytest.mark.parametrize("spec", [spec for spec, _ in ONE_POOL if ":" not in spec])


# Groups


@every_aggregated_policy
def test_each_request_goes_to_the_engine_of_its_model(spec):
    host = host_of(spec)
    script = [(0.0, up("e0", ranks=2, models=["a"])), (0.0, up("e1", ranks=2, models=["b"]))]
    script += [(0.1 * n, arrived(f"{m}{n}", at=0.1 * n, model=m)) for n in range(4) for m in "ab"]
    host.run(script, until=1.0)
    assert places(host) == {f"{m}{n}": {"a": "e0", "b": "e1"}[m] for n in range(4) for m in "ab"}


def test_a_backlog_of_one_model_neither_holds_nor_refuses_requests_of_another():
    host = host_of("staggered:max_backlog_passes=2")
    host.run([(0.0, up("e0", chunk=100, models=["a"])), (0.0, up("e1", chunk=100, models=["b"]))])
    host.run([(1.0, arrived(f"a{n}", at=1.0, prompt=100, model="a")) for n in range(9)])
    host.run([(1.0, arrived("b", at=1.0, prompt=100, model="b"))])
    assert places(host)["b"] == "e1"
    assert {request_id for _, request_id, _ in rejects(host)} > {"a8"}


def test_engines_that_share_a_base_model_under_one_of_several_names_are_one_group():
    host = host_of("least-requests")
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["a", "alias"]))])
    assert len(host.policy.groups) == 1


def test_an_adapter_makes_no_group_of_its_own():
    host = host_of("least-requests")
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["a"], adapters=["sql"]))])
    assert len(host.policy.groups) == 1


def test_a_request_that_names_no_model_goes_to_the_group_with_fewest_requests_per_rank():
    host = host_of("least-requests")
    host.run([(0.0, up("e0", ranks=2, models=["a"])), (0.0, up("e1", models=["b"]))])
    host.run([(1.0, arrived(f"r{n}", at=1.0)) for n in range(6)])
    assert sorted(places(host).values()) == ["e0"] * 4 + ["e1"] * 2


def test_an_engine_that_lists_no_models_serves_any():
    host = host_of("least-requests")
    host.run([(0.0, up("e0")), (1.0, arrived("r", at=1.0, model="whatever"))])
    assert places(host) == {"r": "e0"}


def test_a_model_whose_two_roles_list_different_aliases_is_still_one_cluster():
    host = host_of("least-requests", disaggregated=True)
    host.run([(0.0, up("prefill-0", models=["a"])), (0.0, up("decode-0", models=["a", "alias"]))])
    host.run([(1.0, arrived("r", at=1.0, model="a")), (2.0, PrefillDone("r"))])
    assert places(host) == {"r": "decode-0"}


# Adapters


@every_aggregated_policy
def test_an_adapter_s_requests_go_only_to_engines_that_loaded_it(spec):
    host = host_of(spec)
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["a"], adapters=["sql"]))])
    for n in range(6):
        host.run([(n, arrived(f"r{n}", at=n, model="sql"))], until=n + 0.5)
        if f"r{n}" in host.dispatched:
            host.run([(n + 0.5, Finished(f"r{n}", 1))])
    assert {instance for *_, instance, _ in dispatches(host)} == {"e1"}
    assert len(dispatches(host)) == 6


def test_an_adapter_in_the_decode_pool_is_followed_too():
    host = host_of("least-requests", disaggregated=True)
    host.run(
        [
            (0.0, up("prefill-0", models=["a"], adapters=["sql"])),
            (0.0, up("decode-0", models=["a"])),
            (0.0, up("decode-1", models=["a"], adapters=["sql"])),
        ]
    )
    for n in range(4):
        host.run([(1.0 + n, arrived(f"r{n}", at=1.0 + n, model="sql"))])
        host.run([(1.5 + n, PrefillDone(f"r{n}"))])
    assert set(places(host).values()) == {"decode-1"}


@every_aggregated_policy
def test_a_request_for_an_adapter_waits_until_it_is_loaded_and_blocks_no_other(spec):
    host = host_of(spec)
    host.run([(0.0, up("e0", ranks=2, models=["a"])), (1.0, arrived("sql", at=1.0, model="sql"))])
    host.run([(2.0, arrived("base", at=2.0, model="a"))], until=3.0)
    assert places(host) == {"base": "e0"}
    assert [(h.request_id, h.why) for h in host.policy.held()] == [
        ("sql", "no active instance serves its model")
    ]
    host.run([(4.0, up("e0", ranks=2, models=["a"], adapters=["sql"]))], until=5.0)
    assert places(host)["sql"] == "e0"


def test_requests_for_an_adapter_nobody_has_are_no_backlog():
    host = host_of("staggered:max_backlog_passes=2")
    host.run([(0.0, up("e0", chunk=100, models=["a"]))])
    host.run([(1.0, arrived(f"s{n}", at=1.0, prompt=100, model="sql")) for n in range(9)])
    host.run([(2.0, arrived("base", at=2.0, model="a"))])
    assert places(host) == {"base": "e0"}


def test_an_adapter_that_is_unloaded_gets_nothing_more():
    host = host_of("least-requests")
    host.run([(0.0, up("e0", models=["a"], adapters=["sql"])), (1.0, up("e0", models=["a"]))])
    host.run([(2.0, arrived("r", at=2.0, model="sql"))])
    assert host.dispatched == {}


# Engines that come and go


@every_aggregated_policy
def test_when_the_only_engine_of_a_model_is_down_its_requests_wait_until_it_is_back(spec):
    host = host_of(spec)
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["b"]))])
    host.run([(1.0, InstanceDown("e1")), (2.0, arrived("r", at=2.0, model="b"))], until=3.0)
    assert host.dispatched == {}
    host.run([(4.0, up("e1", models=["b"], epoch=1))], until=5.0)
    assert places(host) == {"r": "e1"}


@every_aggregated_policy
def test_the_wait_for_a_model_is_bounded(spec):
    host = host_of(f"{spec}:max_hold_s=10")
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["b"])), (1.0, InstanceDown("e1"))])
    host.run([(2.0, arrived("r", at=2.0, model="b"))], until=20.0)
    assert rejects(host) == [(12.0, "r", "held-too-long")]


def test_what_a_dead_engine_had_waits_for_its_model_and_is_not_sent_to_another_one():
    host = host_of("least-requests")
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["b"]))])
    host.run([(1.0, arrived("r", at=1.0, model="b")), (2.0, InstanceDown("e1"))])
    host.run([(2.0, Failed("r", "its engine is down", retry=True))])
    assert host.dispatched == {}
    host.run([(3.0, up("e2", models=["b"]))])
    assert places(host) == {"r": "e2"}


def test_an_engine_that_comes_back_with_another_model_leaves_its_old_group():
    host = host_of("least-requests")
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["b"]))])
    host.run([(1.0, InstanceDown("e1")), (2.0, up("e1", models=["a"], epoch=1))])
    host.run([(3.0, arrived("b", at=3.0, model="b")), (3.0, arrived("a1", at=3.0, model="a"))])
    host.run([(3.0, arrived("a2", at=3.0, model="a"))])
    assert sorted(places(host).values()) == ["e0", "e1"]
    assert [h.request_id for h in host.policy.held()] == ["b"]


def test_a_model_that_no_group_ever_had_waits_apart_and_moves_when_it_comes():
    host = host_of("staggered:max_backlog_passes=2")
    host.run([(0.0, up("e0", chunk=100, models=["a"])), (0.0, up("e1", chunk=100, models=["b"]))])
    host.run([(1.0, arrived(f"c{n}", at=1.0, prompt=100, model="c")) for n in range(3)])
    host.run([(2.0, arrived("a", at=2.0, model="a")), (3.0, up("e2", ranks=3, models=["c"]))], until=4.0)
    assert places(host) == {"a": "e0", "c0": "e2", "c1": "e2", "c2": "e2"}


def test_requests_wait_no_longer_where_a_draining_engine_was_the_last_of_its_group():
    host = host_of("least-requests")
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["b"])), (0.0, up("e2", models=["c"]))])
    host.run([(1.0, InstanceDraining("e0")), (2.0, arrived("r", at=2.0, model="a"))])
    assert host.dispatched == {}
    host.run([(3.0, up("e1", models=["a", "b"]))])
    assert places(host) == {"r": "e1"}


def test_groups_do_not_pile_up_as_engines_change_their_models():
    host = host_of("least-requests")
    host.run([(0.0, up("e0", models=["m0"]))])
    for n in range(1, 50):
        host.run([(n, InstanceDown("e0")), (n, up("e0", models=[f"m{n}"], epoch=n))])
    assert len(host.policy.groups) == 1


def test_a_group_that_is_new_under_a_lease_follows_it():
    host = host_of("least-requests", led=True)
    host.run([(0.0, up("e0", models=["a"])), (0.0, up("e1", models=["b"]))])
    host.run([(1.0, arrived("r", at=1.0, model="b"))], until=2.0)
    assert host.dispatched == {}
    host.run([(3.0, LeaseHeld(9.0))], until=4.0)
    host.run([(4.0, up("e2", models=["c"])), (5.0, arrived("c", at=5.0, model="c"))])
    assert places(host) == {"r": "e1", "c": "e2"}


def test_a_policy_that_ignores_models_is_stopped():
    ledger = Ledger()
    ledger.up(up("e0", models=["a"]))
    with pytest.raises(InvariantError, match=r"^request r wants model 'b', which e0 does not serve$"):
        ledger.place(request("r", model="b"), ledger.ranks[0], 0.0, "test")


# Every policy, whatever happens

#: What an engine may serve: its base models and adapters.
MODEL_SETS = [
    (("a",), ()),
    (("b",), ()),
    (("a",), ("sql",)),
    (("a", "b"), ()),
    (None, ()),
    (("c",), ("sql",)),
]
WANTED = ["a", "b", "sql", None, "a", "c", "nowhere"]


class ModelWorld(World):
    """Engines come up with any models, and change them while they are up."""

    def __init__(self, spec, instances, *, lateness_s=0.0, led=False):
        super().__init__(spec, instances, lateness_s=lateness_s)
        self.host = host_of(spec, disaggregated=instances is TWO_POOLS, led=led)
        self.host.lateness_s = lateness_s

    def arrive(self, which, number):
        self.arrivals += 1
        wanted = WANTED[which % len(WANTED)]
        self.tell(arrived(f"r{self.arrivals}", at=self.now, prompt=1 + number, model=wanted))

    def bring_up(self, which, number):
        if self._instance(which) not in self.alive:
            self.alive.add(self._instance(which))
            self.change_models(which, number)

    def change_models(self, which, number):
        name = self._instance(which)
        if name in self.alive:
            models, adapters = MODEL_SETS[number % len(MODEL_SETS)]
            shape = {"ranks": RANKS, "chunk": 1000, "kv_blocks": 150, "max_running": 4}
            self.tell(up(name, **shape, epoch=self.epochs[name], models=models, adapters=adapters))


class OneModelWorld(ModelWorld):
    """Every engine has one model, and every request names it."""

    def arrive(self, which, number):
        super().arrive(WANTED.index("a"), number)

    def change_models(self, which, number):
        super().change_models(which, 0)


class BareWorld(OneModelWorld):
    """The same without a word of models, and without groups."""

    def __init__(self, spec, instances, *, lateness_s=0.0):
        super().__init__(spec, instances, lateness_s=lateness_s)
        policy = create_cluster(spec, disaggregated=instances is TWO_POOLS, rng=random.Random(0))
        self.host = ScriptedHost(policy, lateness_s=lateness_s)

    def arrive(self, which, number):
        ModelWorld.arrive(self, WANTED.index(None), number)

    def change_models(self, which, number):
        ModelWorld.change_models(self, which, MODEL_SETS.index((None, ())))


KINDS = ["report", "snapshot", "overtake", "start_pass", "fail", "cancel"]
CHANGES = ["bring_up", "take_down", "restart", "drain"] * 2 + ["change_models"] * 4
model_steps = st.lists(
    st.tuples(
        st.sampled_from(OFTEN + KINDS + CHANGES),
        st.integers(0, 11),
        st.integers(0, 2600),
        st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.3, 2.0]),
    ),
    max_size=80,
)


@pytest.mark.parametrize(("spec", "instances"), ONE_POOL + PAIRS)
@settings(max_examples=25, deadline=None)
@given(model_steps, lateness)
def test_no_request_goes_to_an_engine_without_its_model_and_none_is_lost(spec, instances, script, lateness_s):
    """The contract check refuses a wrong model; after every event all that is not over is held or placed."""
    world = ModelWorld(spec, instances, lateness_s=lateness_s)
    for which in range(len(instances)):
        world.bring_up(which, which)
    for step in script:
        world.step(*step)
    world.host.wait(world.now + 1000.0)
    world.agree()
    assert world.host.policy.held() == []


@pytest.mark.parametrize(("spec", "instances"), ONE_POOL + PAIRS)
@settings(max_examples=10, deadline=None)
@given(model_steps, lateness)
def test_engines_of_one_model_decide_as_without_models(spec, instances, script, lateness_s):
    """Byte for byte: the groups add nothing where there is one."""

    logs = []
    for kind in (OneModelWorld, BareWorld):
        world = kind(spec, instances, lateness_s=lateness_s)
        for which in range(len(instances)):
            world.bring_up(which, 0)
        for step in script:
            world.step(*step)
        logs.append(world.host.actions)
    assert logs[0] == logs[1]
