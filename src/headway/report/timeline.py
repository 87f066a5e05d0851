"""Passes as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing: a process per instance, a thread per
rank.

The format is Chrome's trace events: complete events (`ph: X`) with microsecond times, counters (`ph: C`) of
the chunk's use, and metadata (`ph: M`) with names.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from headway.report.metrics import PassRecord

__all__ = ["perfetto", "write_perfetto"]


def perfetto(timelines: Mapping[str, Sequence[PassRecord]]) -> dict[str, Any]:
    """Return the trace of several runs, keyed by label; times count from the earliest pass of each."""
    events: list[dict[str, Any]] = []
    processes = 0
    for label, passes in timelines.items():
        origin_s = min((p.start_s for p in passes), default=0.0)
        for instance in dict.fromkeys(p.instance for p in passes):
            processes += 1
            mine = [p for p in passes if p.instance == instance]
            events += _names(processes, f"{label}: {instance}", mine)
            for record in mine:
                events += _pass_events(processes, record, origin_s)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_perfetto(timelines: Mapping[str, Sequence[PassRecord]], path: Path) -> None:
    """Write the trace to a file."""
    path.write_bytes(orjson.dumps(perfetto(timelines)))


def _names(pid: int, name: str, passes: Sequence[PassRecord]) -> list[dict[str, Any]]:
    ranks = sorted({p.first_rank + i for p in passes for i in range(len(p.prefill_tokens))})
    threads = [_metadata("thread_name", pid, rank, {"name": f"rank {rank}"}) for rank in ranks]
    order = _metadata("process_sort_index", pid, 0, {"sort_index": pid})
    return [_metadata("process_name", pid, 0, {"name": name}), order, *threads]


def _metadata(kind: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _pass_events(pid: int, record: PassRecord, origin_s: float) -> Iterable[dict[str, Any]]:
    start_us = round((record.start_s - origin_s) * 1e6, 1)
    duration_us = round((record.end_s - record.start_s) * 1e6, 1)
    for rank, (tokens, decodes) in enumerate(zip(record.prefill_tokens, record.decodes, strict=True)):
        used = tokens / record.chunk_tokens
        yield {
            "ph": "X",
            "name": _what(tokens, decodes),
            "cat": record.role,
            "pid": pid,
            "tid": record.first_rank + rank,
            "ts": start_us,
            "dur": duration_us,
            "args": {"prefill_tokens": tokens, "decodes": decodes, "chunk_used": round(used, 4)},
        }
    used = sum(record.prefill_tokens) / (record.chunk_tokens * len(record.prefill_tokens))
    name = f"chunk used, ranks from {record.first_rank}" if record.first_rank else "chunk used"
    for at_us, value in ((start_us, round(used, 4)), (start_us + duration_us, 0)):
        yield {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": at_us, "args": {"used": value}}


def _what(tokens: int, decodes: int) -> str:
    if tokens and decodes:
        return f"mixed: {tokens} + {decodes} decodes"
    if tokens:
        return f"prefill: {tokens}"
    return f"decode: {decodes}" if decodes else "bubble"
