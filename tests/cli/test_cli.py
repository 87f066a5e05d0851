"""What a person sees: help, tables, files, one line for an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import headway
from headway.cli import app, simulate
from headway.core.batch import batch_policies
from headway.core.cluster import cluster_policies
from headway.model.presets import PRESETS, load_cluster

SMALL = ["--cluster", "llama8b-h100", "--requests", "30", "--workers", "1"]


def headway_(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160", "NO_COLOR": "1"})


def test_a_comparison_is_a_table_per_load():
    result = headway_("compare", *SMALL, "--policies", "pab,round-robin", "--load", "0.3,0.6")
    assert result.exit_code == 0
    assert "load 0.3 ·" in result.stdout and "load 0.6 ·" in result.stdout
    assert "pab" in result.stdout and "nominal capacity" in result.stdout


def test_files_are_written_and_said_to_be(tmp_path: Path):
    files = [tmp_path / name for name in ("a.json", "a.html", "t.json")]
    options = [
        x for pair in zip(("--json", "--html", "--timeline"), map(str, files), strict=True) for x in pair
    ]
    result = headway_("compare", *SMALL, "--load", "0.5", "--policies", "round-robin", *options)
    assert result.exit_code == 0
    assert json.loads(files[0].read_text())["schema"] == "headway.compare/1"
    assert files[1].read_text().startswith("<!doctype html>")
    assert json.loads(files[2].read_text())["traceEvents"]
    assert all(file.name in result.stdout for file in files)


def test_capacity_is_a_table_and_a_document(tmp_path: Path):
    out = tmp_path / "c.json"
    options = ["--policies", "random", "--seeds", "1", "--tolerance", "0.5", "--json", str(out)]
    result = headway_("capacity", *SMALL, *options)
    assert result.exit_code == 0
    assert "highest rate with 99.0% of requests in time" in result.stdout
    assert json.loads(out.read_text())["schema"] == "headway.capacity/1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--policies", "stagered"], "did you mean 'staggered'"),
        (["compare", "--cluster", "none"], "none"),
        (["compare", "--load", "0.5,x"], "--load: 'x' is not a number"),
        (["compare", "--load", "0.5", "--rps", "1"], "not both"),
        (["compare", "--trace", "none.csv"], "none.csv"),
        (["compare", "--json", "no/such/dir/a.json"], "there is no directory 'no/such/dir'"),
        (["capacity", "--metric", "x"], "metric must be slo or envelope"),
        (["policies", "stagered"], "did you mean 'staggered'"),
        (["presets", "dsv3"], "dsv3"),
        (["presets", "--toml"], "headway presets NAME --toml"),
        (["compare", "--seeds", "x"], "--seeds"),
        (["comparee"], "comparee"),
        (["calibrate", "none.csv"], "none.csv"),
        (["calibrate", "none.csv", "--where", "model"], "'model' is not column=text"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments: list[str], message: str):
    result = headway_(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch):
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(headway, "compare", interrupted)
    result = headway_("compare")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_markup_in_an_error_is_shown_as_it_is():
    assert "'[bold]'" in headway_("compare", "--policies", "[bold]").stderr


def test_every_policy_is_listed():
    listing = headway_("policies").stdout
    for name in (*cluster_policies.names(), *batch_policies.names()):
        assert name in listing


def test_a_policy_is_explained_with_units_and_defaults():
    text = headway_("policies", "stall-free").stdout
    assert "token_budget" in text and "tokens" in text and "512" in text


def test_a_name_of_both_families_is_explained_in_both():
    text = headway_("policies", "triage").stdout
    assert "cluster policy" in text and "batch policy" in text


def test_every_preset_is_listed_and_shown_with_its_source():
    listing = headway_("presets").stdout
    assert all(name in listing for name in PRESETS)
    shown = headway_("presets", "dsv3-h200-pd").stdout
    assert "aiconfigurator" in shown and "sync_token_s" in shown


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_printed_as_toml_is_the_same_cluster_again(name: str, tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text(headway_("presets", name, "--toml").stdout)
    assert load_cluster(str(file)) == PRESETS[name]


def test_kv_blocks_of_a_printed_preset_follow_its_memory(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text(
        headway_("presets", "llama8b-h100", "--toml").stdout.replace(
            "gpu_memory_gb = 80.0", "gpu_memory_gb = 141.0"
        )
    )
    assert load_cluster(str(file)).pools[0].kv_blocks > PRESETS["llama8b-h100"].pools[0].kv_blocks


def test_the_version_is_told():
    assert headway_("--version").stdout == f"headway {headway.__version__}\n"


def test_calibration_reports_by_regime_and_prints_toml(tmp_path: Path):
    rows = "".join(f"{n},{n * 10},{0.01 + n * 1e-5}\n" for n in range(1, 200, 5))
    table = tmp_path / "steps.csv"
    table.write_text("new_tokens,context_tokens,duration_s\n" + rows)
    result = headway_("calibrate", str(table))
    assert result.exit_code == 0
    assert "decode" in result.stdout and "95% of steps within" in result.stdout
    assert '[pools.costs]\nform = "dense"\n' in result.stdout


@pytest.mark.parametrize("command", ["compare", "capacity", "policies", "presets", "calibrate", "demo"])
def test_help_teaches_by_example(command: str):
    text = headway_(command, "--help").stdout
    assert "Examples" in text
    assert f"headway {command}" in text


def test_without_a_command_help_is_shown():
    assert "compare" in headway_().output


def test_the_demo_writes_page_picture_and_timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    smaller = [(title, options | {"load": [0.5, 0.8]}) for title, options in simulate._DEMO[:1]]
    smaller[0][1]["policies"] = ["staggered", "round-robin"]
    monkeypatch.setattr(simulate, "_DEMO", smaller)
    result = headway_("demo", "--out", str(tmp_path / "out"), "--requests", "8", "--workers", "1")
    assert result.exit_code == 0, result.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "report.html",
        "demo.png",
        "timeline.json",
    }


def test_the_command_finds_policies_in_the_working_directory(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from headway.core.cluster import Immediate\n"
        "class First(Immediate):\n"
        "    def _choose(self, request, ranks):\n"
        "        return ranks[0]\n"
    )
    arguments = ["compare", "--batch", "vllm-v1", *SMALL, "--policies", "mine:First", "--load", "0.3"]
    code = "from headway.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "First" in done.stdout
    assert done.stderr == ""  # no progress bar where there is no terminal
