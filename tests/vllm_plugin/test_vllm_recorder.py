"""Steps in a file: whole rows, whatever becomes of the disk."""

import errno
import logging
import os
from pathlib import Path

import pytest

from headway.core.errors import ConfigError
from headway.hosts.vllm import recorder as module
from headway.hosts.vllm.recorder import HEADER, Recorder, path_of_rank
from headway.hosts.vllm.settings import read
from headway.hosts.vllm.steps import Step
from headway.model.calibration import read_steps

LOG = logging.getLogger("test")


def step(prompt: int = 0, decodes: int = 0, context: int = 0, prompt_context: int = 0, attention: float = 0):
    return Step(None, 0.0, 0.0, prompt, decodes, context, prompt_context, attention)


def test_a_row_says_what_a_fit_needs(tmp_path: Path):
    recorder = Recorder(tmp_path / "steps.csv", LOG)
    recorder.note(step(decodes=3, context=600), 0.0125, 0.001, 50.0)
    recorder.note(step(100, 0, 40, 40, 9000.0), 0.05, 0.002, 50.25)
    recorder.note(step(100, 3, 640, 40, 9000.0), 0.0625, 0.0, 51.0)
    recorder.close()
    assert (tmp_path / "steps.csv").read_text() == HEADER + (
        "50.000000,decode,3,3,600,0,0.0,0.012500,0.001000\n"
        "50.250000,prefill,100,0,0,40,9000.0,0.050000,0.002000\n"
        "51.000000,mixed,103,3,600,40,9000.0,0.062500,0.000000\n"
    )
    assert recorder.lost == 0


def test_calibrate_reads_it(tmp_path: Path):
    recorder = Recorder(tmp_path / "steps.csv", LOG)
    for n in range(1, 10):
        recorder.note(step(decodes=n, context=100 * n), 0.01 + 0.001 * n, 0.002, float(n))
    recorder.close()
    read_back = read_steps(tmp_path / "steps.csv")
    assert [(each.regime, each.new_tokens, each.context_tokens) for each in read_back[:2]] == [
        ("decode", 1.0, 100.0),
        ("decode", 2.0, 200.0),
    ]


def test_a_start_makes_the_file_anew(tmp_path: Path):
    path = tmp_path / "steps.csv"
    path.write_text("of yesterday\n" * 100)
    Recorder(path, LOG).close()
    assert path.read_text() == HEADER


def test_a_full_disk_leaves_whole_rows_and_is_said_once(tmp_path: Path, monkeypatch, caplog):
    recorder = Recorder(tmp_path / "steps.csv", LOG)
    recorder.note(step(decodes=1), 0.01, 0.0, 1.0)
    recorder._write()
    room = [10]

    def write(file: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(file, data[: room.pop()])

    monkeypatch.setattr(module, "os", _Os(write))
    for second in (2.0, 3.0):
        recorder.note(step(decodes=1), 0.01, 0.0, second)
        recorder._write()
    recorder.close()
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[1].startswith("1.000000,decode,1,")
    assert recorder.lost == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"Headway records no more steps in {tmp_path / 'steps.csv'}: No space left on device"
    ]


class _Os:
    def __init__(self, write):
        self.write = write

    def __getattr__(self, name: str):
        return getattr(os, name)


def test_a_disk_that_does_not_answer_costs_rows_and_no_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_ROWS", 3)
    monkeypatch.setattr(module, "_WRITE_EVERY_S", 3600.0)
    recorder = Recorder(tmp_path / "steps.csv", LOG)
    for second in range(5):
        recorder.note(step(decodes=1), 0.01, 0.0, float(second))
    assert recorder.lost == 2
    recorder.close()
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize(("path", "why"), [("none/steps.csv", "No such file"), (".", "Is a directory")])
def test_a_path_that_cannot_be_is_one_line_at_the_start(tmp_path: Path, path: str, why: str):
    with pytest.raises(ConfigError, match=rf"^steps: cannot write '.*': {why}.*$"):
        Recorder(tmp_path / path, LOG)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_full_from_the_start_is_one_too():
    with pytest.raises(ConfigError, match="No space left on device"):
        Recorder(Path("/dev/full"), LOG)


@pytest.mark.parametrize("given", ["", ".", "/"])
def test_steps_must_name_a_file(given: str):
    with pytest.raises(ConfigError, match="headway in vLLM: steps must name a file"):
        read({"headway": {"steps": given}}, {})


def test_ranks_have_a_file_each():
    assert path_of_rank("out/steps.csv", 0) == Path("out/steps.csv")
    assert path_of_rank("out/steps.csv", 1) == Path("out/steps-1.csv")
