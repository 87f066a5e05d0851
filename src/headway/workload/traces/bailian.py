"""Alibaba's Bailian traces (github.com/alibaba-edu/qwen-bailian-usagetraces-anon): chats with Qwen models.

    {"chat_id": 0, "parent_chat_id": -1, "timestamp": 0.1, "input_length": 36, "output_length": 5,
     "type": "text", "turn": 1, "hash_ids": [0, 1, 2]}

The keys of Mooncake's and more, but times are seconds, and a hash names a block of 16 tokens.
"""

from headway.workload.traces.json_lines import read_rows
from headway.workload.traces.reading import Lines, TraceFormat, TraceRows

__all__ = ["FORMAT"]


def _likeness(first_line: str) -> float:
    is_json = first_line.lstrip().startswith("{")
    return 1.0 if is_json and '"chat_id"' in first_line and '"hash_ids"' in first_line else 0.0


def _read(lines: Lines) -> TraceRows:
    return read_rows(lines, usual_tokens=16, second=1.0)


FORMAT = TraceFormat(
    "Bailian",
    '{"chat_id": 0, "timestamp": 0.1, "input_length": 36, "output_length": 5, "hash_ids": [0, 1, 2]}',
    _likeness,
    _read,
)
