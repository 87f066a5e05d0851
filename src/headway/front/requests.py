"""Decides what a client's request is: its fields, its prompt's length in bytes, and what it wants.

The body stays the bytes that came. It is read once, for the top-level fields the gateway needs and no
deeper than the prompt; an engine gets those very bytes, with a field spliced in front where its protocol
needs one.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from headway.core.request import Slo
from headway.front.errors import Refusal, bad_request

__all__ = [
    "GENERATIONS",
    "Call",
    "check_passed_on",
    "plain_path",
    "read_call",
    "read_targets",
    "targets_for_engines",
]

#: What the policy places. Never passed on, under no other spelling either.
GENERATIONS = ("/v1/chat/completions", "/v1/completions")

#: Fields that steer engines. A client that could send one would pin a rank, or read another client's KV.
RESERVED = (
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    "disagg_prefill_dp_rank",
    "kv_transfer_params",
    "routed_dp_rank",
)
#: As a header. In silence it would be ignored, and who pins a rank believes to be on it.
RESERVED_HEADER = "x-data-parallel-rank"
#: What a part of a message that is not text (an image, a sound) counts as, in bytes of text.
OTHER_PART = bytes(2048)

TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
PRIORITY_HEADER = "x-priority"
#: Targets outside of these are nonsense: a microsecond, a day.
LEAST_MS, MOST_MS = 0.001, 86_400_000.0
MOST_PRIORITY = 1_000_000
#: A limit on the output beyond this is nonsense, and no number that every protocol could carry.
MOST_TOKENS = (1 << 31) - 1

#: White space, and what marks the other encodings of JSON: byte order marks and the halves of UTF-16's.
_BEFORE_JSON = b" \t\r\n\xef\xbb\xbf\xff\xfe\0"

_Unread = msgspec.Raw | msgspec.UnsetType
_ABSENT = msgspec.UNSET


class _Steering(msgspec.Struct, kw_only=True):
    bootstrap_host: _Unread = _ABSENT
    bootstrap_port: _Unread = _ABSENT
    bootstrap_room: _Unread = _ABSENT
    data_parallel_rank: _Unread = _ABSENT
    disagg_prefill_dp_rank: _Unread = _ABSENT
    kv_transfer_params: _Unread = _ABSENT
    routed_dp_rank: _Unread = _ABSENT


class _Fields(_Steering, kw_only=True):
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None


class _Message(msgspec.Struct):
    role: str
    content: _Unread = _ABSENT
    tool_calls: _Unread = _ABSENT


class _Chat(_Fields, kw_only=True):
    messages: list[_Message]
    tools: _Unread = _ABSENT


class _Completion(_Fields, kw_only=True):
    prompt: str | list[Any]


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


_steering = msgspec.json.Decoder(_Steering)
_chat = msgspec.json.Decoder(_Chat)
_completion = msgspec.json.Decoder(_Completion)
_parts = msgspec.json.Decoder(list[_Part])


class Call(msgspec.Struct, frozen=True):
    """A client's request for a generation, checked.

    `texts`: the parts of the prompt, JSON-escaped in UTF-8, a chat's tools first. `roles`: who says each text
    of a single prompt; empty when there are several. `token_ids`: how many the client sent instead of text,
    else None; `ids`: those of a single prompt. `max_tokens`: the client's limit on the output.
    """

    path: str
    body: bytes
    model: str | None
    stream: bool
    max_tokens: int | None
    texts: tuple[bytes, ...]
    roles: tuple[str, ...] = ()
    token_ids: int | None = None
    ids: tuple[int, ...] = ()

    @property
    def prompt_bytes(self) -> int:
        """Length of the prompt's text."""
        return sum(map(len, self.texts))


def read_call(path: str, body: bytes, *, steered: bool = False) -> Call:
    """Read the body of a chat or text completion. Raises Refusal (400) for all an engine could choke on.

    `steered`: it comes from a coordinator, which may say what clients may not.
    """
    try:
        if not body.isascii():
            body.decode()
        if path.endswith("/chat/completions"):
            chat = _chat.decode(body)
            return _call(path, body, chat, steered, *_chat_texts(chat))
        completion = _completion.decode(body)
        return _call(path, body, completion, steered, *_prompt(completion.prompt))
    except UnicodeDecodeError:
        raise bad_request("The body is not valid UTF-8.", code="invalid_json") from None
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def _call(
    path: str,
    body: bytes,
    fields: _Fields,
    steered: bool,
    texts: tuple[bytes, ...],
    roles: tuple[str, ...],
    token_ids: int | None = None,
    ids: tuple[int, ...] = (),
) -> Call:
    if not steered:
        _refuse_steering(fields)
    for name in ("max_tokens", "max_completion_tokens", "n"):
        value = getattr(fields, name)
        if value is not None and not 1 <= value <= MOST_TOKENS:
            raise bad_request(f"{name} must be between 1 and {MOST_TOKENS}, got {value}.", param=name)
    limit = fields.max_tokens if fields.max_completion_tokens is None else fields.max_completion_tokens
    return Call(path, body, fields.model, bool(fields.stream), limit, texts, roles, token_ids, ids)


def _refuse_steering(fields: _Steering) -> None:
    for name in RESERVED:
        if getattr(fields, name) is not _ABSENT:
            raise bad_request(f"The field {name!r} is the gateway's to set.", param=name)


def plain_path(path: str) -> str:
    """Return a path, decoded, as an engine may read it."""
    return re.sub("/+", "/", path).rstrip("/").lower()


def check_passed_on(body: bytes) -> None:
    """Check a body that goes to an engine unread. Raises Refusal (400) if it is a JSON object that steers
    engines. One that cannot be read might: engines are less strict, and know UTF-16 too.
    """
    if body.lstrip(_BEFORE_JSON)[:1] != b"{":
        return
    try:
        if not body.isascii():
            body.decode()
        fields = _steering.decode(body)
    except UnicodeDecodeError:
        raise bad_request("The body is not valid UTF-8.", code="invalid_json") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    _refuse_steering(fields)


def _wrong_type(message: str) -> Refusal:
    """Turn msgspec's "Expected `bool`, got `str` - at `$.stream`" into a 400 that names the field."""
    what, _, place = message.partition(" - at `$")
    param = place.rstrip("`").lstrip(".") or None
    return bad_request(f"{what}{f' (at {param})' if param else ''}.", param=param)


def _chat_texts(chat: _Chat) -> tuple[tuple[bytes, ...], tuple[str, ...]]:
    """Return the texts and the role of each. Templates put the tools before the messages."""
    if not chat.messages:
        raise bad_request("messages must not be empty.", param="messages")
    texts: list[bytes] = []
    roles: list[str] = []
    if not isinstance(chat.tools, msgspec.UnsetType):
        texts.append(bytes(chat.tools))
        roles.append("")
    for number, message in enumerate(chat.messages):
        said: list[bytes] = []
        if not isinstance(message.content, msgspec.UnsetType):
            said = _content(bytes(message.content), number)
        if not isinstance(message.tool_calls, msgspec.UnsetType):
            said.append(bytes(message.tool_calls))
        texts += said
        roles += [message.role] * len(said)
    return tuple(texts), tuple(roles)


def _content(content: bytes, number: int) -> list[bytes]:
    if content[:1] == b'"':
        return [content[1:-1]]
    if content[:1] == b"[":
        return [OTHER_PART if p.text is None else p.text.encode() for p in _parts.decode(content)]
    if content == b"null":
        return []
    raise bad_request("content must be a string or a list of parts.", param=f"messages[{number}].content")


def _prompt(
    prompt: str | list[Any],
) -> tuple[tuple[bytes, ...], tuple[str, ...], int | None, tuple[int, ...]]:
    """A text, texts, token ids or lists of them: one request to the scheduler, as long as all together."""
    if isinstance(prompt, str):
        return (prompt.encode(),), ("",), None, ()
    if prompt and all(isinstance(each, str) for each in prompt):
        return tuple(each.encode() for each in prompt), (), None, ()
    nested = all(isinstance(each, list) for each in prompt)
    ids = [number for each in prompt for number in each] if nested else prompt
    if not ids or not all(type(number) is int and number >= 0 for number in ids):
        raise bad_request("prompt must be a text, texts or token ids, and not empty.", param="prompt")
    return (), (), len(ids), () if nested else tuple(ids)


def read_targets(headers: Mapping[str, str], default: Slo) -> tuple[Slo, int]:
    """Read latency targets and priority from a request's headers.

    Raises Refusal (400) for a target that is no positive number of milliseconds, or a priority that is no
    whole number, or a rank that the client wants to choose.
    """
    if RESERVED_HEADER in headers:
        raise bad_request(f"The header {RESERVED_HEADER} is the gateway's to set.", param=RESERVED_HEADER)
    ttft_ms = _milliseconds(headers, TTFT_HEADERS)
    tpot_ms = _milliseconds(headers, TPOT_HEADERS)
    slo = default
    if ttft_ms is not None or tpot_ms is not None:
        ttft_s = default.ttft_s if ttft_ms is None else ttft_ms / 1000.0
        slo = Slo(ttft_s, default.tpot_s if tpot_ms is None else tpot_ms / 1000.0)
    return slo, _priority(headers.get(PRIORITY_HEADER))


def targets_for_engines(headers: Mapping[str, str]) -> dict[str, str]:
    """Return what a client said of targets and priority, under one name each: engines that schedule by
    them should know. Headers are those that `read_targets` found sound.
    """
    said = {}
    for names in (TTFT_HEADERS, TPOT_HEADERS, (PRIORITY_HEADER,)):
        name = next((each for each in names if each in headers), None)
        if name is not None:
            said[names[0]] = headers[name].strip()
    return said


def _milliseconds(headers: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    name = next((each for each in names if each in headers), None)
    if name is None:
        return None
    text = headers[name]
    try:
        value = math.nan if len(text) > 32 or "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not LEAST_MS <= value <= MOST_MS:
        raise bad_request(f"The header {name} must be a positive number of milliseconds.", param=name)
    return value


def _priority(text: str | None) -> int:
    if text is None:
        return 0
    sound = len(text) <= 8 and text.isascii() and text.removeprefix("-").isdigit()
    if not sound or abs(int(text)) > MOST_PRIORITY:
        raise bad_request(f"The header {PRIORITY_HEADER} must be a whole number.", param=PRIORITY_HEADER)
    return int(text)
