"""Steps of a real scheduler in a file, in literal times."""

import csv

import pytest

pytest.importorskip("vllm")

from scheduler_kit import Bench

from headway.core.errors import ConfigError
from headway.hosts.vllm import AsyncFairScheduler, FairScheduler
from headway.model.calibration import read_steps


def recorded(path):
    with path.open() as file:
        return [
            (row["phase"], *(float(row[name]) for name in list(row) if name not in ("phase", "ended_s")))
            for row in csv.DictReader(file)
        ]


def test_stock_steps_are_recorded_as_calibrate_wants_them(tmp_path, clock):
    path = tmp_path / "steps.csv"
    bench = Bench(tmp_path, FairScheduler, headway={"policy": "vllm-v1", "steps": str(path)}, tokens=256)
    bench.add(300, 12, name="a")
    for step in range(12 + 1):
        if step == 2:
            bench.add(100, 1, name="b")
        clock.s += 0.01 if step else 0.0  # the host
        output = bench.schedule()
        clock.s += 0.2
        bench.finish(output)
    bench.close()
    rows = recorded(path)
    # tokens, decodes, context of decodes and of prompts, attention, duration, and the host's part of it
    assert rows[:5] == [
        ("prefill", 256, 0, 0, 0, 256 * 128, 0.2, 0.0),
        ("prefill", 44, 0, 0, 256, 44 * (256 + 22), 0.21, 0.01),
        ("mixed", 101, 1, 300, 0, 100 * 50, 0.21, 0.01),
        ("decode", 1, 1, 301, 0, 0, 0.21, 0.01),
        ("decode", 1, 1, 302, 0, 0, 0.21, 0.01),
    ]
    assert len(rows) == 13
    assert [step.context_tokens for step in read_steps(path)][:4] == [0, 0, 300, 301]


def test_a_step_scheduled_while_another_runs_has_no_gap(tmp_path, clock):
    path = tmp_path / "steps.csv"
    bench = Bench(tmp_path, AsyncFairScheduler, headway={"policy": "vllm-v1", "steps": str(path)})
    bench.add(100, 20)
    first = bench.schedule()
    clock.s += 0.1
    second = bench.schedule()
    clock.s += 0.1
    bench.finish(first)
    clock.s += 0.05
    bench.finish(second)
    bench.close()
    assert recorded(path) == [
        ("prefill", 100, 0, 0, 0, 100 * 50, 0.2, 0.0),
        ("decode", 1, 1, 100, 0, 0, 0.05, 0.0),
    ]


def test_a_path_that_cannot_be_ends_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"steps: cannot write .*: No such file or directory"):
        Bench(tmp_path, FairScheduler, headway={"steps": str(tmp_path / "none" / "steps.csv")})
