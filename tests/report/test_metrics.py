"""What counts as in time, what counts at all, and what is left empty."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.request import Slo
from headway.report.metrics import QUANTILES, Outcome, distribution, meets_slo, summarise

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def served(
    arrival_s: float, first_s: float, finish_s: float, tokens: int, lateness_s: float = -0.1
) -> Outcome:
    return Outcome("r", arrival_s, 100, tokens, SLO, arrival_s, first_s, finish_s, lateness_s)


def refused(arrival_s: float, why: str) -> Outcome:
    return Outcome("r", arrival_s, 100, 10, SLO, rejected=why)


def run_of(outcomes: list[Outcome], **extra: float):
    return summarise(outcomes, policy="p", batch="b", load=0.5, rps=2.0, seed=0, **extra)


def test_ttft_is_from_arrival_and_tpot_from_the_first_token():
    run = run_of([served(1.0, 1.5, 2.5, 11)])
    assert run.ttft_s["mean"] == pytest.approx(0.5)
    assert run.tpot_s["mean"] == pytest.approx(0.1)
    assert run.e2e_s["mean"] == pytest.approx(1.5)


def test_a_single_output_token_has_no_tpot_and_meets_its_slo_by_ttft_alone():
    run = run_of([served(0.0, 0.9, 0.9, 1)])
    assert run.tpot_s == {}
    assert run.slo_attainment == 1.0


def test_a_target_met_to_the_last_digit_is_met():
    assert meets_slo(served(0.0, 1.0, 1.0 + 10 * 0.1 + 1e-12, 11))


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (served(0.0, 1.01, 1.1, 2), "first token late"),
        (served(0.0, 0.1, 0.1 + 0.11 * 10, 11), "tokens slow"),
        (refused(0.0, "full"), "refused"),
        (Outcome("r", 0.0, 100, 10, SLO), "lost"),
    ],
)
def test_what_misses_the_slo(outcome: Outcome, why: str):
    assert not meets_slo(outcome), why


def test_refused_requests_have_missed_and_lost_ones_are_told_apart():
    outcomes = [
        served(0.0, 0.5, 0.9, 5),
        refused(0.0, "full"),
        refused(0.1, "full"),
        Outcome("x", 0.2, 1, 1, SLO),
    ]
    run = run_of(outcomes)
    assert (run.requests, run.completed, run.rejected, run.lost) == (4, 1, 2, 1)
    assert run.slo_attainment == 0.25
    assert run.rejected_by_reason == {"full": 2}


def test_goodput_is_over_the_time_of_arrivals_and_throughput_to_the_last_finish():
    run = run_of([served(1.0, 1.5, 1.9, 5), served(2.0, 2.5, 5.0, 6), served(1.9, 2.4, 2.5, 2)])
    assert run.goodput_rps == pytest.approx(2 / 1.0)  # the second is too slow: 0.5 s per token
    assert run.throughput_tokens_s == pytest.approx(13 / 4.0)


def test_the_envelope_forgives_slow_tokens_that_had_slack():
    """A first token 0.9 s early pays for the next ones; the mean TPOT after it does not see that."""
    run = run_of([served(0.0, 0.1, 1.2, 2, lateness_s=0.0)])
    assert run.envelope_attainment == 1.0
    assert run.slo_attainment == 0.0


def test_waits_of_those_that_missed_their_ttft():
    run = run_of([served(0.0, 0.5, 1.0, 5), served(0.0, 30.0, 31.0, 5), served(0.0, 50.0, 51.0, 5)])
    assert run.missed_ttft_s["p50"] == 40.0
    assert run.missed_ttft_s["max"] == 50.0
    assert run_of([served(0.0, 0.5, 1.0, 5)]).missed_ttft_s == {}


def test_percentiles_are_linear_between_ranks():
    run = run_of([served(0.0, t / 10, 10.0, 5) for t in range(1, 12)])
    assert run.ttft_s["p50"] == pytest.approx(0.6)
    assert run.ttft_s["p90"] == pytest.approx(1.0)
    assert run.ttft_s["max"] == pytest.approx(1.1)


def test_nothing_at_all_is_empty_not_an_error():
    run = run_of([])
    assert run.ttft_s == {} and run.slo_attainment == 0.0 and run.goodput_rps == 0.0
    assert distribution([]).ttft_s == ()


def test_unknown_counters_are_nan():
    assert math.isnan(run_of([]).bubble)
    assert run_of([], bubble=0.25).bubble == 0.25


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=40))
def test_quantiles_grow_and_span_the_values(lives: list[tuple[float, float, float]]):
    outcomes = [served(a, a + t, a + t + d, 4) for a, t, d in lives]
    sampled = distribution(outcomes).ttft_s
    assert len(sampled) == len(QUANTILES)
    assert all(x <= y + 1e-12 for x, y in pairwise(sampled))
    assert sampled[-1] == pytest.approx(max(o.first_token_s - o.arrival_s for o in outcomes))


@given(st.lists(st.sampled_from(["served", "refused", "lost"]), max_size=30))
def test_every_request_is_accounted_for(fates: list[str]):
    make = {"served": served(0, 0.5, 1, 3), "refused": refused(0, "why"), "lost": Outcome("x", 0, 1, 1, SLO)}
    run = run_of([make[fate] for fate in fates])
    assert run.completed + run.rejected + run.lost == run.requests
