"""The documents and records that commands give back."""

import json
from dataclasses import replace

import pytest

from headway.report.results import Comparison, combinations, is_baseline, short_name

RUN_KEYS = {
    "policy", "batch", "load", "rps", "seed", "requests", "completed", "rejected", "lost",
    "ttft_s", "tpot_s", "e2e_s", "slo_attainment", "envelope_attainment", "goodput_rps",
    "throughput_tokens_s", "chunk_utilisation", "bubble", "decode_batch_imbalance", "sim_steps", "wall_s",
}  # fmt: skip


def test_the_compare_document_has_the_published_schema(comparison: Comparison):
    document = json.loads(comparison.to_json())
    assert document["schema"] == "headway.compare/1"
    assert (document["cluster"], document["workload"]) == ("small", "made-up")
    assert len(document["runs"]) == 12
    assert all(run.keys() >= RUN_KEYS for run in document["runs"])
    assert {"mean", "p50", "p90", "p95", "p99", "max"} == document["runs"][0]["ttft_s"].keys()


def test_what_is_unknown_is_null_in_json(one_run: Comparison):
    one_run.runs[0] = replace(one_run.runs[0], bubble=float("nan"), tpot_s={})
    run = json.loads(one_run.to_json())["runs"][0]
    assert run["bubble"] is None
    assert run["tpot_s"] == {}


def test_the_capacity_document_has_the_published_schema(capacities):
    document = json.loads(capacities.to_json())
    assert document["schema"] == "headway.capacity/1"
    keys = {"policy", "batch", "capacity_rps", "ci95", "slo_ttft_s", "slo_tpot_s", "attainment"}
    assert keys <= document["runs"][0].keys()
    assert document["runs"][0]["ci95"] == [11.0, 13.0]


def test_rows_are_flat_for_a_data_frame(comparison: Comparison):
    row = comparison.rows()[0]
    assert row["ttft_s.mean"] == pytest.approx(0.9)
    assert not any(isinstance(value, dict) for value in row.values())


def test_a_cell_averages_over_seeds(comparison: Comparison):
    cell = comparison.cells()[0]
    assert (cell.policy, cell.load, len(cell.runs)) == ("staggered", 0.4, 2)
    assert cell.mean("ttft_s.mean") == pytest.approx(1.35)


def test_the_best_baseline_is_never_one_of_ours(comparison: Comparison):
    assert comparison.best_baseline(8.0).policy == "least-tokens"


def test_without_baselines_there_is_no_best_one(one_run: Comparison):
    assert one_run.best_baseline(10.0) is None


@pytest.mark.parametrize(
    ("policy", "batch", "expected"),
    [
        ("round-robin", "vllm-v1", True),
        ("least-tokens", "stall-free:token_budget=2048", True),
        ("least-tokens+least-requests", "vllm-v1", True),
        ("least-tokens+iqr-lexicographic", "vllm-v1", False),
        ("round-robin", "fair", False),
        ("my.module:Own", "vllm-v1", False),
    ],
)
def test_a_baseline_is_made_of_baselines_only(policy: str, batch: str, expected: bool):
    assert is_baseline(policy, batch) is expected


def test_labels_name_only_what_differs(comparison: Comparison):
    assert comparison.label("staggered", "vllm-v1") == "staggered"
    other = replace(comparison.runs[0], batch="fair")
    both = replace(comparison, runs=[*comparison.runs, other])
    assert both.label("staggered", "fair") == "staggered · fair"
    assert combinations(both)[-1] == ("staggered", "fair")


def test_a_module_path_is_left_out_of_a_short_name():
    assert short_name("a.b:Own:hold_s=1+round-robin") == "Own:hold_s=1+round-robin"
