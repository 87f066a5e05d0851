"""Finds out how many tokens a request had, from the end of its answer and without reading the rest.

A stream is not parsed: its events are counted, and only the last two pieces are looked at, once, for the
`usage` that engines send there when the client asks for it.
"""

from typing import NamedTuple

import msgspec

__all__ = ["Tail", "Usage", "usage_of"]


class Usage(NamedTuple):
    """Tokens of a request; None: not told."""

    prompt_tokens: int | None
    output_tokens: int | None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_answer = msgspec.json.Decoder(_Answer)
_nothing = Usage(None, None)


def usage_of(body: bytes) -> Usage:
    """Read the `usage` of a JSON answer."""
    try:
        usage = _answer.decode(body).usage
    except msgspec.DecodeError:
        return _nothing
    return _nothing if usage is None else Usage(usage.prompt_tokens, usage.completion_tokens)


class Tail:
    """Follows a stream. `add` is on the hot path."""

    __slots__ = ("_before", "_last", "events")

    def __init__(self) -> None:
        self.events = 0
        self._before = b""
        self._last = b""

    def add(self, chunk: bytes) -> None:
        """Note a piece."""
        self.events += chunk.count(b"\n\n")
        self._before, self._last = self._last, chunk

    @property
    def complete(self) -> bool:
        """Whether the stream said that it is over."""
        return b"[DONE]" in (self._before + self._last)[-64:]

    def usage(self) -> Usage:
        """Return what the last events tell, else the events counted as tokens (less the closing one)."""
        for line in reversed((self._before + self._last)[-65536:].split(b"\n")):
            if b'"usage"' in line and line.startswith(b"data:"):
                told = usage_of(line[5:].strip())
                if told.output_tokens is not None:
                    return told
        return Usage(None, max(0, self.events - self.complete))
