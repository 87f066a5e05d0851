"""A small comparison made by hand: no simulation, figures one can check in one's head."""

import math
from dataclasses import replace

import pytest

from headway.model.topology import Refusal, Topology
from headway.report.metrics import QUANTILES, Distribution, PassRecord, Run
from headway.report.results import CapacityResult, CapacityRun, Cell, Comparison, Provenance
from headway.report.sweep_result import FailedRun, Point, SweepResult

PROVENANCE = Provenance(
    version="0.1.0",
    command="headway compare --policies a",
    cluster_source="measured <somewhere> & fitted",
    workload_source="a trace",
    arrivals="poisson",
    requests=1000,
    seeds=(0, 1),
    slo_ttft_s=2.0,
    slo_tpot_s=0.05,
    nominal_rps=10.0,
    mean_prompt_tokens=2048.0,
    mean_output_tokens=28.0,
)


def make_run(
    policy: str, load: float | None, seed: int, ttft_s: float, met: float = 1.0, batch: str = "vllm-v1"
) -> Run:
    spread = {
        "mean": ttft_s,
        "p50": ttft_s,
        "p90": 2 * ttft_s,
        "p95": 2 * ttft_s,
        "p99": 3 * ttft_s,
        "max": 4 * ttft_s,
    }
    tpot = dict.fromkeys(spread, 0.02)
    return Run(
        policy=policy,
        batch=batch,
        load=load,
        rps=10.0 * (load or 1.0),
        seed=seed,
        requests=1000,
        completed=1000,
        rejected=0,
        lost=0,
        ttft_s=spread,
        tpot_s=tpot,
        e2e_s=spread,
        slo_attainment=met,
        envelope_attainment=met,
        goodput_rps=10.0 * met,
        throughput_tokens_s=280.0,
        chunk_utilisation=0.5,
        bubble=0.2,
        decode_batch_imbalance=0.1,
        sim_steps=100,
        wall_s=0.1,
    )


def make_passes() -> list[PassRecord]:
    return [
        PassRecord("prefill-0", "prefill", 0, 1.0, 1.5, 100, (100, 50), (0, 0)),
        PassRecord("prefill-0", "prefill", 0, 1.5, 2.0, 100, (20, 0), (0, 3)),
        PassRecord("decode-0", "decode", 0, 1.0, 1.02, 100, (0,), (7,)),
    ]


@pytest.fixture
def comparison() -> Comparison:
    """`staggered` gains 40% at load 0.8; `least-tokens` is the best baseline; seed 1 is slower."""
    ttft = {
        ("staggered", 0.4): 0.9,
        ("staggered", 0.8): 1.2,
        ("least-tokens", 0.4): 1.0,
        ("least-tokens", 0.8): 2.0,
    }
    ttft |= {("round-robin", 0.4): 1.1, ("round-robin", 0.8): 3.0}
    met = {("round-robin", 0.8): 0.7, ("least-tokens", 0.8): 0.9}
    runs = [
        make_run(policy, load, seed, (1 + seed) * value, met.get((policy, load), 1.0))
        for (policy, load), value in sorted(ttft.items(), key=lambda item: item[0][1])
        for seed in (0, 1)
    ]
    values = tuple(0.1 + q for q in QUANTILES)
    passes = {"staggered": make_passes(), "least-tokens": make_passes()}
    return Comparison(
        "small", "made-up", runs, PROVENANCE, [Distribution(values, values) for _ in runs], passes
    )


@pytest.fixture
def one_run() -> Comparison:
    """The least there can be: one policy, one rate, one seed, nothing known of its passes."""
    return Comparison("small", "made-up", [make_run("mine.policies:Own", None, 0, 1.0)], PROVENANCE)


@pytest.fixture
def capacities() -> CapacityResult:
    runs = [
        CapacityRun("pab", "fair", 12.0, (11.0, 13.0), 1.0, 0.05, 0.99, "slo", (11.5, 12.0, 12.5)),
        CapacityRun(
            "round-robin", "stall-free", 10.0, (9.5, 10.5), 1.0, 0.05, 0.99, "slo", (10.0, 10.0, 10.0)
        ),
    ]
    return CapacityResult("small", "made-up", runs, PROVENANCE)


def make_point(
    topology: Topology, load: float, goodput_rps: float, ttft_p99_s: float, met: float = 1.0
) -> Point:
    runs = [
        replace(make_run("staggered", load, seed, ttft_p99_s / 3, met), goodput_rps=goodput_rps)
        for seed in (0, 1)
    ]
    return Point(topology, Cell("staggered", "vllm-v1", load, 10.0 * load, tuple(runs)))


EVEN, PRESET = Topology("h200", 4, 8, 4, 8, 4096), Topology("h200", 3, 8, 1, 32, 4096)


@pytest.fixture
def swept() -> SweepResult:
    """Of 64 GPUs and of 56: requests per second and GPU are 1, 2, 4 (swamped) and 0.5, 2.5, 1.5."""
    return SweepResult(
        workload="made-up",
        points=[
            make_point(EVEN, 0.4, 64.0, 0.6),
            make_point(EVEN, 0.8, 128.0, 0.9),
            make_point(EVEN, 1.2, 256.0, 9.0, met=0.85),
            make_point(PRESET, 0.4, 28.0, 0.8),
            make_point(PRESET, 0.8, 140.0, 1.2),
            make_point(PRESET, 1.0, 84.0, 3.0, met=0.9),
        ],
        provenance=replace(PROVENANCE, nominal_rps=math.nan),
        refused=[Refusal(Topology("h200", 3, 32, 1, 8, 4096), "needs 104 GPUs, there are 64")],
        failed=[FailedRun("dsv3 · staggered · seed 3", "lost 3 times: <killed>")],
    )
