"""Instances die, hang, slow down and come back: every request is completed or rejected, none is lost."""

import random

import pytest

from headway.core.errors import ConfigError
from headway.core.events import Failed, InstanceDown, InstanceUp, Snapshot
from headway.hosts.sim import parse_fault, simulate
from headway.hosts.sim.driver import Recorder
from headway.model.presets import load_cluster
from headway.testing import ContractCheck
from headway.workload.items import Item

PD, AGGREGATED = "dsv3-h200-pd", "llama8b-h100-x4"
POLICIES = {PD: ["staggered", "triage", "least-tokens"], AGGREGATED: ["pab", "round-robin", "staggered"]}
FIRST = {PD: "prefill-0", AGGREGATED: "engine-0"}
RUNS = [(preset, policy) for preset, policies in POLICIES.items() for policy in policies]

SCENARIOS = {
    "dies": ["die:{0}@1"],
    "dies and comes back": ["die:{0}@1", "recover:{0}@2"],
    "dies and comes back faster than the news of it": ["die:{0}@1", "recover:{0}@1.0001"],
    "blinks twice": ["die:{0}@1", "recover:{0}@1.0001", "die:{0}@1.0002", "recover:{0}@1.0003"],
    "hangs for good": ["hang:{0}@1"],
    "hangs and comes back": ["hang:{0}@1", "recover:{0}@15"],
    "hangs, then dies, then comes back": ["hang:{0}@1", "die:{0}@2", "recover:{0}@3"],
    "slows down and recovers": ["slow:{0}@1x5", "recover:{0}@3"],
    "recovers without a fault": ["recover:{0}@1"],
}  # fmt: skip


def items(requests=150, rps=60.0, seed=3):
    rng = random.Random(seed)
    now, made = 0.0, []
    for _ in range(requests):
        now += rng.expovariate(rps)
        made.append(Item(now, rng.randrange(1, 5000), rng.randrange(1, 30)))
    return made


def run(preset, policy, faults, **options):
    check, recorder = ContractCheck(), Recorder()
    result = simulate(
        load_cluster(preset), items(), policy, "vllm-v1",
        faults=[parse_fault(text) for text in faults], observers=[check, recorder], **options,
    )  # fmt: skip
    return result, [event for _, event in recorder.script]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("preset", "policy"), RUNS)
def test_every_request_is_completed_or_rejected(preset, policy, scenario):
    result, _ = run(preset, policy, [text.format(FIRST[preset]) for text in SCENARIOS[scenario]])
    assert len(result.outcomes) == 150
    for outcome in result.outcomes:
        assert (outcome.finished_s is None) == (outcome.rejected is not None)
        assert outcome.rejected in (None, "instance-failed", "timed-out", "held-too-long")


@pytest.mark.parametrize(("preset", "policy"), RUNS)
def test_without_a_fault_all_are_completed(preset, policy):
    result, _ = run(preset, policy, [])
    assert all(outcome.finished_s is not None for outcome in result.outcomes)


@pytest.mark.parametrize(("preset", "policy"), RUNS)
def test_with_every_instance_dead_all_that_is_left_is_rejected(preset, policy):
    names = [name for pool in load_cluster(preset).pools for name in pool.instance_names()]
    result, _ = run(preset, policy, [f"die:{name}@1" for name in names])
    assert all((o.finished_s is None) == (o.rejected is not None) for o in result.outcomes)
    assert not any(o.finished_s is not None and o.finished_s > 1.0 for o in result.outcomes)


def test_a_dead_instance_is_announced_before_what_it_lost_and_comes_back_in_a_new_epoch():
    _, events = run(PD, "least-tokens", ["die:prefill-0@1", "recover:prefill-0@2"])
    told = [e for e in events if isinstance(e, InstanceDown | Failed | InstanceUp)]
    first = next(i for i, e in enumerate(told) if isinstance(e, InstanceDown))
    assert all(isinstance(e, InstanceUp) for e in told[:first])
    lost = told[first + 1 : -1]
    assert lost and all(isinstance(e, Failed) and e.retry for e in lost)
    assert (told[-1].instance, told[-1].epoch) == ("prefill-0", 1)


def test_what_a_decode_instance_loses_cannot_be_retried():
    result, events = run(PD, "least-tokens", ["die:decode-0@1"])
    lost = [e for e in events if isinstance(e, Failed)]
    assert lost and not any(e.retry for e in lost)
    assert sum(o.rejected == "instance-failed" for o in result.outcomes) == len(lost)


def test_a_hung_instance_goes_on_where_it_was_and_says_so():
    result, events = run(AGGREGATED, "round-robin", ["hang:engine-0@1", "recover:engine-0@5"])
    assert any(isinstance(e, Snapshot) and e.instance == "engine-0" for e in events)
    assert all(o.finished_s is not None for o in result.outcomes)
    assert any(o.arrival_s < 1.0 and o.finished_s >= 5.0 for o in result.outcomes)


def test_an_immediate_policy_leaves_requests_at_a_hung_instance_and_they_time_out():
    result, _ = run(AGGREGATED, "round-robin", ["hang:engine-0@1"])
    assert {o.rejected for o in result.outcomes} == {None, "timed-out"}


def test_the_watchdog_takes_back_what_a_hung_instance_has():
    result, _ = run(PD, "staggered", ["hang:prefill-0@1"])
    assert all(o.finished_s is not None for o in result.outcomes)


def test_a_slow_instance_slows_its_passes():
    slow, _ = run(AGGREGATED, "round-robin", ["slow:engine-0@1x5"], keep_passes=True)
    longest = {
        name: max(p.end_s - p.start_s for p in slow.passes if p.instance == name and p.start_s > 1.0)
        for name in ("engine-0", "engine-1")
    }
    assert longest["engine-0"] > 3.0 * longest["engine-1"]


def test_a_fault_of_an_unknown_instance_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'prefill-0'"):
        run(PD, "staggered", ["die:prefil-0@1"])
