"""Decides what of a request's targets vLLM is told, and which requests are refused. No IO.

A request may state its targets in three ways; what is nearer to the request goes first:

    "vllm_xargs": {"slo_ttft_ms": 500, "slo_tpot_ms": 40}     vLLM's own way
    "slo_ttft_ms": 500                                        beside OpenAI's fields
    x-slo-ttft-ms: 500                                        a header, as for the gateway

All of them end in `vllm_xargs`, which vLLM hands to its scheduler, and with them the number of the dispatch
(`x-headway-dispatch`), which no client may give itself. Keys are read as JSON has them, escapes included.
Only a body that may hold such a key is parsed, and of that only the outer object and `vllm_xargs`; all other
values are copied unread.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from headway.core.errors import ConfigError
from headway.core.request import Slo
from headway.hosts.vllm.slo import DISPATCH, KEYS, slo_of

__all__ = ["amend", "from_headers"]

_HEADERS: Final = {
    "x-slo-ttft-ms": "slo_ttft_ms",
    "x-llm-d-slo-ttft-ms": "slo_ttft_ms",
    "x-slo-tpot-ms": "slo_tpot_ms",
    "x-llm-d-slo-tpot-ms": "slo_tpot_ms",
}
_DISPATCH_HEADER: Final = "x-headway-dispatch"
_XARGS: Final = "vllm_xargs"
#: A key of ours, or a letter written as an escape, which no ordinary client writes: one may hide a key.
_MAY_NAME_OURS: Final = re.compile(rb"slo_t|vllm_xargs|\\u00(?:5[fF]|6[0-9a-fA-F]|7[0-9aA])")
#: Bodies up to this are read by the lenient reader, where the strict one refuses them.
_MOST_LENIENT_BYTES: Final = 1 << 20
_MOST_TARGET_BYTES: Final = 64
_decode: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def from_headers(headers: Mapping[str, str]) -> dict[str, float]:
    """Return what headers (names in lower case) say. Raises ConfigError for a target that is no number."""
    found: dict[str, float] = {}
    for header, key in _HEADERS.items():
        if header in headers and key not in found:
            try:
                found[key] = float(headers[header])
            except ValueError:
                raise ConfigError(
                    f"{header} must be a number of milliseconds, got {headers[header]!r}"
                ) from None
    number = headers.get(_DISPATCH_HEADER, "")
    if number.isascii() and number.isdigit() and len(number) < 16:
        found[DISPATCH] = int(number)  # of a scheduler, not of a client: nonsense is passed over
    return found


def amend(body: bytes, found: Mapping[str, float]) -> bytes:
    """Return the body with `found` and its own targets in `vllm_xargs`. Raises ConfigError for nonsense.

    What is not a JSON object is returned as it is: vLLM says what is wrong with it.
    """
    if not _MAY_NAME_OURS.search(body):
        if not found:
            return body
        if not (KEYS.keys() & found.keys()):
            return _put_in_front(body, found)
    content = _object(body)
    if content is None:
        return body
    xargs: Any = content.get(_XARGS)
    given = _object(bytes(xargs)) if _is_given(xargs) else {}
    if given is None:
        return body
    beside = {key: content.pop(key) for key in KEYS if key in content}
    client = {key: value for key, value in {**beside, **given}.items() if key != DISPATCH}
    if not (client or found or given):
        return body
    extra = {**found, **{key: _value(client[key]) if key in KEYS else client[key] for key in client}}
    slo_of(extra, Slo())
    # vLLM knows no null there.
    kept = {key: value for key, value in extra.items() if value is not None and _is_given(value)}
    content[_XARGS] = msgspec.Raw(msgspec.json.encode(kept))
    return msgspec.json.encode(content)


def _object(body: bytes) -> dict[str, Any] | None:
    """Return an object's values by key, unread; None for any other JSON, and for what is no JSON."""
    try:
        return _decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        pass
    if len(body) > _MOST_LENIENT_BYTES:
        return None
    # vLLM's own reader takes some text that is no JSON: NaN and Infinity.
    try:
        content = json.loads(body)
        if not isinstance(content, dict):
            return None
        return {key: msgspec.Raw(json.dumps(value).encode()) for key, value in content.items()}
    except (ValueError, RecursionError):
        return None


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, msgspec.Raw) and bytes(value) == b"null")


def _value(raw: Any) -> Any:
    """Return the value of a target; what is longer than any number is nonsense as it is."""
    text = bytes(raw)
    return (
        json.loads(text) if len(text) <= _MOST_TARGET_BYTES else text[:_MOST_TARGET_BYTES].decode("latin-1")
    )


def _put_in_front(body: bytes, found: Mapping[str, float]) -> bytes:
    start = body.find(b"{")
    if start < 0 or body[:start].strip():
        return body
    rest = body[start + 1 :]
    comma = b"" if rest.lstrip()[:1] == b"}" else b","
    return body[: start + 1] + b'"vllm_xargs":' + json.dumps(dict(found)).encode() + comma + rest
