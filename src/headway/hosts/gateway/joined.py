"""Join the answers of several generations into the answer of one request: whole, or as one stream.

Each generation answers for one choice, as if it were the only one. Joining numbers the choices on, gives all
chunks one id, and adds up `usage`: the completion tokens of all, the prompt tokens once for each prompt.
Everything else in a choice (text, log probabilities, tool calls, reasons to stop) is copied unread.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from headway.front.errors import Refusal

__all__ = ["Choices", "EventSplitter", "join_whole"]

#: An event of a stream is not longer than this.
MOST_EVENT_BYTES = 1 << 22
DONE = b"data: [DONE]\n\n"
#: What concerns one engine alone.
_DROPPED = ("kv_transfer_params", "ec_transfer_params")

_Fields = dict[str, msgspec.Raw]
_fields = msgspec.json.Decoder(_Fields)
_choices = msgspec.json.Decoder(list[_Fields])
_usage = msgspec.json.Decoder(dict[str, Any] | None)
_encode = msgspec.json.Encoder().encode


def join_whole(answers: Sequence[bytes], *, samples: int) -> bytes:
    """Return the answers of all sequences as one. `samples`: how many there are of each prompt.

    Raises Refusal (502) when an answer is not a JSON object with choices.
    """
    try:
        parts = [_fields.decode(answer) for answer in answers]
        joined = {name: value for name, value in parts[0].items() if name not in _DROPPED}
        choices = [choice for number, part in enumerate(parts) for choice in _numbered(part, number)]
        joined["choices"] = _raw(choices)
        usage = _Usage(samples)
        for number, part in enumerate(parts):
            usage.add(number, part)
    except (msgspec.DecodeError, KeyError):
        raise _not_joinable() from None
    if usage.told:
        joined["usage"] = _raw(usage.joined())
    return _encode(joined)


class Choices:
    """Rewrite the events of several streams so that they read as one stream with several choices."""

    def __init__(self, samples: int) -> None:
        self._id: msgspec.Raw | None = None
        self._usage = _Usage(samples)
        self._last: _Fields = {}

    def event(self, number: int, event: bytes) -> bytes:
        """Return an event of stream `number` for the client; empty when it is held back until the end.

        Raises Refusal (502) for an event that reports an error, or that is no chunk of an answer.
        """
        data = _data_of(event)
        if data is None:
            return event  # a comment
        if data == b"[DONE]":
            return b""
        try:
            chunk = _fields.decode(data)
            if "error" in chunk:
                raise Refusal(502, "engine_error", "The engine failed while it answered.")
            if "choices" not in chunk:
                raise _not_joinable()
            self._id = self._id or chunk.get("id")
            choices = _numbered(chunk, number)
            if not choices:  # the usage at the end
                self._usage.add(number, chunk)
                self._last = chunk
                return b""
        except msgspec.DecodeError:
            raise _not_joinable() from None
        return self._written(chunk | {"choices": _raw(choices)})

    def end(self) -> bytes:
        """Return what ends the joined stream: the usage, if it was asked for, and the mark of the end."""
        if not self._usage.told:
            return DONE
        usage = self._last | {"choices": msgspec.Raw(b"[]"), "usage": _raw(self._usage.joined())}
        return self._written(usage) + DONE

    def _written(self, chunk: _Fields) -> bytes:
        if self._id is not None and "id" in chunk:
            chunk["id"] = self._id
        for name in _DROPPED:
            chunk.pop(name, None)
        return b"data: %b\n\n" % _encode(chunk)


class EventSplitter:
    """Cut a stream of bytes into whole server-sent events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Return the events that are whole now. Raises Refusal (502) when one is too long."""
        self._rest = (self._rest + chunk).replace(b"\r\n", b"\n")
        *events, self._rest = self._rest.split(b"\n\n")
        if len(self._rest) > MOST_EVENT_BYTES:
            raise _not_joinable()
        for event in events:
            if event.strip():
                yield event + b"\n\n"


class _Usage:
    """The tokens of all sequences together. A prompt counts once, however many samples it has."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._prompts: dict[str, Any] = {}
        self._completions: dict[str, Any] = {}
        self.told = False

    def add(self, number: int, answer: Mapping[str, msgspec.Raw]) -> None:
        """Count the usage in the answer of a sequence."""
        told = _usage.decode(answer["usage"]) if "usage" in answer else None
        if told is None:
            return
        self.told = True
        for name, value in told.items():
            of_prompt = name.startswith("prompt")
            if name == "total_tokens" or (of_prompt and number % self._samples):
                continue
            _add(self._prompts if of_prompt else self._completions, name, value)

    def joined(self) -> dict[str, Any]:
        """Return the sums, as one `usage`."""
        prompt = self._prompts.get("prompt_tokens", 0)
        completion = self._completions.get("completion_tokens", 0)
        return {**self._prompts, **self._completions, "total_tokens": prompt + completion}


def _add(total: dict[str, Any], name: str, value: Any) -> None:
    """Add a number, or the numbers in an object, to what there is."""
    if isinstance(value, dict):
        inner = total.get(name)
        inner = total[name] = inner if isinstance(inner, dict) else {}
        for each, number in value.items():
            _add(inner, each, number)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        known = total.get(name)
        total[name] = (known if isinstance(known, int | float) else 0) + value
    else:
        total.setdefault(name, value)


def _numbered(answer: Mapping[str, msgspec.Raw], number: int) -> list[_Fields]:
    """Return the choices of an answer, all with the number of its sequence."""
    choices = _choices.decode(answer["choices"])
    return [choice | {"index": msgspec.Raw(b"%d" % number)} for choice in choices]


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))


def _data_of(event: bytes) -> bytes | None:
    """Return the data of an event; None when it has none."""
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def _not_joinable() -> Refusal:
    return Refusal(502, "engine_error", "The engine failed: its answer is not one that can be joined.")
