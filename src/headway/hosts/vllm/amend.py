"""Decides what of a request's targets vLLM is told, and which requests are refused. No IO.

A request may state its targets in three ways; what is nearer to the request goes first:

    "vllm_xargs": {"slo_ttft_ms": 500, "slo_tpot_ms": 40}     vLLM's own way
    "slo_ttft_ms": 500                                        beside OpenAI's fields
    x-slo-ttft-ms: 500                                        a header, as for the gateway

All of them end in `vllm_xargs`, which vLLM hands to its scheduler, and with them the number of the dispatch
(`x-headway-dispatch`). A body is parsed only if it may hold targets: a number alone is put in front of what
is there already.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

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
    if not found and b'"slo_' not in body:
        return body
    if b"slo_" not in body and b'"vllm_xargs"' not in body and not (KEYS.keys() & found.keys()):
        return _put_in_front(body, found)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # no JSON, or nested too deep
        return body
    if not isinstance(content, dict):
        return body
    given = content.get("vllm_xargs")
    if given is not None and not isinstance(given, dict):
        return body
    beside: dict[str, Any] = {key: content.pop(key) for key in KEYS if key in content}
    extra = {**found, **beside, **(given or {})}
    if DISPATCH in found:
        extra[DISPATCH] = found[DISPATCH]
    slo_of(extra, Slo())
    # vLLM knows no null there.
    content["vllm_xargs"] = {key: value for key, value in extra.items() if value is not None}
    try:
        return json.dumps(content).encode()
    except RecursionError:
        return body


def _put_in_front(body: bytes, found: Mapping[str, float]) -> bytes:
    start = body.find(b"{")
    if start < 0 or body[:start].strip():
        return body
    rest = body[start + 1 :]
    comma = b"" if rest.lstrip()[:1] == b"}" else b","
    return body[: start + 1] + b'"vllm_xargs":' + json.dumps(dict(found)).encode() + comma + rest
