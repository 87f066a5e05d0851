"""Decides what a request body asks for, and refuses what an engine would refuse.

Rule 1. A token of text is four bytes, rounded up; a prompt of token ids counts exactly. A chat's text is its
        roles and contents one after the other.
Rule 2. The output is `max_tokens` long where that is given (replays want exact lengths), unless
        `ignore_eos` is false: then, and where it is not given, the length is drawn from a log-normal
        distribution (median 128, at most 2,048) seeded by the prompt: the same request, the same answer.
Rule 3. Types are checked as strictly as vLLM's; fields nobody here knows are accepted, as vLLM does.
"""

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct

from headway.hosts.emulator.errors import ApiError

__all__ = ["Ask", "Limits", "RemoteKv", "parse_ask", "parse_embeddings"]

BYTES_PER_TOKEN = 4
_MEDIAN_TOKENS, _SIGMA, _MOST_TOKENS = 128, 0.8, 2048


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine serves. `max_model_len`: prompt and output together. `block_tokens`: of its KV."""

    model: str
    max_model_len: int
    block_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class RemoteKv:
    """vLLM's `kv_transfer_params`: keep the KV for another engine, or pull it from one."""

    keep: bool
    pull: bool
    engine_id: str
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """A generation asked for.

    `output_tokens`: how many there will be; `stops`: by itself, not by `max_tokens`. `digest`: of the prompt.
    `prefix`: one hash per full KV block of it. `room`: SGLang's (bootstrap port, room).
    """

    chat: bool
    prompt_tokens: int
    output_tokens: int
    max_tokens: int | None
    stops: bool
    stream: bool
    usage: bool
    digest: int
    prefix: tuple[int, ...]
    remote_kv: RemoteKv | None
    room: tuple[int | None, int] | None
    rank: int | None


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _KvTransferParams(Struct):
    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    remote_engine_id: str | None = None
    remote_block_ids: list[int] | None = None


class _Body(Struct, kw_only=True):
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = None
    ignore_eos: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    kv_transfer_params: _KvTransferParams | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None
    data_parallel_rank: int | None = None
    routed_dp_rank: int | None = None


class _Part(Struct):
    type: str = ""
    text: str | None = None


class _Turn(Struct):
    role: str
    content: str | list[_Part] | None = None


class _Completion(_Body, kw_only=True):
    prompt: str | list[str | int | list[int]]


class _Chat(_Body, kw_only=True):
    messages: list[_Turn]


class _Embeddings(Struct):
    input: str | list[str | int | list[int]]
    model: str | None = None


_completion = msgspec.json.Decoder(_Completion)
_chat = msgspec.json.Decoder(_Chat)
_embeddings = msgspec.json.Decoder(_Embeddings)


def parse_ask(data: bytes, limits: Limits, *, chat: bool) -> Ask:
    """Read the body of /v1/chat/completions or /v1/completions. Raises ApiError (400; 404: the model)."""
    body: _Chat | _Completion = _decode(_chat if chat else _completion, data)
    _check(body, limits)
    prompt = _chat_text(body) if isinstance(body, _Chat) else _single(body.prompt, "prompt")
    prompt_tokens = _count(prompt)
    digest = zlib.crc32(repr(prompt).encode() if isinstance(prompt, list) else prompt)
    most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    _check_length(prompt_tokens, most, limits)
    output_tokens, stops = _output(
        digest, most, body.ignore_eos, limits.max_model_len - prompt_tokens, limits
    )
    options, params = body.stream_options, body.kv_transfer_params
    room = None
    if body.bootstrap_room is not None:
        room = (body.bootstrap_port, body.bootstrap_room)
    return Ask(
        chat=chat,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        max_tokens=most,
        stops=stops,
        stream=bool(body.stream),
        usage=bool(options and options.include_usage),
        digest=digest,
        prefix=_prefix(prompt, limits.block_tokens),
        remote_kv=_remote_kv(params, bool(body.stream)) if params else None,
        room=room,
        rank=body.routed_dp_rank if body.routed_dp_rank is not None else body.data_parallel_rank,
    )


def parse_embeddings(data: bytes, limits: Limits) -> list[tuple[int, int]]:
    """Read the body of /v1/embeddings; return (digest, tokens) of each input. Raises ApiError."""
    body: _Embeddings = _decode(_embeddings, data)
    _check_model(body.model, limits)
    texts = [body.input] if isinstance(body.input, str) or _all(int, body.input) else body.input
    if not texts:
        raise ApiError(400, "input must not be empty", "input")
    prompts = [_single(text, "input") for text in texts]  # type: ignore[arg-type]
    for prompt in prompts:
        _check_length(_count(prompt), None, limits)
    return [(zlib.crc32(repr(prompt).encode()), _count(prompt)) for prompt in prompts]


def _decode(decoder: "msgspec.json.Decoder[Any]", data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise ApiError(400, str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"JSON decode error: {error}") from None


def _check(body: _Body, limits: Limits) -> None:
    _check_model(body.model, limits)
    for name in ("max_tokens", "max_completion_tokens"):
        value = getattr(body, name)
        if value is not None and value < 1:
            raise ApiError(400, f"{name} must be at least 1, got {value}.", name)
    if body.n not in (None, 1):
        raise ApiError(400, f"n must be 1 here, got {body.n}.", "n")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "Stream options can only be defined when `stream=True`.", "stream_options")
    for name, top in (("temperature", 2.0), ("top_p", 1.0)):
        value = getattr(body, name)
        if value is not None and not 0.0 <= value <= top:
            raise ApiError(400, f"{name} must be in [0, {top:g}], got {value}.", name)


def _check_model(model: str | None, limits: Limits) -> None:
    if model is not None and model != limits.model:
        raise ApiError(404, f"The model `{model}` does not exist.", "model")


def _check_length(prompt_tokens: int, most: int | None, limits: Limits) -> None:
    longest = limits.max_model_len
    if prompt_tokens >= longest:
        raise ApiError(
            400,
            f"This model's maximum context length is {longest} tokens. However, your request has "
            f"{prompt_tokens} input tokens. Please reduce the length of the input messages.",
        )
    if most is not None and prompt_tokens + most > longest:
        raise ApiError(
            400,
            f"'max_tokens' or 'max_completion_tokens' is too large: {most}. This model's maximum context "
            f"length is {longest} tokens and your request has {prompt_tokens} input tokens "
            f"({most} > {longest} - {prompt_tokens}).",
        )


def _chat_text(body: _Chat) -> bytes:
    if not body.messages:
        raise ApiError(400, "messages must not be empty", "messages")
    texts = []
    for turn in body.messages:
        content = turn.content
        if isinstance(content, list):
            content = "".join([part.text or "" for part in content])
        texts.append(f"{turn.role}\n{content or ''}\n")
    return "".join(texts).encode("utf-8", "surrogatepass")


def _single(prompt: str | Sequence[str | int | list[int]], param: str) -> bytes | list[int]:
    """One prompt, as text or token ids; a list of several is refused."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        if _all(int, prompt) and prompt:
            return [token for token in prompt if isinstance(token, int)]
        if len(prompt) != 1:
            raise ApiError(
                400, f"{param} must be one text or one list of token ids, not {len(prompt)}", param
            )
        return _single(prompt[0], param)  # type: ignore[arg-type]
    if not prompt:
        raise ApiError(400, f"{param} must not be empty", param)
    return prompt.encode("utf-8", "surrogatepass")


def _all(kind: type[Any], values: str | Sequence[Any]) -> bool:
    return not isinstance(values, str) and all(isinstance(value, kind) for value in values)


def _count(prompt: bytes | list[int]) -> int:
    return len(prompt) if isinstance(prompt, list) else -(-len(prompt) // BYTES_PER_TOKEN)


def _prefix(prompt: bytes | list[int], block_tokens: int) -> tuple[int, ...]:
    """Hash each full block with all before it. Equal only within this process: `hash` is salted."""
    size = block_tokens if isinstance(prompt, list) else block_tokens * BYTES_PER_TOKEN
    hashes = []
    so_far = 0
    for end in range(size, len(prompt) + 1, size):
        block = prompt[end - size : end]
        so_far = hash((so_far, tuple(block) if isinstance(block, list) else block))
        hashes.append(so_far)
    return tuple(hashes)


def _output(
    digest: int, most: int | None, ignore_eos: bool | None, room: int, limits: Limits
) -> tuple[int, bool]:
    """How many tokens there will be, and whether the model stops by itself."""
    if most is not None and ignore_eos is not False:
        return most, False
    rng = random.Random(limits.seed << 32 | digest)
    drawn = int(rng.lognormvariate(math.log(_MEDIAN_TOKENS), _SIGMA))
    drawn = max(1, min(drawn, _MOST_TOKENS, room))
    return (most, False) if most is not None and most <= drawn else (drawn, drawn < room)


def _remote_kv(params: _KvTransferParams, stream: bool) -> RemoteKv:
    keep, pull = bool(params.do_remote_decode), bool(params.do_remote_prefill)
    if keep and (pull or stream):
        what = "do_remote_prefill" if pull else "stream"
        raise ApiError(400, f"do_remote_decode and {what} exclude each other", "kv_transfer_params")
    return RemoteKv(keep, pull, params.remote_engine_id or "", params.remote_block_ids or [])


def rank_in_header(headers: Mapping[str, str]) -> int | None:
    """Return vLLM's `X-data-parallel-rank`. Raises ApiError when it is no whole number."""
    text = headers.get("X-data-parallel-rank")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise ApiError(400, f"X-data-parallel-rank must be a rank, got {text[:40]!r}")
    return int(text)
