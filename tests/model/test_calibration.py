"""Fitting step times: exact data gives exact coefficients, bad rows are named."""

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from headway.core.errors import ConfigError
from headway.model.calibration import (
    Step,
    errors_by_regime,
    fit_hinge,
    fit_linear,
    host_gap_s,
    jitter,
    predict_s,
    read_steps,
    to_toml,
    without_gap,
)
from headway.model.costs import DenseCosts

TRUTH = DenseCosts(0.006, 448, 9e-6, 2e-5, 4e-8, 8e-10)
SHARED = Path(os.environ.get("HEADWAY_SHARED", Path(__file__).parents[3] / "shared"))


def measured(costs: DenseCosts, noise: float = 0.0) -> list[Step]:
    rng = random.Random(1)
    shapes = [
        (float(n), 0.0, n * (c + n / 2), "prefill") for n in (64, 256, 448, 1024, 4096) for c in (0, 4096)
    ]
    shapes += [(float(b), float(b * c), 0.0, "decode") for b in (1, 8, 64, 256) for c in (256, 4096)]
    shapes += [(n + 64.0, 65536.0, n * n / 2, "mixed") for n in (128, 512, 2048)]
    steps = [Step(n, k, q, 1.0, regime) for n, k, q, regime in shapes]
    times = predict_s(costs, steps)
    return [
        Step(s.new_tokens, s.context_tokens, s.attention, float(t) * (1 + rng.gauss(0, noise)), s.regime)
        for s, t in zip(steps, times, strict=True)
    ]


def csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "steps.csv"
    path.write_text(text)
    return path


ROWS = "".join(f"{n},{n * 10},0,{0.01 + n * 1e-5}\n" for n in range(1, 20))


def test_the_knee_and_all_coefficients_are_recovered():
    fit = fit_hinge(measured(TRUTH))
    assert fit.knee_tokens == 448
    assert fit.token_s == pytest.approx(TRUTH.token_s, rel=1e-6)
    assert fit.beyond_knee_token_s == pytest.approx(TRUTH.beyond_knee_token_s, rel=1e-6)
    assert fit.attention_s == pytest.approx(TRUTH.attention_s, rel=1e-6)


def test_the_knee_in_decodes_is_recovered_where_they_were_counted():
    truth = replace(TRUTH, decode_knee=5, decode_s=0.0007)
    shapes = [(n, 0.0, n * n / 2, "prefill", 0.0) for n in (64.0, 256.0, 1024.0, 4096.0)]
    shapes += [(b, b * c, 0.0, "decode", b) for b in (1.0, 3.0, 5.0, 8.0, 16.0, 32.0) for c in (256, 4096)]
    shapes += [(n + 16.0, 65536.0, n * n / 2, "mixed", 16.0) for n in (128, 512, 2048)]
    steps = [Step(n, k, q, 1.0, regime, None, d) for n, k, q, regime, d in shapes]
    times = predict_s(truth, steps)
    counted = [replace(step, duration_s=float(t)) for step, t in zip(steps, times, strict=True)]
    fit = fit_hinge(counted)
    assert (fit.knee_tokens, fit.decode_knee) == (448, 5)
    assert fit.decode_s == pytest.approx(0.0007)
    assert errors_by_regime(fit, counted)[-1].worst < 1e-6
    assert fit_hinge([replace(step, decodes=0.0) for step in counted]).decode_s == 0.0


def test_noise_is_averaged_out():
    fit = fit_hinge(measured(TRUTH, noise=0.01))
    assert fit.fixed_s == pytest.approx(TRUTH.fixed_s, rel=0.03)
    assert errors_by_regime(fit, measured(TRUTH, noise=0.01))[-1].mean < 0.02


def test_steps_that_scatter_are_fitted_in_their_mean():
    steps = [
        Step(n, 100.0 * n, 0.0, (0.010 + 0.0002 * n) * factor, "decode")
        for n in (1.0, 4.0, 16.0, 64.0)
        for factor in (0.5, 0.75, 1.0, 1.75)
    ]
    for fit in (fit_linear(steps), fit_hinge(steps)):
        assert errors_by_regime(fit, steps)[-1].bias == pytest.approx(0.0, abs=1e-6)


def test_the_linear_form_shows_its_error_by_regime():
    errors = {e.regime: e for e in errors_by_regime(fit_linear(measured(TRUTH)), measured(TRUTH))}
    assert list(errors) == ["prefill", "decode", "mixed", "all"]
    assert errors["all"].mean > 0.02
    assert errors["all"].steps == 21


def test_no_coefficient_is_negative():
    steps = [Step(float(n), float(1000 - n), 0.0, 0.01 + n * 1e-5, "decode") for n in range(1, 200)]
    fit = fit_linear(steps)
    assert min(fit.fixed_s, fit.beyond_knee_token_s, fit.context_token_s, fit.attention_s) >= 0.0


def test_the_fit_is_printed_as_a_cluster_file_has_it():
    assert to_toml(TRUTH).splitlines()[:3] == ["[pools.costs]", 'form = "dense"', "fixed_s = 0.006"]


def test_what_is_beside_the_costs_comes_before_them():
    lines = to_toml(TRUTH, host_gap_s=0.0003, jitter=0.02).splitlines()
    assert lines[:4] == ["host_gap_s = 0.0003", "jitter = 0.02", "", "[pools.costs]"]


def test_the_hosts_gap_is_taken_off_as_a_constant(tmp_path: Path):
    rows = "".join(
        f"{n},0,0,{0.010 + 0.001 * n + gap},{gap}\n" for n, gap in zip(range(1, 10), GAPS, strict=True)
    )
    steps = read_steps(csv(tmp_path, "new_tokens,context_tokens,attention,duration_s,host_gap_s\n" + rows))
    assert host_gap_s(steps) == 0.0005
    fit = fit_linear(without_gap(steps, 0.0005))
    # What of it grows with the batch, 0.1 ms a token, is in the step.
    assert fit.fixed_s == pytest.approx(0.010 - 0.0005)
    assert fit.beyond_knee_token_s == pytest.approx(0.001 + 0.0001)


GAPS = [n * 1e-4 for n in range(1, 10)]


def test_a_file_without_gaps_has_none(tmp_path: Path):
    steps = read_steps(csv(tmp_path, "new_tokens,context_tokens,attention,duration_s\n" + ROWS))
    assert host_gap_s(steps) == 0.0
    assert without_gap(steps, 0.0) == steps


def test_jitter_is_what_the_fit_leaves_over():
    assert jitter(TRUTH, measured(TRUTH)) == pytest.approx(0.0, abs=1e-9)
    assert jitter(TRUTH, measured(TRUTH, noise=0.03)) == pytest.approx(0.03, rel=0.3)


def test_a_fit_that_is_off_in_one_direction_is_biased():
    slow = [
        Step(s.new_tokens, s.context_tokens, s.attention, 1.1 * s.duration_s, s.regime)
        for s in measured(TRUTH)
    ]
    assert errors_by_regime(TRUTH, slow)[-1].bias == pytest.approx(1 / 1.1 - 1)


def test_columns_may_be_ours_or_the_calibration_tables(tmp_path: Path):
    ours = read_steps(csv(tmp_path, "new_tokens,context_tokens,attention,duration_s\n" + ROWS))
    theirs = read_steps(csv(tmp_path, "N,K,Q,ms\n" + ROWS))
    assert ours[0].duration_s == pytest.approx(1000 * theirs[0].duration_s)
    assert ours[0].regime == "decode"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("new_tokens,duration_s\n1,2\n", "no column context_tokens"),
        ("new_tokens,context_tokens,duration_s\n1,2,x\n", "row 2: duration_s must be a number, got 'x'"),
        ("new_tokens,context_tokens,duration_s\n1,-2,1\n", "row 2: context_tokens must be a finite number"),
        ("new_tokens,context_tokens,duration_s\n1,2,0\n", "row 2: the duration must be above 0"),
        ("new_tokens,context_tokens,duration_s\n1,2\n", "row 2: duration_s must be a number, got ''"),
        ("new_tokens,context_tokens,duration_s\n1,2,3\n", "at least 8 steps, found 1"),
        ("phase,new_tokens,context_tokens,duration_s\ndecoed,1,2,3\n", "did you mean 'decode'"),
    ],
)
def test_a_bad_file_is_named_with_its_row(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError) as caught:
        read_steps(csv(tmp_path, text))
    assert message in str(caught.value) and "steps.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_column_to_choose_by_is_named(tmp_path: Path):
    path = csv(tmp_path, "model,new_tokens,context_tokens,duration_s\nx,1,2,3\n")
    with pytest.raises(ConfigError, match="unknown column 'modle': did you mean 'model'"):
        read_steps(path, {"modle": "x"})


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        read_steps(tmp_path / "none.csv")


@pytest.mark.parametrize(("system", "error"), [("h100_sxm", 0.024), ("a100_sxm", 0.02)])
def test_llama_is_fitted_as_well_as_the_published_fit(system: str, error: float):
    table = SHARED / "calibration" / "dense_steps.csv"
    if not table.exists():
        pytest.skip("no calibration tables here")
    steps = read_steps(table, {"model": "Llama-3.1-8B", "system": system, "backend": "vllm", "tp": "1"})
    assert errors_by_regime(fit_hinge(steps), steps)[-1].mean < error
