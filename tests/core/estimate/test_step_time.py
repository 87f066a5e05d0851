import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.batch.contract import StepReport
from headway.core.errors import ConfigError
from headway.core.estimate.step_time import Coefficients, StepTime


def llama8b_h100_s(new, context, attention):
    """The measured hinge (calibration of Llama-3.1-8B on H100, TP1): what the belief cannot express
    exactly."""
    ms = (
        6.43
        + 0.0087 * min(new, 448)
        + 0.0207 * max(new - 448, 0)
        + 0.0423e-3 * context
        + 0.774e-6 * attention
    )
    return ms / 1000


def traffic(steps, seed, cost=llama8b_h100_s, noise=0.02):
    rng = random.Random(seed)
    for _ in range(steps):
        decodes = rng.randrange(1, 200)
        chunk = rng.choice((0, rng.randrange(64, 2048)))
        behind = rng.choice((0, 0, 2048)) if chunk else 0
        context = decodes * rng.randrange(200, 3000) + behind
        attention = chunk * (behind + chunk / 2)
        seconds = cost(decodes + chunk, context, attention) * rng.gauss(1.0, noise)
        yield StepReport(decodes + chunk, decodes, context, attention, seconds)


def test_it_learns_the_measured_hinge_online_within_200_steps():
    belief = StepTime()
    for step in traffic(200, seed=1):
        belief.observe(step)
    error = belief.error_on(traffic(500, seed=2, noise=0.0))
    assert error["decode"] < 0.02
    assert error["mixed"] < 0.05
    assert belief.recent_error("decode") < 0.04
    assert belief.recent_error("mixed") < 0.07


def test_offline_it_finds_the_coefficients_of_a_truth_of_its_own_form():
    truth = Coefficients(0.006, 20e-6, 40e-9, 1e-9)
    belief = StepTime()
    belief.fit(traffic(300, seed=3, cost=truth.predict, noise=0.0))
    found = belief.coefficients("mixed")
    assert found == pytest.approx(truth, rel=0.02)
    assert belief.error_on(traffic(100, seed=4, cost=truth.predict, noise=0.0))["mixed"] < 0.001


def test_the_regimes_are_apart():
    belief = StepTime()
    for step in traffic(
        200, seed=5, noise=0.0, cost=lambda new, context, attention: 0.01 if attention else 0.003
    ):
        belief.observe(step)
    assert belief.predict(100, 100, 100_000) == pytest.approx(0.003, rel=0.02)
    assert belief.predict(1100, 100, 100_000, 500_000.0) == pytest.approx(0.01, rel=0.02)


def test_it_is_trained_regime_by_regime():
    belief = StepTime()
    assert belief.recent_error("mixed") is None
    for _ in range(16):
        belief.observe(StepReport(8, 8, 8000, 0.0, 0.007))
    assert belief.trained("decode")
    assert not belief.trained("mixed")


def test_it_follows_an_engine_that_slows_down():
    belief = StepTime()
    for step in traffic(300, seed=6):
        belief.observe(step)
    for step in traffic(1000, seed=7, cost=lambda *work: 2.0 * llama8b_h100_s(*work)):
        belief.observe(step)
    assert belief.predict(64, 64, 64_000) == pytest.approx(2 * llama8b_h100_s(64, 64_000, 0.0), rel=0.05)


def test_steps_of_one_size_for_hours_do_not_wind_it_up():
    belief = StepTime()
    for _ in range(20_000):
        belief.observe(StepReport(513, 1, 1000, 131_072.0, 0.012))
    assert belief.predict(513, 1, 1000, 131_072.0) == pytest.approx(0.012, rel=0.01)
    assert 0.012 <= belief.predict(2049, 1, 1000, 2e6) <= 0.012 * 4.2, "between constant and proportional"


def test_no_coefficient_is_negative_even_if_longer_steps_were_faster():
    belief = StepTime()
    for new in range(100, 2000, 50):
        belief.observe(StepReport(new, 0, 0, 0.0, 0.05 - new * 1e-5))
    assert min(belief.coefficients("mixed")) >= 0.0


def test_a_stray_slow_step_hardly_matters():
    belief = StepTime()
    for step in traffic(200, seed=8):
        belief.observe(step)
    before_s = belief.predict(500, 100, 100_000, 80_000.0)
    belief.observe(StepReport(500, 100, 100_000, 80_000.0, 3.0))
    for step in traffic(8, seed=9):
        belief.observe(step)
    assert belief.predict(500, 100, 100_000, 80_000.0) == pytest.approx(before_s, rel=0.05)


def test_the_margin_covers_its_quantile_of_steps():
    belief = StepTime(margin_quantile=0.9)
    for step in traffic(400, seed=10, noise=0.1):
        belief.observe(step)
    steps = list(traffic(500, seed=11, noise=0.1))
    within = sum(
        s.duration_s <= belief.predict_with_margin(s.new_tokens, s.decodes, s.context_tokens, s.attention)
        for s in steps
    )
    assert within / len(steps) == pytest.approx(0.9, abs=0.07)


def test_a_step_without_work_or_time_teaches_nothing():
    belief = StepTime()
    belief.observe(StepReport(0, 0, 0, 0.0, 0.01))
    belief.observe(StepReport(10, 0, 0, 0.0, 0.0))
    belief.fit([StepReport(10, 0, 0, 0.0, -1.0)])
    assert belief.coefficients("mixed") == Coefficients()


def test_chunk_for_fills_a_step_to_its_budget():
    belief = StepTime()
    belief.fit(traffic(300, seed=12, cost=Coefficients(0.006, 20e-6, 40e-9, 1e-9).predict, noise=0.0))
    chunk = belief.chunk_for(0.05, 4096, most=8192, decodes=64, decode_context_tokens=64_000)
    attention = chunk * (4096 + chunk / 2)
    predicted_s = belief.predict_with_margin(64 + chunk, 64, 64_000 + 4096, attention)
    assert 0.0499 < predicted_s <= 0.05
    assert belief.chunk_for(0.004, 0, most=8192) == 0
    assert belief.chunk_for(10.0, 0, most=8192) == 8192


@given(
    st.builds(Coefficients, st.just(0.0), st.floats(1e-7, 1e-3), st.floats(0.0, 1e-6), st.floats(0.0, 1e-8)),
    st.floats(0.0, 0.5),
    st.integers(0, 100_000),
    st.integers(1, 16_384),
)
def test_a_chunk_fits_and_one_token_more_would_not(costs, left_s, context, most):
    chunk = costs.chunk_for(left_s, context, most)
    assert 0 <= chunk <= most
    if chunk:
        assert costs.prefill_s(chunk, context) <= left_s * (1 + 1e-6)
    if chunk < most:
        assert costs.prefill_s(chunk + 1, context) >= left_s * (1 - 1e-6)


@pytest.mark.parametrize("bad", [{"forgetting": 0.1}, {"margin_quantile": 1.5}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        StepTime(**bad)
