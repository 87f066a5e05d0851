"""The trace that Perfetto opens."""

import json
from pathlib import Path

from headway.report.results import Comparison
from headway.report.timeline import perfetto, write_perfetto


def test_a_process_per_instance_and_a_thread_per_rank(comparison: Comparison):
    events = perfetto({"staggered": comparison.timelines["staggered"]})["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "staggered: prefill-0", 2: "staggered: decode-0"}
    threads = [(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"]
    assert threads == [(1, 0), (1, 1), (2, 0)]


def test_passes_are_complete_events_in_microseconds_from_the_first(comparison: Comparison):
    events = perfetto({"x": comparison.timelines["staggered"]})["traceEvents"]
    passes = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert [(e["tid"], e["ts"], e["dur"], e["name"]) for e in passes] == [
        (0, 0.0, 500_000.0, "prefill: 100"),
        (1, 0.0, 500_000.0, "prefill: 50"),
        (0, 500_000.0, 500_000.0, "prefill: 20"),
        (1, 500_000.0, 500_000.0, "decode: 3"),
    ]
    assert passes[1]["args"] == {"prefill_tokens": 50, "decodes": 0, "chunk_used": 0.5}


def test_chunk_use_is_a_counter_that_falls_back_to_zero(comparison: Comparison):
    events = perfetto({"x": comparison.timelines["staggered"]})["traceEvents"]
    counters = [(e["ts"], e["args"]["used"]) for e in events if e["ph"] == "C" and e["pid"] == 1]
    assert counters[:2] == [(0.0, 0.75), (500_000.0, 0)]


def test_runs_do_not_share_processes(comparison: Comparison):
    events = perfetto(comparison.timelines)["traceEvents"]
    assert len({e["pid"] for e in events}) == 4


def test_the_file_is_json(comparison: Comparison, tmp_path: Path):
    write_perfetto(comparison.timelines, tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_bytes())["displayTimeUnit"] == "ms"


def test_nothing_to_show_is_an_empty_trace():
    assert perfetto({}) == {"traceEvents": [], "displayTimeUnit": "ms"}
