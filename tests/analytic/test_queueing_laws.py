"""Simulations against queueing theory: Lindley, M/D/1, M/M/1, Little, and staggering (SBS, §2)."""

import random
from itertools import accumulate, pairwise
from statistics import fmean

import pytest

from headway.core.events import Arrived, Finished, Role
from headway.hosts.sim import simulate
from headway.model.cluster import ClusterSpec, NetworkSpec, PoolSpec
from headway.model.costs import DenseCosts
from headway.model.presets import load_cluster
from headway.workload.items import Item

NO_LATENCY = NetworkSpec(dispatch_latency_s=0.0, report_latency_s=0.0, kv_latency_s=0.0)
PATIENT = {"ttft_s": 1e6, "tpot_s": 1.0}


def engines(*, instances=1, max_running=1, fixed_s=0.0, token_s=0.0):
    """Engines of one rank whose pass takes `fixed_s + token_s·tokens`, of any length."""
    return ClusterSpec(
        name="analytic",
        kv_bytes_per_token=1.0,
        slo=PATIENT,
        network=NO_LATENCY,
        pools=(
            PoolSpec(
                role=Role.AGGREGATED,
                instances=instances,
                token_cap=10**7,
                max_running=max_running,
                kv_blocks=10**6,
                costs=DenseCosts(fixed_s, 10**7, token_s, token_s, 0.0, 0.0),
                host_gap_s=0.0,
                jitter=0.0,
            ),
        ),
    )


def poisson(requests, rps, prompt_tokens, seed):
    """Arrivals whose whole service is the prefill; `prompt_tokens(rng)` draws a length."""
    rng = random.Random(seed)
    times = accumulate(rng.expovariate(rps) for _ in range(requests))
    return [Item(at_s, prompt_tokens(rng), 1) for at_s in times]


def run(cluster, items, policy="round-robin"):
    outcomes = simulate(cluster, items, policy, "vllm-v1").outcomes
    assert all(outcome.finished_s is not None for outcome in outcomes)
    return outcomes


def mean_ttft(outcomes):
    return fmean(outcome.first_token_s - outcome.arrival_s for outcome in outcomes)


# One server, one request at a time. Mean waits converge slowly (300,000 requests for 1%), so the simulation
# is held against Lindley's recursion on its own arrivals, exactly, and the recursion's long run corrects for
# the sample: a control variate.

SERVICE_S, UTILISATION = 0.1, 0.5
MEAN_TOKENS = 10_000
TOKEN_S = SERVICE_S / MEAN_TOKENS


def constant_tokens(rng):
    return MEAN_TOKENS


def exponential_tokens(rng):
    return max(1, round(rng.expovariate(1 / MEAN_TOKENS)))


def lindley_waits(items):
    """W' = max(0, W + service − gap)."""
    waits = [0.0]
    for before, after in pairwise(items):
        gap_s = after.arrival_s - before.arrival_s
        waits.append(max(0.0, waits[-1] + before.prompt_tokens * TOKEN_S - gap_s))
    return waits


@pytest.mark.parametrize(
    ("queue", "tokens", "mean_wait_s"),
    [
        ("M/D/1", constant_tokens, UTILISATION * SERVICE_S / (2 * (1 - UTILISATION))),
        ("M/M/1", exponential_tokens, UTILISATION * SERVICE_S / (1 - UTILISATION)),
    ],
)
def test_mean_waits_of_single_servers_within_2_percent(queue, tokens, mean_wait_s):
    items = poisson(6_000, UTILISATION / SERVICE_S, tokens, seed=1)
    simulated = [
        outcome.first_token_s - outcome.arrival_s - outcome.prompt_tokens * TOKEN_S
        for outcome in run(engines(token_s=TOKEN_S), items)
    ]
    by_recursion = lindley_waits(items)
    assert simulated == pytest.approx(by_recursion, abs=1e-6)
    long_run = fmean(lindley_waits(poisson(500_000, UTILISATION / SERVICE_S, tokens, seed=2)))
    assert fmean(simulated) - fmean(by_recursion) + long_run == pytest.approx(mean_wait_s, rel=0.02)


# Little's law, on a cluster with everything switched on.


def test_littles_law_on_a_disaggregated_cluster():
    """L, integrated over the events the policy sees, against λ·W from the outcomes."""
    rng = random.Random(5)
    times = accumulate(rng.expovariate(60.0) for _ in range(1_000))
    items = [Item(at_s, rng.randrange(100, 4000), rng.randrange(2, 60)) for at_s in times]
    cluster = load_cluster("dsv3-h200-pd")
    inside, area, last_s = 0, 0.0, 0.0

    def count(now, event, actions):
        nonlocal inside, area, last_s
        area, last_s = area + inside * (now - last_s), now
        inside += isinstance(event, Arrived) - isinstance(event, Finished)

    result = simulate(cluster, items, "least-tokens", "vllm-v1", observers=[count])
    arrival_rate = len(items) / last_s
    sojourn_s = fmean(outcome.finished_s - outcome.arrival_s for outcome in result.outcomes)
    assert inside == 0
    known_late_s = cluster.network.report_latency_s
    assert area / last_s == pytest.approx(arrival_rate * (sojourn_s + known_late_s), rel=1e-9)


# Batch servers that cannot be interrupted: a pass of fixed time T takes all that waits.

PASS_S, INSTANCES = 0.1, 4


def batch_servers_mean_ttft(policy, seed=3):
    """Mean TTFT in units of T, under a load that keeps every instance busy."""
    cluster = engines(instances=INSTANCES, max_running=1000, fixed_s=PASS_S)
    outcomes = run(cluster, poisson(10_000, 10 * INSTANCES / PASS_S, lambda rng: 100, seed), policy)
    return mean_ttft(outcomes[1000:]) / PASS_S


@pytest.mark.parametrize("policy", ["round-robin", "random"])
def test_immediate_dispatch_takes_1_5_passes(policy):
    assert batch_servers_mean_ttft(policy) == pytest.approx(1.5, rel=0.03)


def test_staggered_dispatch_takes_1_plus_1_over_2n_passes():
    measured = batch_servers_mean_ttft("staggered:spacing=1.0:network_s=0.0")
    assert measured == pytest.approx(1 + 1 / (2 * INSTANCES), rel=0.03)
