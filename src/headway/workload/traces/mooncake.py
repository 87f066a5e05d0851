"""Mooncake traces (github.com/kvcache-ai/Mooncake, FAST'25, Apache-2.0): conversation, tool-agent, synthetic.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, …]}

Times are milliseconds. A hash names a block of 512 tokens; other tools write the same keys with other block
sizes (vLLM's replays: 16), which is recognised by the number of hashes.
"""

from headway.workload.traces.json_lines import read_rows
from headway.workload.traces.reading import Lines, TraceFormat, TraceRows

__all__ = ["FORMAT"]


def _likeness(first_line: str) -> float:
    # A first row of JSON that is broken is better named than called unknown.
    return 0.9 if first_line.lstrip().startswith("{") else 0.0


def _read(lines: Lines) -> TraceRows:
    return read_rows(lines, usual_tokens=512, second=1000.0)


FORMAT = TraceFormat(
    "Mooncake",
    '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}',
    _likeness,
    _read,
)
