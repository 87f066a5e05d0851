"""The search for the highest rate."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import headway
from headway.core.errors import ConfigError
from headway.hosts.sim.capacity import highest_rate


@given(st.floats(0.1, 50.0), st.floats(0.5, 20.0))
def test_the_edge_is_found_to_the_tolerance(edge: float, start: float):
    if not start / 32 < edge < start * 8:
        return
    found = highest_rate(lambda rps: rps <= edge, start, 0.01)
    assert found <= edge <= found * 1.0101


def test_a_few_simulations_suffice():
    tried: list[float] = []

    def meets(rps: float) -> bool:
        tried.append(rps)
        return rps <= 13.0

    highest_rate(meets, 10.0, 0.02)
    assert len(tried) <= 9


def test_what_never_meets_has_no_capacity():
    assert highest_rate(lambda rps: False, 10.0, 0.02) == 0.0


def test_what_always_meets_stops_the_search():
    assert highest_rate(lambda rps: True, 10.0, 0.02) == 160.0


def test_capacity_of_a_small_engine_over_seeds():
    result = headway.capacity(
        cluster="llama8b-h100",
        policies=["round-robin"],
        batch=["vllm-v1", "stall-free:token_budget=2048"],
        requests=60,
        seeds=2,
        attainment=0.9,
        tolerance=0.1,
        workers=1,
    )
    assert [(run.policy, run.batch) for run in result.runs] == [
        ("round-robin", "vllm-v1"),
        ("round-robin", "stall-free:token_budget=2048"),
    ]
    for run in result.runs:
        assert len(run.per_seed_rps) == 2
        assert run.capacity_rps == pytest.approx(sum(run.per_seed_rps) / 2)
        assert run.ci95[0] <= run.capacity_rps <= run.ci95[1]
        assert (run.slo_ttft_s, run.slo_tpot_s, run.attainment) == (1.0, 0.05, 0.9)


def test_one_seed_has_no_interval():
    result = headway.capacity(
        cluster="llama8b-h100",
        policies=["random"],
        requests=20,
        seeds=1,
        tolerance=0.5,
        metric="envelope",
        workers=1,
    )
    assert result.runs[0].ci95 is None
    assert result.runs[0].metric == "envelope"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attainment": 0.0}, "attainment must be above 0"),
        ({"attainment": 99.0}, "at most 1, got 99.0"),
        ({"metric": "slow"}, "metric must be slo or envelope, got 'slow'"),
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"batch": ["fare"]}, "did you mean 'fair'"),
    ],
)
def test_bad_input_is_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        headway.capacity(cluster="llama8b-h100", **options)
