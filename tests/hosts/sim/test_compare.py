"""Sweeps: what is run, in which order it comes back, and what is refused before anything runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import headway
from headway.core.errors import ConfigError
from headway.hosts.sim.setup import check_policies
from headway.model.presets import load_cluster

SMALL = {"cluster": "llama8b-h100", "requests": 40, "workers": 1}


def small(**options):
    return headway.compare(
        **{**SMALL, "policies": ["round-robin"], "batch": ["vllm-v1"], "load": [0.5], **options}
    )


def test_every_combination_is_one_run_in_a_fixed_order():
    result = small(
        policies=["round-robin", "least-tokens"], batch=["vllm-v1", "stall-free"], load=[0.3, 0.6], seeds=2
    )
    got = [(run.load, run.policy, run.batch, run.seed) for run in result.runs]
    assert got == [
        (load, policy, batch, seed)
        for load in (0.3, 0.6)
        for policy in ("round-robin", "least-tokens")
        for batch in ("vllm-v1", "stall-free")
        for seed in (0, 1)
    ]


def test_nothing_is_lost():
    for run in small(load=[0.5, 2.0]).runs:
        assert run.completed + run.rejected == run.requests == 40
        assert run.lost == 0


def test_load_is_a_fraction_of_nominal_capacity():
    result = small(load=[0.5])
    assert result.runs[0].rps == pytest.approx(0.5 * result.provenance.nominal_rps)


def test_a_rate_has_no_load():
    run = small(load=None, rps=[3.0]).runs[0]
    assert (run.load, run.rps) == (None, 3.0)


def test_equal_seeds_give_equal_results_and_processes_do_not_matter():
    def without_wall(result: headway.Comparison) -> list[dict]:
        return [{k: v for k, v in row.items() if k != "wall_s"} for row in result.rows()]

    alone = small(load=[0.4, 0.8], seeds=2)
    assert json.dumps(without_wall(alone)) == json.dumps(
        without_wall(small(load=[0.4, 0.8], seeds=2, workers=2))
    )


def test_seeds_differ():
    first, second = small(seeds=2).runs
    assert first.ttft_s["mean"] != second.ttft_s["mean"]


def test_targets_replace_the_clusters_own_one_by_one():
    result = small(slo_ttft_s=0.001)
    assert result.runs[0].slo_attainment == 0.0
    assert (result.provenance.slo_ttft_s, result.provenance.slo_tpot_s) == (0.001, 0.05)


def test_timelines_are_kept_on_request_for_one_load_and_seed():
    result = small(load=[0.2, 0.8], seeds=2, timeline=True, policies=["round-robin", "random"])
    assert list(result.timelines) == ["round-robin", "random"]
    assert all(result.timelines.values())
    assert small().timelines == {}


def test_progress_counts_up_to_all():
    seen: list[tuple[int, int]] = []
    small(seeds=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_disaggregated_policies_name_one_or_two_pools():
    options = {"cluster": "dsv3-h200-pd", "requests": 30, "load": [0.3], "workers": 1}
    result = headway.compare(policies=["staggered", "least-tokens+iqr-lexicographic"], **options)
    assert [run.completed for run in result.runs] == [30, 30]
    assert [run.policy for run in result.runs] == ["staggered", "least-tokens+iqr-lexicographic"]


def test_a_script_needs_no_main_guard(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import headway\n"
        "small = dict(cluster='llama8b-h100', requests=20, policies=['round-robin'], batch=['vllm-v1'])\n"
        "r = headway.compare(**small, load=[.3, .5], workers=2)\n"
        "print(len(r.runs))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ["stagered"]}, "unknown policy 'stagered': did you mean 'staggered'"),
        ({"policies": ["round-robin:hold=1"]}, "unknown setting 'hold'"),
        ({"policies": []}, "name at least one policy"),
        ({"policies": ["random", "random"]}, "policy 'random' is named twice"),
        ({"policies": ["random+random"]}, "engines are aggregated"),
        ({"batch": ["fare"]}, "unknown batch policy 'fare': did you mean 'fair'"),
        ({"batch": ["stall-free:token_budget=0"]}, "token_budget must be at least 1"),
        ({"cluster": "lama8b-h100"}, "did you mean 'llama8b-h100'"),
        ({"workload": "azure-cod"}, "did you mean 'azure-code'"),
        ({"trace": "none.csv"}, "none.csv"),
        ({"trace": "none.csv", "workload": "azure-code"}, "a trace or a workload, not both"),
        ({"load": [0.5], "rps": [3.0]}, "load or rps, not both"),
        ({"load": [0.0]}, "load must be a positive number, got 0.0"),
        ({"load": []}, "give at least one load"),
        ({"load": None, "rps": [float("nan")]}, "rps must be a positive number"),
        ({"arrivals": "poison"}, "unknown arrivals 'poison'"),
        ({"arrivals": "gamma:-1"}, "coefficient of variation"),
        ({"requests": 0}, "requests must be at least 1"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"slo_ttft_s": -1.0}, "ttft_s must be a positive number"),
    ],
)
def test_bad_input_is_refused_before_any_simulation(
    options: dict, message: str, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a simulation was started")

    monkeypatch.setattr("headway.hosts.sim.setup.simulate", never)
    with pytest.raises(ConfigError) as caught:
        small(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_default_policies_are_fits_every_preset():
    from headway.hosts.sim.compare import default_policies
    from headway.model.presets import PRESETS

    for preset in PRESETS:
        cluster = load_cluster(preset)
        check_policies(cluster, default_policies(cluster), ["vllm-v1"])


def test_the_public_names_are_importable():
    for name in headway.__all__:
        assert getattr(headway, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compair'"):
        headway.compair  # noqa: B018


def test_a_trace_whose_first_rows_come_at_once_is_compared(tmp_path):
    trace = tmp_path / "steps.csv"
    rows = [f"{t}.0,200,5" for t in (0, 0, 0, 3, 3, 6)]
    trace.write_text("timestamp,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    result = headway.compare(trace=trace, policies=["least-tokens"], load=[0.1], workers=1)
    assert result.runs[0].completed == 6


def test_a_single_name_is_a_list_of_one():
    named = small(policies="round-robin", batch="fair")
    assert [(run.policy, run.batch) for run in named.runs] == [("round-robin", "fair")]
