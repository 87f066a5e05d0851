"""Reads what an answer reports of its tokens, and what one event of a stream holds.

Known are the formats of chat and text completions (vLLM, SGLang), Anthropic's messages, OpenAI's responses,
and SGLang's `/generate`.
"""

import re
from contextlib import suppress
from enum import Enum, auto
from typing import Annotated, NamedTuple

import msgspec

__all__ = ["EventKind", "Usage", "error_status", "event_data", "kind_of", "usage_of"]

#: Larger answers are searched for their usage, not decoded: that would stop the event loop.
MOST_DECODED_BYTES = 256 << 10
#: More tokens than these are an engine's mistake.
MOST_TOKENS = 1 << 31

Field = msgspec.Raw | msgspec.UnsetType
_ABSENT = msgspec.UNSET
_EMPTY = (b"", b"null", b'""', b"[]", b"{}")


class Usage(NamedTuple):
    """Tokens of a request; None: not reported."""

    prompt_tokens: int | None
    output_tokens: int | None


class EventKind(Enum):
    """What an event of a stream holds."""

    #: Output that a client can see, or the token ids or log probabilities of some.
    TOKEN = auto()
    #: An empty text: a token whose text is not whole yet, or the one that ends the output.
    EMPTY = auto()
    #: The end of a choice, without any output.
    END = auto()
    #: No output: a role, usage, the beginning of an item, `[DONE]`.
    OTHER = auto()
    ERROR = auto()


class _Counts(msgspec.Struct):
    prompt_tokens: Field = _ABSENT
    completion_tokens: Field = _ABSENT
    input_tokens: Field = _ABSENT
    output_tokens: Field = _ABSENT


class _Within(msgspec.Struct):
    usage: Field = _ABSENT


class _Answer(msgspec.Struct):
    usage: Field = _ABSENT
    meta_info: Field = _ABSENT
    response: Field = _ABSENT
    message: Field = _ABSENT


class _Delta(msgspec.Struct):
    """A piece of a message: of a chat, or of Anthropic's (`text`, `thinking`, `partial_json`)."""

    role: Field = _ABSENT
    content: Field = _ABSENT
    reasoning: Field = _ABSENT
    reasoning_content: Field = _ABSENT
    refusal: Field = _ABSENT
    tool_calls: Field = _ABSENT
    function_call: Field = _ABSENT
    text: Field = _ABSENT
    thinking: Field = _ABSENT
    partial_json: Field = _ABSENT


class _Choice(msgspec.Struct):
    delta: Field = _ABSENT
    text: Field = _ABSENT
    token_ids: Field = _ABSENT
    logprobs: Field = _ABSENT
    finish_reason: Field = _ABSENT


class _Event(msgspec.Struct):
    choices: Field = _ABSENT
    error: Field = _ABSENT
    object: Field = _ABSENT
    type: Field = _ABSENT
    delta: Field = _ABSENT
    text: Field = _ABSENT
    output_ids: Field = _ABSENT
    code: Field = _ABSENT


class _PlainCounts(msgspec.Struct, gc=False):
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, lt=MOST_TOKENS)]
    completion_tokens: Annotated[int, msgspec.Meta(ge=0, lt=MOST_TOKENS)]


class _PlainAnswer(msgspec.Struct):
    """What nearly every answer looks like: usage with sound numbers."""

    usage: _PlainCounts


_plain = msgspec.json.Decoder(_PlainAnswer)
_counts = msgspec.json.Decoder(_Counts)
_within = msgspec.json.Decoder(_Within)
_answer = msgspec.json.Decoder(_Answer)
_delta = msgspec.json.Decoder(_Delta)
_choices = msgspec.json.Decoder(list[_Choice])
_event = msgspec.json.Decoder(_Event)
_nothing = Usage(None, None)
_COUNT = re.compile(rb'"(prompt|input|completion|output)_tokens"\s*:\s*(\d{1,10})\b')


def usage_of(body: bytes) -> Usage:
    """Read the usage of a JSON answer, of the end of one, or of an event. Impossible counts are left out."""
    if len(body) > MOST_DECODED_BYTES:
        return _usage_at_the_end(body)
    with suppress(msgspec.DecodeError, RecursionError):
        counts = _plain.decode(body).usage
        return Usage(counts.prompt_tokens, counts.completion_tokens)
    try:
        answer = _answer.decode(body)
        for holder in (answer.response, answer.message):
            if not isinstance(holder, msgspec.UnsetType) and holder:
                inner = _within.decode(holder)
                if _given(inner.usage):
                    return _read_counts(inner.usage)
        return _read_counts(answer.usage if _given(answer.usage) else answer.meta_info)
    except (msgspec.DecodeError, RecursionError):
        return _usage_at_the_end(body)


def _read_counts(field: Field) -> Usage:
    if isinstance(field, msgspec.UnsetType):
        return _nothing
    counts = _counts.decode(field)
    return Usage(
        _count(counts.prompt_tokens if _given(counts.prompt_tokens) else counts.input_tokens),
        _count(counts.completion_tokens if _given(counts.completion_tokens) else counts.output_tokens),
    )


def _usage_at_the_end(body: bytes) -> Usage:
    """Search the end of a large answer: engines write the usage behind the output."""
    at = max(body.rfind(b'"usage"'), body.rfind(b'"meta_info"'))
    if at < 0:
        return _nothing
    found = {name: int(count) for name, count in _COUNT.findall(body[at : at + 4096])}
    return Usage(found.get(b"prompt", found.get(b"input")), found.get(b"completion", found.get(b"output")))


def _count(field: Field) -> int | None:
    raw = b"" if isinstance(field, msgspec.UnsetType) else bytes(field)
    value = int(raw) if raw.isdigit() and len(raw) <= 10 else -1
    return value if 0 <= value < MOST_TOKENS else None


def event_data(events: bytes) -> list[bytes]:
    """Return the data of whole events, whatever ends their lines."""
    if b"\r" in events:
        events = events.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return [line[5:].strip() for line in events.split(b"\n") if line.startswith(b"data:")]


def kind_of(data: bytes) -> EventKind:
    """Return what an event holds. One that cannot be read may be a token."""
    if data == b"[DONE]":
        return EventKind.OTHER
    try:
        event = _event.decode(data)
        if _given(event.error) or _text(event.object) == b'"error"':
            return EventKind.ERROR
        if not isinstance(event.choices, msgspec.UnsetType):
            return _most_of([_kind_of_choice(choice) for choice in _choices.decode(event.choices)])
        if _given(event.type):
            return _kind_of_typed(_text(event.type)[1:-1], event)
        if _text(event.text) or _text(event.output_ids):  # SGLang's /generate
            return EventKind.TOKEN if _given(event.text) or _given(event.output_ids) else EventKind.EMPTY
    except (msgspec.DecodeError, RecursionError):
        pass
    return EventKind.TOKEN


def error_status(data: bytes) -> int:
    """Return the HTTP status that an error event names, else 502."""
    try:
        event = _event.decode(data)
        error = event.error if _given(event.error) else msgspec.Raw(data)
        code = _count(_event.decode(_text(error)).code)
    except (msgspec.DecodeError, RecursionError):
        code = None
    return code if code is not None and 400 <= code < 600 else 502


def _kind_of_choice(choice: _Choice) -> EventKind:
    delta = _Delta() if isinstance(choice.delta, msgspec.UnsetType) else _decode_delta(choice.delta)
    fields = (choice.text, choice.token_ids, *_output(delta))
    if any(map(_given, fields)) or _has_logprobs(choice.logprobs):
        return EventKind.TOKEN
    empty = any(_text(field) not in (b"", b"null") for field in fields)
    if empty and not _given(delta.role):  # with the role, an empty text is none
        return EventKind.EMPTY
    return EventKind.END if _given(choice.finish_reason) else EventKind.OTHER


def _kind_of_typed(name: bytes, event: _Event) -> EventKind:
    """Return the kind of an event of Anthropic's messages or OpenAI's responses."""
    if name in (b"error", b"response.failed"):
        return EventKind.ERROR
    if name in (b"message_stop", b"response.completed", b"response.incomplete"):
        return EventKind.END
    if not name.endswith(b"delta") or name == b"message_delta":
        return EventKind.OTHER
    if _text(event.delta)[:1] == b'"':
        return EventKind.TOKEN if _given(event.delta) else EventKind.EMPTY
    delta = _Delta() if isinstance(event.delta, msgspec.UnsetType) else _decode_delta(event.delta)
    return EventKind.TOKEN if any(map(_given, _output(delta))) else EventKind.EMPTY


def _most_of(kinds: list[EventKind]) -> EventKind:
    """Return what an event with several choices counts as."""
    for kind in (EventKind.TOKEN, EventKind.EMPTY, EventKind.END):
        if kind in kinds:
            return kind
    return EventKind.OTHER


def _decode_delta(field: msgspec.Raw) -> _Delta:
    return _Delta() if bytes(field) == b"null" else _delta.decode(field)


def _output(delta: _Delta) -> tuple[Field, ...]:
    """Return the fields of a delta that hold output."""
    return (
        delta.content,
        delta.reasoning,
        delta.reasoning_content,
        delta.refusal,
        delta.tool_calls,
        delta.function_call,
        delta.text,
        delta.thinking,
        delta.partial_json,
    )


def _has_logprobs(field: Field) -> bool:
    raw = _text(field)
    return raw not in _EMPTY and b'"token' in raw


def _given(field: Field) -> bool:
    """Whether a field holds more than nothing."""
    return not isinstance(field, msgspec.UnsetType) and bytes(field) not in _EMPTY


def _text(field: Field) -> bytes:
    return b"" if isinstance(field, msgspec.UnsetType) else bytes(field)
