"""Finds out how many tokens a request had, from the end of its answer and without reading the rest.

A stream is not parsed: its events are counted, and only the last two pieces are looked at, once, for the
`usage` that engines send there when the client asks for it.

Where there is none, the events that carry a token are the tokens of the one choice. Those that carry none
come first and last: a chat's first names the role alone; SGLang's reason to stop comes in a delta where
everything is null, while vLLM's comes with the last token, whose text may be empty; `[DONE]`.
"""

from collections.abc import Iterator
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


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice]


_answer = msgspec.json.Decoder(_Answer)
_event = msgspec.json.Decoder(_Event)
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

    __slots__ = ("_before", "_first", "_last", "events")

    def __init__(self) -> None:
        self.events = 0
        self._first = b""
        self._before = b""
        self._last = b""

    def add(self, chunk: bytes) -> None:
        """Note a piece."""
        self.events += chunk.count(b"\n\n")
        self._before, self._last = self._last, chunk
        if not self._first:
            self._first = chunk

    @property
    def complete(self) -> bool:
        """Whether the stream said that it is over."""
        return b"[DONE]" in (self._before + self._last)[-64:]

    def usage(self) -> Usage:
        """Return what the last events tell, else how many events carried a token."""
        last = list(_data((self._before + self._last)[-65536:]))
        for data in reversed(last):
            if b'"usage"' in data:
                told = usage_of(data)
                if told.output_tokens is not None:
                    return told
        return Usage(None, max(0, self.events - self.complete - self._without_token(last)))

    def _without_token(self, last: list[bytes]) -> int:
        """Count the events without a token: the first may be one, and those behind the last token are."""
        without = sum(not _has_token(data) for data in list(_data(self._first))[:1])
        for data in reversed(last):
            if data != b"[DONE]":
                if _has_token(data):
                    break
                without += 1
        return without


def _data(events: bytes) -> Iterator[bytes]:
    """Iterate over the data of whole events."""
    return (line[5:].strip() for line in events.split(b"\n")[:-1] if line.startswith(b"data:"))


def _has_token(data: bytes) -> bool:
    """Whether an event carries a token; one that cannot be read may."""
    try:
        choices = _event.decode(data).choices
    except msgspec.DecodeError:
        return True
    return any(choice.text is not None or _says(choice.delta) for choice in choices)


def _says(delta: _Delta | None) -> bool:
    if delta is None:
        return False
    said = (delta.content, delta.reasoning, delta.reasoning_content, delta.tool_calls)
    if delta.role is not None:  # with the role, an empty text is none
        return any(said)
    return any(each is not None for each in said)
