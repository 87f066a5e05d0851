"""`headway sweep`: tables, files, one line for an error, and what an interruption leaves."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import headway
from headway.cli import app

SMALL = ["sweep", "--workload", "azure-conv", "--gpus", "64", "--ep", "8", "--pd", "1:1,3:1,9:1"]
SMALL += ["--load", "0.4", "--requests", "30", "--workers", "1"]


def headway_(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160", "NO_COLOR": "1"})


def test_a_sweep_is_a_table_its_ends_and_what_is_left_out():
    result = headway_(*SMALL)
    assert result.exit_code == 0, result.stderr
    assert "Pareto front" in result.stdout and "4×EP8 + 4×EP8" in result.stdout
    assert "• most goodput per GPU: " in result.stdout and "• least TTFT p99: " in result.stdout
    left_out = "left out: needs 80 GPUs, there are 64: dsv3-h200-9xep8-1xep8-c4096\n"
    assert left_out in result.stdout
    assert "nominal capacity" not in result.stdout


def test_files_are_written_and_said_to_be(tmp_path: Path):
    files = {flag: tmp_path / f"s.{flag}" for flag in ("json", "html", "png")} | {"out": tmp_path / "s.jsonl"}
    options = [text for flag, file in files.items() for text in (f"--{flag}", str(file))]
    result = headway_(*SMALL, *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(files["json"].read_text())["schema"] == "headway.sweep/1"
    assert files["html"].read_text().startswith("<!doctype html>")
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert len(files["out"].read_text().splitlines()) == 2
    assert all(file.name in result.stdout for file in files.values())


def test_the_same_line_goes_on_where_it_was(tmp_path: Path):
    options = ["--out", str(tmp_path / "s.jsonl"), "--resume"]
    first = headway_(*SMALL, *options)
    again = headway_(*SMALL, *options)
    assert first.exit_code == again.exit_code == 0
    assert first.stdout == again.stdout
    refused = headway_(*SMALL, *options[:2])
    assert refused.exit_code == 2
    assert refused.stderr == f"error: {tmp_path}/s.jsonl is there already: resume it, or name another file\n"


def test_ctrl_c_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = headway.sweep

    def interrupted(**options: object) -> None:
        bar = options["progress"]

        def stop(done: int, total: int) -> None:
            bar(done, total)
            if done == 1:
                raise KeyboardInterrupt

        whole(**options | {"progress": stop})

    monkeypatch.setattr(headway, "sweep", interrupted)
    out = tmp_path / "s.jsonl"
    result = headway_(*SMALL, "--out", str(out))
    assert result.exit_code == 130
    assert result.stderr == f"1 of 2 are in {out}: --resume goes on from there\ninterrupted\n"
    assert len(out.read_text().splitlines()) == 1


def test_flags_have_the_names_of_compare_too():
    text = headway_("sweep", "--help").stdout
    for flag in ("--policy", "--policies", "--ttft", "--slo-ttft", "--tpot", "--pd", "--resume", "--backend"):
        assert flag in text
    assert "Examples" in text and "headway sweep" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep", "8,x"], "--ep: 'x' is not a whole number; write 8,16"),
        (["--chunk", "2.5"], "--chunk: '2.5' is not a whole number"),
        (["--ep", ""], "name at least one system, EP size, P:D ratio and chunk"),
        (["--pd", "3/1"], "P:D ratio '3/1': write prefill and decode instances, such as 3:1"),
        (["--system", "h800"], "unknown system 'h800'"),
        (["--gpus", "0"], "must be at least 1"),
        (["--gpus", "8"], "none of 3 topologies can be"),
        (["--ep", "24"], "no step times are measured for EP24 on H200 (there are: EP8, EP16, EP32, EP64)"),
        (["--latency", "p99"], "unknown latency 'p99'"),
        (["--attainment", "90"], "attainment must be between 0 and 1, got 90.0"),
        (["--policy", "stagered"], "did you mean 'staggered'"),
        (["--load", "x"], "--load: 'x' is not a number"),
        (["--backend", "rey"], "did you mean 'ray'"),
        (["--address", "head:6379"], "is for the backend ray, not processes"),
        (["--resume"], "resume needs the file to go on with"),
        (["--out", "no/such/s.jsonl"], "there is no directory 'no/such'"),
        (["--out", "s.csv"], "s.csv: results are written to a file named .jsonl or .parquet"),
        (["--workers", "0"], "workers must be at least 1"),
    ],
)
def test_an_error_is_one_line_and_status_2(options: list[str], message: str):
    result = headway_(*SMALL, *options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
