"""The immediate policies: each rule, its tie-break, and what they know between reports."""

import pytest
from cluster_scripts import dispatches, host_of, order, snapshot

from headway.core.events import Cancelled, Failed, Finished, InstanceDown, InstanceDraining, PrefillDone
from headway.testing import arrived, pass_ended, up

IMMEDIATE = ["round-robin", "random", "least-requests", "least-tokens", "power-of-two", "vllm-dp"]


def arrivals(*prompts, start=1.0, step=0.1):
    return [
        (start + n * step, arrived(f"r{n + 1}", at=start + n * step, prompt=prompt))
        for n, prompt in enumerate(prompts)
    ]


def places(host):
    return [(instance, rank) for _, _, instance, rank in dispatches(host)]


@pytest.mark.parametrize("name", IMMEDIATE)
def test_each_request_leaves_the_moment_it_comes(name):
    host = host_of(name)
    host.run([(0.0, up("engine-0", ranks=2)), *arrivals(100, 200, 300)])
    assert [at for at, *_ in dispatches(host)] == pytest.approx([1.0, 1.1, 1.2])
    assert host.policy.held() == []
    assert host.policy.wake_at() is None


@pytest.mark.parametrize("name", IMMEDIATE)
def test_with_no_instance_up_requests_are_held_and_leave_in_order_of_arrival(name):
    host = host_of(name)
    host.run(arrivals(100, 200))
    assert [(h.request_id, h.since_s, h.why) for h in host.policy.held()] == [
        ("r1", 1.0, "no instance is up"),
        ("r2", 1.1, "no instance is up"),
    ]
    host.run([(2.0, up("engine-0"))])
    assert [(at, name) for at, name, *_ in dispatches(host)] == [(2.0, "r1"), (2.0, "r2")]


# round-robin


def test_round_robin_goes_over_the_instances_first():
    host = host_of("round-robin")
    host.run([(0.0, up("engine-0", ranks=2)), (0.0, up("engine-1", ranks=2)), *arrivals(1, 1, 1, 1, 1)])
    assert places(host) == [
        ("engine-0", 0),
        ("engine-1", 0),
        ("engine-0", 1),
        ("engine-1", 1),
        ("engine-0", 0),
    ]


def test_round_robin_reaches_every_rank_of_unequal_instances():
    host = host_of("round-robin")
    host.run([(0.0, up("engine-0", ranks=1)), (0.0, up("engine-1", ranks=3)), *arrivals(*[1] * 6)])
    assert set(places(host)) == {("engine-0", 0), ("engine-1", 0), ("engine-1", 1), ("engine-1", 2)}


def test_round_robin_leaves_out_a_draining_instance():
    host = host_of("round-robin")
    host.run(
        [
            (0.0, up("engine-0")),
            (0.0, up("engine-1")),
            (0.5, InstanceDraining("engine-0")),
            *arrivals(1, 1, 1),
        ]
    )
    assert places(host) == [("engine-1", 0)] * 3


# random and power-of-two


def test_random_is_random_and_repeats_with_its_seed():
    def run(seed):
        host = host_of("random", seed=seed)
        host.run([(0.0, up("engine-0", ranks=4)), *arrivals(*[1] * 40)])
        return places(host)

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(set(run(1))) == 4


def test_power_of_two_takes_the_one_with_fewer_requests():
    """With 30 requests on one of two ranks and the other empty, the full one is taken only if drawn twice."""
    host = host_of("power-of-two", seed=3)
    host.run([(0.0, up("engine-0", ranks=1)), *arrivals(*[1] * 30, step=0.0)])
    host.run([(2.0, up("engine-1", ranks=1)), *arrivals(*[1] * 0)])
    host.run([(3.0, arrived(f"n{n}", at=3.0, prompt=1)) for n in range(20)])
    new = [instance for at, _, instance, _ in dispatches(host) if at == 3.0]
    assert new.count("engine-1") > 10


# least-requests


def test_least_requests_counts_requests_not_tokens():
    host = host_of("least-requests")
    host.run([(0.0, up("engine-0", ranks=2)), *arrivals(5000, 1, 1, 1)])
    assert places(host) == [("engine-0", 0), ("engine-0", 1), ("engine-0", 0), ("engine-0", 1)]


def test_least_requests_counts_until_finished():
    host = host_of("least-requests")
    host.run([(0.0, up("engine-0", ranks=2)), *arrivals(1, 1, 1)])  # r3 on rank 0 again
    host.run([(2.0, Finished("r2", 5)), (2.1, PrefillDone("r1")), (2.2, arrived("r4", at=2.2))])
    assert host.dispatched["r4"] == ("engine-0", 1)


def test_ties_go_to_the_rank_chosen_longest_ago():
    host = host_of("least-requests")
    host.run([(0.0, up("engine-0", ranks=3)), *arrivals(1, 1, 1)])
    host.run([(2.0, Finished("r1", 1)), (2.0, Finished("r2", 1)), (2.0, Finished("r3", 1))])
    host.run([(3.0, arrived("r4", at=3.0)), (3.0, Finished("r4", 1)), (3.1, arrived("r5", at=3.1))])
    assert places(host)[3:] == [("engine-0", 0), ("engine-0", 1)]


# least-tokens


def test_least_tokens_counts_prompt_tokens_to_compute():
    host = host_of("least-tokens", disaggregated=True)
    host.run([(0.0, up("prefill-0", ranks=2)), *arrivals(5000, 100, 100, 100)])
    assert places(host) == [("prefill-0", 0), ("prefill-0", 1), ("prefill-0", 1), ("prefill-0", 1)]


def test_least_tokens_believes_the_report():
    host = host_of("least-tokens", disaggregated=True)
    host.run([(0.0, up("prefill-0", ranks=2)), *arrivals(5000, 100)])
    host.run(
        [
            (2.0, pass_ended("prefill-0", 1, ran=(5000, 0), queued=(0, 100), acknowledged=2)),
            (2.1, arrived("r3", at=2.1, prompt=100)),
        ]
    )
    assert host.dispatched["r3"] == ("prefill-0", 0)


def test_where_an_engine_decodes_least_tokens_counts_the_context_it_holds():
    host = host_of("least-tokens")
    host.run(
        [
            (0.0, up("engine-0", ranks=2, block_tokens=16)),
            (0.5, snapshot("engine-0", 1, queued_tokens=(0, 500), kv_blocks=(100, 10))),  # 1600 and 660
            (1.0, arrived("r1", at=1.0, prompt=10)),
        ]
    )
    assert host.dispatched["r1"] == ("engine-0", 1)


# vllm-dp


def test_vllm_dp_weighs_a_waiting_request_as_4_running():
    host = host_of("vllm-dp")
    host.run(
        [
            (0.0, up("engine-0", ranks=2)),
            (0.5, snapshot("engine-0", 1, running=(7, 0), waiting=(0, 2))),  # 7 and 8
            (1.0, arrived("r1", at=1.0)),
        ]
    )
    assert host.dispatched["r1"] == ("engine-0", 0)


def test_vllm_dp_counts_its_own_dispatches_between_reports():
    host = host_of("vllm-dp")
    host.run(
        [
            (0.0, up("engine-0", ranks=2)),
            (0.5, snapshot("engine-0", 1, running=(0, 5), waiting=(0, 0))),
            *arrivals(1, 1, 1, step=0.0),  # 4:5, 8:5, 8:9
            (2.0, pass_ended("engine-0", 2, ran=(2, 1), running=(2, 6), waiting=(0, 0), acknowledged=3)),
            (2.1, arrived("r4", at=2.1)),
        ]
    )
    assert [rank for _, rank in places(host)] == [0, 0, 1, 0]


# What every policy of a pool does.


def test_a_prompt_no_rank_can_hold_is_refused_for_good():
    host = host_of("round-robin")
    host.run([(0.0, up("engine-0", kv_blocks=10, block_tokens=16)), (1.0, arrived("r1", at=1.0, prompt=160))])
    [(at, reject)] = host.actions
    assert (at, reject.request_id, reject.why, reject.retry_after_s) == (1.0, "r1", "prompt-too-long", None)


def test_a_hold_is_bounded():
    host = host_of("round-robin:max_hold_s=30")
    host.run([(1.0, arrived("r1", at=1.0)), (2.0, arrived("r2", at=2.0))], until=60.0)
    assert [(at, a.request_id, a.why) for at, a in host.actions] == [
        (31.0, "r1", "held-too-long"),
        (32.0, "r2", "held-too-long"),
    ]
    assert all(a.retry_after_s >= 1.0 for _, a in host.actions)
    assert host.policy.held() == []


def test_a_hold_is_bounded_behind_a_request_that_came_back_too():
    host = host_of("round-robin:max_hold_s=30")
    host.run([(0.0, up("engine-0")), (1.0, arrived("r1", at=1.0)), (2.0, InstanceDown("engine-0"))])
    host.run([(3.0, arrived("r2", at=3.0)), (20.0, Failed("r1", "instance-down", True))], until=60.0)
    assert [(at, a.request_id) for at, a in host.actions[1:]] == [(33.0, "r2"), (50.0, "r1")]


def test_a_hold_without_end_sets_no_timer():
    host = host_of("round-robin:max_hold_s=inf")
    host.run([(1.0, arrived("r1", at=1.0))])
    assert host.policy.wake_at() is None


def test_what_failed_before_its_first_byte_goes_before_all_others():
    host = host_of("least-requests")
    host.run([(0.0, up("engine-0")), (1.0, arrived("r1", at=1.0)), (2.0, InstanceDown("engine-0"))])
    host.run(
        [
            (3.0, arrived("r2", at=3.0)),
            (3.5, Failed("r1", "instance-down", True)),
            (4.0, up("engine-0", epoch=1)),
        ]
    )
    assert order(host) == ["r1", "r1", "r2"]


def test_what_failed_after_its_first_byte_is_over():
    host = host_of("least-requests")
    host.run(
        [(0.0, up("engine-0")), (1.0, arrived("r1", at=1.0)), (2.0, Failed("r1", "lost", False))], until=9.0
    )
    assert order(host) == ["r1"]
    assert host.policy.held() == []


@pytest.mark.parametrize("over", [Cancelled("r1"), Finished("r1", 3), Failed("r1", "lost", False)])
def test_a_held_request_that_is_over_is_not_dispatched(over):
    host = host_of("least-requests")
    host.run([(1.0, arrived("r1", at=1.0)), (2.0, over), (3.0, up("engine-0"))])
    assert host.actions == []


def test_a_cancelled_request_gives_its_place_back():
    host = host_of("least-requests")
    host.run(
        [
            (0.0, up("engine-0", ranks=2)),
            *arrivals(1, 1),
            (2.0, Cancelled("r2")),
            (3.0, arrived("r3", at=3.0)),
        ]
    )
    assert host.dispatched == {"r1": ("engine-0", 0), "r3": ("engine-0", 1)}
