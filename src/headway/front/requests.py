"""Reads what a client's request wants: its model, its limits, and the measures of its prompt.

The body stays the bytes that came: an engine gets those very bytes, with a field spliced in where its
protocol needs one. `read_call` reads a body once, for the fields that scheduling needs; what it builds is
bounded (`json_body.py`, `prompts.py`), and bodies that take longer are read in other processes
(`body_reader.py`), so that no client stops the event loop.

To read another endpoint's bodies, add a function to `_READERS` that fills a `Prompt`.
"""

import math
import re
from collections.abc import Callable, Mapping

import msgspec

from headway.core.request import Slo
from headway.front.errors import Refusal, bad_request
from headway.front.json_body import ABSENT, Field, check_bounds, decode, flag, text, whole
from headway.front.other_apis import read_generate, read_messages, read_responses
from headway.front.prefixes import BLOCK_BYTES, BLOCK_IDS
from headway.front.prompts import Count, Prompt
from headway.front.request_fields import Fields, Steering, is_given, refuse_steering

__all__ = [
    "GENERATIONS",
    "PRIORITY_HEADER",
    "Call",
    "check_passed_on",
    "plain_path",
    "read_call",
    "read_targets",
    "targets_for_engines",
]

#: What the policy places. Never passed on, under no other spelling either.
GENERATIONS = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/generate")

#: As a header. In silence it would be ignored, and who pins a rank believes to be on it.
RESERVED_HEADER = "x-data-parallel-rank"

TTFT_HEADERS = ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms")
TPOT_HEADERS = ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms")
PRIORITY_HEADER = "x-priority"
#: Targets outside of these are nonsense: a microsecond, a day.
LEAST_MS, MOST_MS = 0.001, 86_400_000.0
MOST_PRIORITY = 1_000_000
#: White space, and what marks the other encodings of JSON: byte order marks and the halves of UTF-16's.
_first_byte = re.compile(rb"[^ \t\r\n\xef\xbb\xbf\xff\xfe\0]")


class _PassedOn(Steering, kw_only=True):
    model: Field = ABSENT


class _Message(msgspec.Struct, gc=False):
    role: str
    content: Field = ABSENT
    tool_calls: Field = ABSENT


class _Chat(Fields, kw_only=True):
    messages: list[_Message]
    tools: Field = ABSENT


class _Completion(Fields, kw_only=True):
    prompt: Field = ABSENT
    prompt_embeds: Field = ABSENT


_passed_on = msgspec.json.Decoder(_PassedOn)
_chat = msgspec.json.Decoder(_Chat)
_completion = msgspec.json.Decoder(_Completion)


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A client's request for a generation, checked.

    `body`: as it came; empty where the host does not keep it. `max_tokens`: the client's limit on the output.
    `sequences`: outputs asked for, over all prompts (`n`, `best_of`, lists of prompts). `stream_options`:
    whether the client gave any.

    Measures of the prompt. `text_bytes`: its texts in UTF-8. `messages`: those of a chat, which a template
    surrounds. `other_parts`: images, sounds and the like. `token_ids`: how many the client sent instead of
    text, else None. `counted`: tokens of the texts by a tokenizer, None without one. `truncates`: the engine
    may cut it. `prefix`: hashes of its beginning (`prefixes.py`), where they are wanted.
    """

    path: str
    body: bytes = b""
    model: str | None = None
    stream: bool = False
    max_tokens: int | None = None
    sequences: int = 1
    stream_options: bool = False
    text_bytes: int = 0
    messages: int = 0
    other_parts: int = 0
    token_ids: int | None = None
    counted: int | None = None
    truncates: bool = False
    prefix: tuple[int, ...] = ()

    def block_tokens(self, tokens: int) -> int:
        """Return the tokens of one block of `prefix`, of a prompt with so many; 0 without one."""
        if not self.prefix:
            return 0
        if self.token_ids is not None:
            return BLOCK_IDS
        return max(1, tokens * BLOCK_BYTES // max(BLOCK_BYTES, self.text_bytes))


def read_call(
    path: str, body: bytes, *, steered: bool = False, prefixes: bool = True, count: Count | None = None
) -> Call:
    """Read the body of a generation. Raises Refusal (400) for what an engine could choke on.

    `steered`: it comes from a coordinator, which may set what clients may not. `prefixes`: hash the prompt's
    beginning. `count`: counts tokens of text. Takes time in proportion to the body: see `BodyReader`.
    """
    check_bounds(body)
    prompt = Prompt()
    messages, fields = _READERS[path](body, prompt)
    if not steered:
        refuse_steering(fields)
    model = text(fields.model, "model")
    # 0: nothing but the prompt's log probabilities, or its place in a cache
    least = 0 if path in ("/v1/completions", "/generate") else 1
    limit = whole(fields.max_completion_tokens, "max_completion_tokens", least)
    other_limit = whole(fields.max_tokens, "max_tokens", least)
    sequences = max(whole(fields.n, "n", 1) or 1, whole(fields.best_of, "best_of", 1) or 1)
    counted, all_counted = (None, True) if count is None else prompt.counted(count)
    return Call(
        path=path,
        body=body,
        model=model,
        stream=flag(fields.stream, "stream"),
        max_tokens=other_limit if limit is None else limit,
        sequences=sequences * prompt.sequences,
        stream_options=is_given(fields.stream_options),
        text_bytes=prompt.text_bytes,
        messages=messages,
        other_parts=prompt.other_parts,
        token_ids=prompt.token_ids,
        counted=counted,
        truncates=is_given(fields.truncate_prompt_tokens) or not all_counted,
        prefix=prompt.prefix(model) if prefixes else (),
    )


def _read_chat(body: bytes, prompt: Prompt) -> tuple[int, Fields]:
    """Read a chat. Templates put the tools before the messages."""
    chat = decode(_chat, body)
    if not chat.messages:
        raise bad_request("messages must not be empty.", param="messages")
    prompt.add_json("", chat.tools)
    for number, message in enumerate(chat.messages):
        prompt.add_content(message.role, message.content, f"messages[{number}].content")
        prompt.add_json(message.role, message.tool_calls)
    return len(chat.messages), chat


def _read_completion(body: bytes, prompt: Prompt) -> tuple[int, Fields]:
    """Read a text completion: a prompt, embeddings in place of one, or both."""
    completion = decode(_completion, body)
    given = is_given(completion.prompt_embeds)
    if isinstance(completion.prompt, msgspec.Raw) and not (given and not is_given(completion.prompt)):
        prompt.add_prompt(completion.prompt)
    elif not given:
        raise bad_request("Object missing required field `prompt`.", param="prompt")
    if given:
        prompt.add_other()
    return 0, completion


#: How the body of each endpoint is read: fills the prompt, returns the number of messages and the fields.
_READERS: dict[str, Callable[[bytes, Prompt], tuple[int, Fields]]] = {
    "/v1/chat/completions": _read_chat,
    "/v1/completions": _read_completion,
    "/v1/messages": read_messages,
    "/v1/responses": read_responses,
    "/generate": read_generate,
}


def plain_path(path: str) -> str:
    """Return a path, decoded, as an engine may read it."""
    return re.sub("/+", "/", path).rstrip("/").lower()


def check_passed_on(body: bytes) -> str | None:
    """Check a body that goes to an engine unread; return the model it names. Raises Refusal (400) if it is a
    JSON object that steers engines. One that cannot be read might: engines are less strict, and know UTF-16
    too.
    """
    if not looks_like_object(body):
        return None
    fields = decode(_passed_on, body)
    refuse_steering(fields)
    try:
        return text(fields.model, "model")
    except Refusal:
        return None  # the engine's to refuse


def looks_like_object(body: bytes) -> bool:
    """Whether an engine could take a body for a JSON object."""
    first = _first_byte.search(body)
    return first is not None and first[0] == b"{"


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
