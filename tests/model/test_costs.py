"""Step times by hand, and against the measured tables when they are at hand."""

import csv
import os
from pathlib import Path

import pytest

from headway.core.errors import ConfigError
from headway.model.costs import DenseCosts, LockstepCosts, PhaseCosts
from headway.model.fits import FITTED

SHARED = Path(os.environ.get("HEADWAY_SHARED", Path(__file__).parents[3] / "shared"))
CALIBRATION = SHARED / "calibration"

needs_tables = pytest.mark.skipif(not CALIBRATION.is_dir(), reason="measured tables not at hand")

LOCKSTEP = LockstepCosts(
    prefill=PhaseCosts(0.010, 0.001, attention_s=1e-6, sync_fixed_s=0.100, sync_token_s=0.010),
    decode=PhaseCosts(0.005, 0.002, context_token_s=1e-5, sync_fixed_s=0.020, sync_token_s=0.004),
)


def test_lockstep_decode_waits_for_the_slowest_rank_and_shares_the_experts():
    # locals: 5 ms + 2·2 + 0.01·100 = 10 ms; 5 + 2·4 + 0.01·50 = 13.5 ms. sync: 20 ms + 4·mean(2, 4).
    assert LOCKSTEP.decode_step_s([2, 4], [100, 50]) == pytest.approx(0.0135 + 0.032)


def test_lockstep_prefill_by_hand():
    # locals: 10 + 6 + 0.018 ms and an idle rank; sync: 100 ms + 10·mean(6, 0).
    assert LOCKSTEP.step_s([6, 0], [0, 0], [0, 0], [18.0, 0.0]) == pytest.approx(0.016018 + 0.130)


def test_sync_over_the_maximum_is_a_choice():
    costs = LockstepCosts(LOCKSTEP.prefill, LOCKSTEP.decode, sync_over="max")
    assert costs.decode_step_s([2, 4], [0, 0]) == pytest.approx(0.013 + 0.036)


def test_mixed_pass_is_prefill_plus_the_context_of_its_decodes():
    # rank 0: 10 ms + 1·(6 + 2) + 0.01·100 + 0.018; rank 1 only decodes: 5 + 2·1; sync: 100 + 10·mean(8, 1).
    seconds = LOCKSTEP.step_s([6, 0], [2, 1], [100, 0], [18.0, 0.0])
    assert seconds == pytest.approx(0.019018 + 0.145)


def test_mixed_coefficients_of_ones_own():
    mixed = PhaseCosts(1.0, 0.0, sync_fixed_s=2.0)
    costs = LockstepCosts(LOCKSTEP.prefill, LOCKSTEP.decode, mixed)
    assert costs.step_s([6], [2], [0], [0.0]) == 3.0


def test_dense_knee_by_hand():
    costs = DenseCosts(0.010, 4, 0.001, 0.003, 1e-5, 1e-6)
    assert costs.decode_step_s([3], [100]) == pytest.approx(0.010 + 0.003 + 0.001)
    assert costs.step_s([6], [2], [100], [50.0]) == pytest.approx(0.010 + 0.004 + 0.012 + 0.001 + 0.00005)


def test_decodes_beyond_their_knee_cost_more_than_their_token():
    costs = DenseCosts(0.010, 0, 0.001, 0.001, 0.0, 0.0, decode_knee=4, decode_s=0.0005)
    assert costs.decode_step_s([4], [100]) == pytest.approx(0.010 + 0.004)
    assert costs.decode_step_s([6], [100]) == pytest.approx(0.010 + 0.006 + 0.001)
    assert costs.step_s([20], [6], [100], [50.0]) == pytest.approx(0.010 + 0.026 + 0.001)
    assert costs.step_s([20], [0], [0], [50.0]) == pytest.approx(0.010 + 0.020)


def test_the_fast_way_equals_the_general_one():
    for costs in FITTED.values():
        assert costs.decode_step_s([5, 9], [700, 20]) == pytest.approx(
            costs.step_s([0, 0], [5, 9], [700, 20], [0.0, 0.0])
        )


def test_negative_coefficient_is_refused():
    with pytest.raises(ConfigError, match="token_s must be a number of at least 0, got -1"):
        PhaseCosts(0.0, -1.0)


@needs_tables
@pytest.mark.parametrize(
    ("name", "model", "system", "error"),
    [
        ("llama8b-h100", "meta-llama/Meta-Llama-3.1-8B", "h100_sxm", 0.023),
        ("llama8b-a100", "meta-llama/Meta-Llama-3.1-8B", "a100_sxm", 0.018),
        ("qwen3-8b-h100", "Qwen/Qwen3-8B", "h100_sxm", 0.031),
        ("qwen3-8b-a100", "Qwen/Qwen3-8B", "a100_sxm", 0.019),
    ],
)
def test_dense_steps_are_met_within_the_error_of_the_fit(name, model, system, error):
    errors = []
    for row in rows("dense_steps.csv", model=model, system=system, tp="1"):
        if not row["backend"].startswith("vllm"):
            continue
        # K is the context of decodes; the table's prefill rows put the prompts' own there, which Q has.
        context = 0.0 if row["phase"] == "prefill" else float(row["K"])
        seconds = FITTED[name].step_s([float(row["new_tokens"])], [0], [context], [float(row["Q"])])
        errors.append(abs(seconds / (float(row["ms"]) / 1e3) - 1))
    assert len(errors) == 282
    assert sum(errors) / len(errors) == pytest.approx(error, abs=0.0006)


@needs_tables
@pytest.mark.parametrize("ep", [8, 16, 32, 64])
@pytest.mark.parametrize("system", ["h100", "h200"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_lockstep_steps_are_met_with_all_ranks_equal(system, ep, phase):
    costs, errors = FITTED[f"dsv3-{system}-ep{ep}"], []
    for row in rows("dsv3_sglang_steps.csv", phase=phase, system=f"{system}_sxm", ep=str(ep), eplb="1"):
        tokens, batch = float(row["tokens_per_rank"]), float(row["batch_per_rank"])
        context = float(row["prefix"])
        if phase == "decode":
            seconds = costs.decode_step_s([batch], [batch * context])
        else:
            attention = tokens * (context + tokens / batch / 2)
            seconds = costs.step_s([tokens], [0], [0], [attention])
        errors.append(abs(seconds / (float(row["total_ms"]) / 1e3) - 1))
    assert sum(errors) / len(errors) < 0.11  # operators below 16 tokens a rank are off most


def rows(name, **match):
    with (CALIBRATION / name).open() as file:
        return [row for row in csv.DictReader(file) if all(row[key] == want for key, want in match.items())]
