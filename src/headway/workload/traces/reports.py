"""Recognise files that are no traces but reports of benchmarks, which people take for traces."""

import orjson

from headway.workload.traces.reading import Lines

__all__ = ["name_report"]

#: Only so much of a file is read to find out what it is.
_MOST_CHARACTERS = 256 << 20


def name_report(first_line: str, lines: Lines) -> str | None:
    """Return what a JSON document is that is no trace; None for JSON lines, and for what is no JSON.

    Reads the lines only if the first one is the beginning of a document.
    """
    if not first_line.lstrip().startswith("{"):
        return None
    document = _parse(first_line)
    if document is None:
        document = _parse(_rest(lines))
        if document is None:
            return None
    elif "timestamp" in document or "benchmarks" not in document:
        return None
    if isinstance(document.get("benchmarks"), list):
        return "this is a guidellm benchmark report, not a trace"
    return "this is one JSON document, not a trace of one JSON object per line"


def _rest(lines: Lines) -> str:
    parts: list[str] = []
    size = 0
    for line in lines:
        parts.append(line)
        size += len(line)
        if size > _MOST_CHARACTERS:
            return ""
    return "".join(parts)


def _parse(text: str) -> dict[str, object] | None:
    try:
        value = orjson.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
