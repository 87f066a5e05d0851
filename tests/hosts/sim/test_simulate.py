"""`simulate`: what a run records, and that it is the same run every time."""

import math
import random

import pytest

from headway.core.actions import Dispatch, Recall
from headway.core.batch.vllm_v1 import VllmV1
from headway.core.cluster.contract import ClusterPolicy
from headway.core.errors import ConfigError, InvariantError
from headway.core.events import Arrived, Finished, PassEnded, PrefillDone, Role
from headway.core.request import Slo
from headway.core.settings import Settings
from headway.hosts.sim import simulate
from headway.hosts.sim.cluster import SimCluster
from headway.hosts.sim.counters import PassCounters
from headway.hosts.sim.driver import Recorder
from headway.model.cluster import ClusterSpec, NetworkSpec, PoolSpec
from headway.model.costs import DenseCosts
from headway.model.engine import PassOutcome
from headway.model.instance import Inbox
from headway.model.presets import load_cluster
from headway.testing import ContractCheck
from headway.workload.items import Item

PASS_S = 0.1
NETWORK = NetworkSpec(
    dispatch_latency_s=0.01, report_latency_s=0.02, kv_bandwidth_bytes_s=1000.0, kv_latency_s=0.005
)


def pool(role, **changes):
    """Passes of exactly `PASS_S`."""
    costs = DenseCosts(PASS_S, 1, 0.0, 0.0, 0.0, 0.0)
    plain = {"token_cap": 1000, "kv_blocks": 1000, "costs": costs, "host_gap_s": 0.0, "jitter": 0.0}
    return PoolSpec(role=role, **plain | changes)


def cluster(*pools):
    return ClusterSpec(name="small", kv_bytes_per_token=0.1, network=NETWORK, pools=pools)


ONE = cluster(pool(Role.AGGREGATED))
TWO_POOLS = cluster(pool(Role.PREFILL), pool(Role.DECODE))


def serve(spec, items, policy="round-robin", **options):
    return simulate(spec, items, policy, "vllm-v1", **options)


@pytest.mark.parametrize(("policy", "told"), [("pab", True), ("least-tokens", False)])
def test_admission_budgets_are_worked_out_only_for_a_policy_that_reads_them(policy, told):
    recorder = Recorder()
    simulate(ONE, [Item(float(n), 1500, 3) for n in range(20)], policy, "fair", observers=[recorder])
    reports = [event for _, event in recorder.script if isinstance(event, PassEnded)]
    assert any(report.pab_tokens is not None for report in reports) == told


def test_the_life_of_a_request_on_an_aggregated_engine():
    recorder = Recorder()
    (outcome,) = serve(ONE, [Item(1.0, 1500, 3)], observers=[recorder]).outcomes
    # On the wire until 1.01, two passes for 1,500 tokens, two more for the other two tokens.
    assert outcome.dispatched_s == 1.0
    assert outcome.first_token_s == pytest.approx(1.21)
    assert outcome.finished_s == pytest.approx(1.41)
    assert outcome.lateness_s == pytest.approx(1.41 - 3.1)
    told = [(round(now, 6), type(event)) for now, event in recorder.script[1:]]
    assert told == [
        (1.0, Arrived),
        (1.13, PassEnded),
        (1.23, PrefillDone),
        (1.23, PassEnded),
        (1.33, PassEnded),
        (1.43, Finished),
        (1.43, PassEnded),
    ]


def test_the_life_of_a_request_over_two_pools():
    recorder = Recorder()
    (outcome,) = serve(TWO_POOLS, [Item(1.0, 600, 3)], observers=[recorder]).outcomes
    # Told at 1.13; 600 tokens of KV take 0.005 + 0.06 s, the wire 0.01 s; then two passes.
    assert outcome.first_token_s == pytest.approx(1.11)
    assert outcome.finished_s == pytest.approx(1.13 + 0.065 + 0.01 + 0.2)
    reports = [e for _, e in recorder.script if isinstance(e, PassEnded)]
    assert [(e.instance, e.sequence, e.acknowledged) for e in reports] == [
        ("prefill-0", 1, 1), ("decode-0", 1, 1), ("decode-0", 2, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("spec", [ONE, TWO_POOLS])
def test_the_way_of_the_answer_is_the_clients_alone(spec):
    slow = spec.model_copy(update={"network": NETWORK.model_copy(update={"answer_latency_s": 0.5})})
    near, far = Recorder(), Recorder()
    (here,) = serve(spec, [Item(1.0, 600, 3)], observers=[near]).outcomes
    (there,) = serve(slow, [Item(1.0, 600, 3)], observers=[far]).outcomes
    assert near.script == far.script
    assert there.first_token_s == pytest.approx(here.first_token_s + 0.5)
    assert there.finished_s == pytest.approx(here.finished_s + 0.5)
    assert there.lateness_s == pytest.approx(here.lateness_s + 0.5)


@pytest.mark.parametrize("spec", [ONE, TWO_POOLS])
def test_a_request_whose_first_token_is_its_last_is_only_finished(spec):
    recorder = Recorder()
    (outcome,) = serve(spec, [Item(0.0, 10, 1)], observers=[recorder]).outcomes
    assert outcome.first_token_s == outcome.finished_s == pytest.approx(0.11)
    assert not any(isinstance(event, PrefillDone) for _, event in recorder.script)


def test_a_batch_delivered_at_one_instant_runs_in_one_pass():
    result = serve(ONE, [Item(1.0, 10, 1), Item(1.0, 20, 1)], keep_passes=True)
    assert [record.prefill_tokens for record in result.passes] == [(30,)]
    assert result.passes[0][:6] == ("engine-0", "aggregated", 0, 1.01, 1.11, 1000)


def test_independent_ranks_report_one_by_one_and_share_the_numbering():
    spec = cluster(pool(Role.AGGREGATED, ranks=2, lockstep=False))
    recorder = Recorder()
    serve(spec, [Item(0.0, 10, 1), Item(0.05, 10, 1)], observers=[recorder, ContractCheck()])
    reports = [event for _, event in recorder.script if isinstance(event, PassEnded)]
    assert [(e.first_rank, e.sequence, e.acknowledged, e.ran_tokens) for e in reports] == [
        (0, 1, 2, (10,)), (1, 2, 2, (10,))
    ]  # fmt: skip


def test_a_prompt_longer_than_any_ranks_memory_is_an_outcome():
    outcomes = serve(ONE, [Item(0.0, 16_001, 5), Item(0.0, 10, 1)]).outcomes
    assert [outcome.rejected for outcome in outcomes] == ["prompt-too-long", None]


def test_the_slo_of_the_run_replaces_that_of_the_cluster():
    (outcome,) = serve(ONE, [Item(0.0, 10, 1)], slo=Slo(0.05, 0.01)).outcomes
    assert outcome.slo == Slo(0.05, 0.01)
    assert outcome.lateness_s == pytest.approx(0.06)


def test_arrivals_that_go_backwards_are_refused():
    with pytest.raises(ConfigError, match=r"item 1 arrives at 0\.5 s, before"):
        serve(ONE, [Item(1.0, 10, 1), Item(0.5, 10, 1)])


def test_no_requests_give_an_empty_result():
    result = serve(ONE, [])
    assert (result.outcomes, result.steps, result.duration_s) == ([], 0, 0.0)
    assert math.isnan(result.chunk_utilisation)


def test_progress_is_told_at_most_a_hundred_times_and_ends_at_one():
    told = []
    serve(ONE, [Item(0.01 * i, 10, 1) for i in range(250)], progress=told.append)
    assert told == sorted(told) and told[-1] == 1.0 and 50 < len(told) <= 100


def some_items(seed=11):
    rng = random.Random(seed)
    now = 0.0
    for _ in range(120):
        now += rng.expovariate(50.0)
        yield Item(now, rng.randrange(1, 3000), rng.randrange(1, 15))


@pytest.mark.parametrize("policy", ["staggered", "power-of-two", "triage+random"])
def test_same_seed_same_log_byte_for_byte(policy):
    spec = load_cluster("dsv3-h200-pd")
    first, again, other = (
        serve(spec, list(some_items()), policy, seed=seed, keep_log=True).log.text() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_engines_of_two_policies_jitter_alike():
    spec = load_cluster("llama8b-h100")
    items = list(some_items())
    runs = [serve(spec, items, policy, seed=4) for policy in ("round-robin", "least-tokens")]
    assert runs[0].outcomes == runs[1].outcomes  # one engine: nothing to choose, so all else is equal


def test_counters_over_passes():
    counters = PassCounters()
    counters.add(PassOutcome([], [], (100, 50), (0, 0)), 200)
    counters.add(PassOutcome([], [], (0, 0), (3, 1)), 200)
    assert counters.steps == 2
    assert counters.chunk_utilisation == pytest.approx(150 / 400)
    assert counters.bubble == pytest.approx(0.25)
    assert counters.decode_batch_imbalance == pytest.approx(0.5)


def test_an_inbox_acknowledges_what_has_no_gap_before_it():
    inbox = Inbox()
    inbox.expect(5)
    assert inbox.acknowledged == 4
    for number, acknowledged in [(6, 4), (8, 4), (5, 6), (7, 8)]:
        inbox.receive(number)
        assert inbox.acknowledged == acknowledged


class Puppet(ClusterPolicy):
    """Answers to the arrival of r0, and to the first report, with what it was told."""

    def __init__(self, on_arrival=(), on_report=()):
        self.answers = {Arrived: list(on_arrival), PassEnded: list(on_report)}

    def handle(self, event, now):
        return self.answers.pop(type(event), [])

    def wake_at(self):
        return None

    def held(self):
        return []


def puppet_run(spec, policy):
    sim = SimCluster(spec, policy, lambda rank: VllmV1(Settings(), random.Random(0)))
    sim.run([Item(0.0, 2500, 2)])
    return sim


def test_a_recalled_request_starts_again_from_its_prompt():
    again = [Recall("r0", "engine-0"), Dispatch("r0", "engine-0", 0, 2)]
    sim = puppet_run(ONE, Puppet([Dispatch("r0", "engine-0", 0, 1)], again))
    # The first report is at 0.13; a second pass over the first try runs to 0.21; then three anew.
    assert sim.outcomes[0].first_token_s == pytest.approx(0.51)
    assert sim.outcomes[0].dispatched_s == pytest.approx(0.13)


def test_a_request_recalled_on_the_wire_never_runs():
    recalled = [Dispatch("r0", "engine-0", 0, 1), Recall("r0", "engine-0")]
    sim = puppet_run(ONE, Puppet(recalled))
    assert sim.counters.steps == 0
    assert sim.outcomes[0].rejected == "timed-out"


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([Dispatch("r0", "engine-9", 0, 1)], "no such instance"),
        ([Dispatch("r0", "engine-0", 1, 1)], "has 1 ranks"),
        ([Dispatch("r9", "engine-0", 0, 1)], "does not have this request"),
        ([Dispatch("r0", "engine-0", 0, 1), Dispatch("r0", "engine-0", 0, 2)], "does not have this request"),
        ([Recall("r0", "engine-0")], "not there"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_stopped(actions, message):
    with pytest.raises(InvariantError, match=message):
        puppet_run(ONE, Puppet(actions))


def test_a_prompt_cannot_be_sent_to_a_decode_instance():
    with pytest.raises(InvariantError, match="not prefilled"):
        puppet_run(TWO_POOLS, Puppet([Dispatch("r0", "decode-0", 0, 1)]))
