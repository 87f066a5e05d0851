"""Mooncake traces (github.com/kvcache-ai/Mooncake, FAST'25, Apache-2.0): conversation, tool-agent, synthetic.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, …]}

Times are milliseconds. `hash_ids` name the prompt's blocks of 512 tokens, each by all the text up to its end;
the last may be part of a block, which no cache can share, so only full blocks count as prefix. The field may
be absent: then no prefix is known.
"""

import orjson

from headway.workload.traces.reading import Lines, TraceFormat, TraceRows, length, seconds

__all__ = ["BLOCK_TOKENS", "FORMAT"]

BLOCK_TOKENS = 512


def _likeness(first_line: str) -> float:
    # The one format of JSON lines: a first row that is broken is better named than called unknown.
    return 1.0 if first_line.lstrip().startswith("{") else 0.0


def _read(lines: Lines) -> TraceRows:
    rows = TraceRows(BLOCK_TOKENS)
    for line in lines:
        if line.isspace():
            continue
        time_s, prompt_tokens, output_tokens, blocks = _row(line)
        rows.append(time_s, prompt_tokens, output_tokens, blocks[: prompt_tokens // BLOCK_TOKENS])
    return rows


def _row(line: str) -> tuple[float, int, int, tuple[int, ...]]:
    try:
        row = orjson.loads(line)
    except ValueError:
        raise ValueError("not a JSON object") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return (
        seconds(_text(row, "timestamp"), "timestamp") / 1000.0,
        length(_text(row, "input_length"), "input_length"),
        length(_text(row, "output_length"), "output_length"),
        _blocks(row.get("hash_ids", [])),
    )


def _text(row: dict[str, object], key: str) -> str:
    """Return a value as text, to be parsed as the CSV formats' cells are."""
    if key not in row:
        raise ValueError(f"no {key!r} (found {', '.join(row) or 'nothing'})")
    return str(row[key])


def _blocks(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise ValueError("hash_ids must be a list of whole numbers")
    return tuple(ids)


FORMAT = TraceFormat(
    "Mooncake",
    '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}',
    _likeness,
    _read,
)
