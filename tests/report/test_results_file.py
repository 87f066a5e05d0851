"""The results file: what a line says, what a torn one costs, and whose file is left alone."""

import hashlib
import json
from pathlib import Path

import pytest

from headway.core.errors import ConfigError
from headway.report.metrics import Distribution, Run
from headway.report.results_file import (
    ResultsFile,
    content_key,
    flat_record,
    run_from_record,
    run_to_record,
    write_parquet,
)

A, B = {"policy": "a", "seed": 1}, {"policy": "b", "seed": 1}


def written(path: Path) -> bytes:
    with ResultsFile(path, resume=False) as file:
        file.add(A, {"x": 1.5})
        file.add(B, {"x": 2.5})
    return path.read_bytes()


def test_a_line_says_what_it_is_of(tmp_path: Path):
    first, second = written(tmp_path / "r.jsonl").splitlines()
    assert json.loads(first) == {
        "schema": "headway.result/1",
        "key": content_key(A),
        "job": A,
        "result": {"x": 1.5},
    }
    assert json.loads(second)["job"] == B


def test_the_key_is_of_the_contents():
    assert content_key({"seed": 1, "policy": "a"}) == content_key(A)
    assert content_key(A) != content_key(B)
    assert content_key(A) == hashlib.sha256(b'{"policy":"a","seed":1}').hexdigest()[:32]


def test_results_are_found_again(tmp_path: Path):
    written(tmp_path / "r.jsonl")
    with ResultsFile(tmp_path / "r.jsonl", resume=True) as file:
        assert file.result(A) == {"x": 1.5}
        assert file.result(A | {"seed": 2}) is None


@pytest.mark.parametrize("torn", [1, 20, -1])
def test_a_torn_last_line_is_cut_off_and_written_anew(tmp_path: Path, torn: int):
    path = tmp_path / "r.jsonl"
    whole = written(path)
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + torn] if torn > 0 else whole[:torn])
    with ResultsFile(path, resume=True) as file:
        assert file.result(A) == {"x": 1.5}
        assert file.result(B) is None
        file.add(B, {"x": 2.5})
    assert path.read_bytes() == whole


def test_a_file_that_is_not_there_yet_can_be_resumed(tmp_path: Path):
    with ResultsFile(tmp_path / "r.jsonl", resume=True) as file:
        assert file.result(A) is None


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path):
    whole = written(tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match=r"r.jsonl is there already: resume it, or name another file"):
        ResultsFile(tmp_path / "r.jsonl", resume=False)
    assert (tmp_path / "r.jsonl").read_bytes() == whole


@pytest.mark.parametrize("line", ["no json", "[1]", '{"schema": "other"}', '{"schema": "headway.result/1"}'])
def test_somebody_elses_file_is_left_alone(tmp_path: Path, line: str):
    path = tmp_path / "r.jsonl"
    whole = written(path) + line.encode() + b"\n" + b"torn"
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match=r"r.jsonl: line 3 is not a result of schema headway.result/1"):
        ResultsFile(path, resume=True)
    assert path.read_bytes() == whole


def test_a_line_that_was_edited_is_refused(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(written(path).replace(b'"policy":"a"', b'"policy":"z"'))
    with pytest.raises(ConfigError, match=r"line 1 is not a result"):
        ResultsFile(path, resume=True)


def test_two_runs_do_not_share_a_file(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    with (
        ResultsFile(path, resume=False),
        pytest.raises(ConfigError, match=r"r.jsonl: another run writes to it"),
    ):
        ResultsFile(path, resume=True)


def test_other_endings_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"r.csv: results are written to a file named .jsonl or .parquet"):
        ResultsFile(tmp_path / "r.csv", resume=False)


def test_what_cannot_be_opened_says_why(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no/r.jsonl: No such file or directory"):
        ResultsFile(tmp_path / "no" / "r.jsonl", resume=False)


def test_a_run_is_the_same_when_it_is_read_again(tmp_path: Path):
    run = Run(
        policy="p", batch="b", load=None, rps=1 / 3, seed=4, requests=2, completed=1, rejected=1, lost=0,
        ttft_s={"mean": 0.1 + 0.2}, tpot_s={}, e2e_s={"p99": 1e-17}, slo_attainment=0.5,
        envelope_attainment=0.5, goodput_rps=2 / 3, throughput_tokens_s=7.0, chunk_utilisation=0.25,
        bubble=0.0, decode_batch_imbalance=1.0, sim_steps=9, wall_s=0.125, rejected_by_reason={"full": 1},
    )  # fmt: skip
    sampled = Distribution((0.1, 0.2), ())
    with ResultsFile(tmp_path / "r.jsonl", resume=False) as file:
        file.add(A, run_to_record(run, sampled))
    with ResultsFile(tmp_path / "r.jsonl", resume=True) as file:
        assert run_from_record(file.result(A)) == (run, sampled)


def test_what_is_not_known_comes_back_as_unknown(tmp_path: Path):
    record = {"bubble": None, "load": None, "distribution": {"ttft_s": [], "tpot_s": []}}
    with pytest.raises(TypeError, match="missing"):
        run_from_record(record)


def test_a_row_is_flat_and_without_lists():
    record = {
        "key": "k",
        "job": {"seed": 1},
        "result": {"ttft_s": {"mean": 0.5}, "distribution": {"ttft_s": [1]}},
    }
    assert flat_record(record) == {"key": "k", "seed": 1, "ttft_s.mean": 0.5, "failed": None}
    assert flat_record({"key": "k", "job": {"seed": 1}, "failed": "why"}) == {
        "key": "k",
        "seed": 1,
        "failed": "why",
    }


def test_parquet_without_pyarrow_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "pyarrow", None)
    monkeypatch.setitem(modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"^Parquet needs pyarrow: pip install 'headway\[parquet\]'$"):
        ResultsFile(tmp_path / "r.parquet", resume=False)
    assert list(tmp_path.iterdir()) == []


def test_parquet_has_a_row_per_line(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [
        {"key": "k1", "job": A, "result": {"x": 1.5, "ttft_s": {"mean": 0.25}}},
        {"key": "k2", "job": B, "failed": "lost 3 times"},
    ]
    write_parquet(tmp_path / "r.parquet", records)
    assert parquet.read_table(tmp_path / "r.parquet").to_pylist() == [
        {"key": "k1", "policy": "a", "seed": 1, "x": 1.5, "ttft_s.mean": 0.25, "failed": None},
        {"key": "k2", "policy": "b", "seed": 1, "x": None, "ttft_s.mean": None, "failed": "lost 3 times"},
    ]
