"""Decides which headers go on from a client to engines, and from an engine to its client.

Rule 1. A client's credentials never reach an engine, except `Authorization` where the front door checks no
        keys itself: engines then check it.
Rule 2. An engine's address never reaches a client: not in a redirect, not in a header that names servers.
Rule 3. Which sites may read an answer is the front door's to say, so an engine's CORS headers are dropped.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

__all__ = [
    "CREDENTIALS",
    "HOP_BY_HOP",
    "error_for_client",
    "headers_for_client",
    "nominated",
    "read_retry_after",
    "without_addresses",
]

#: Of an engine's error, this much goes on to the client.
MOST_ERROR_BYTES = 1 << 16

#: Headers of a client that carry its credentials. `authorization` is decided by rule 1.
CREDENTIALS = frozenset(("cookie", "x-api-key"))

#: Headers that are for one connection only, or that each connection writes itself.
HOP_BY_HOP = frozenset(
    (
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)

#: Headers of an engine that the front door sets itself, or that name servers behind it.
_DROPPED = frozenset(
    (
        "alt-svc",
        "date",
        "forwarded",
        "server",
        "set-cookie",
        "via",
        "x-powered-by",
        "x-real-ip",
        "x-request-id",
        "x-served-by",
    )
)
_DROPPED_PREFIXES = ("access-control-", "x-backend", "x-envoy-", "x-forwarded-", "x-upstream")
#: Headers whose value is a URL of the engine.
_URLS = frozenset(("location", "content-location"))

#: Takes time in proportion to the text, whatever it is: clients can have engines repeat theirs.
_ADDRESS = re.compile(
    r"(?:(?<![\w.-])[a-z0-9-]++(?:\.[a-z0-9-]++)++:\d{2,5}"  # a name and a port
    r"|(?<![\w.])(?:"
    r"[a-z][a-z0-9+.-]{0,31}://(?:\[[^\s\]]{0,100}\](?::\d+)?|[^\s/'\"<>)\]]+)"  # a URL to its path
    r"|\d{1,3}(?:\.\d{1,3}){3}(?::\d{1,5})?"  # IPv4, with or without a port
    r"|\[[0-9a-f]{0,4}:[0-9a-f:.]{1,45}\](?::\d{1,5})?"  # IPv6 in brackets
    r"))(?!\w)",
    re.IGNORECASE,
)


def headers_for_client(headers: Mapping[str, str], engine_url: str) -> dict[str, str]:
    """Return an engine's headers without those that a client must not see, and those of the connection.

    Names are in lower case, and come out as `Retry-After`: none can come twice beside the front door's own.
    """
    engine = _netloc(engine_url)
    dropped = nominated(headers)
    kept = {}
    for name, value in headers.items():
        shown = _shown(name)
        if shown is None or name in dropped:
            continue
        if name in _URLS:
            value = _relative(value, engine)
        if engine not in value.lower():
            kept[shown] = value
    return kept


@lru_cache(maxsize=1024)
def _shown(name: str) -> str | None:
    """Return how a client sees the name of an engine's header; None: not at all."""
    hidden = name in HOP_BY_HOP or name in _DROPPED or name.startswith(_DROPPED_PREFIXES)
    return None if hidden else name.title()


@lru_cache(maxsize=4096)
def _netloc(url: str) -> str:
    return urlsplit(url).netloc.lower()


def nominated(headers: Mapping[str, str]) -> frozenset[str]:
    """Return the headers that `Connection` names: they are for this connection only (RFC 9110 §7.6.1)."""
    listed = headers.get("connection", "")
    return frozenset(name.strip().lower() for name in listed.split(",")) if listed else frozenset()


def error_for_client(body: bytes) -> bytes:
    """Return an engine's error answer as a client may see it: without addresses, and not too long."""
    return without_addresses(body[:MOST_ERROR_BYTES].decode(errors="replace")).encode()


def without_addresses(text: str) -> str:
    """Return an engine's error text with addresses of servers replaced by "[address]"."""
    return _ADDRESS.sub("[address]", text)


def _relative(url: str, engine: str) -> str:
    """Return a URL at the engine as a path, any other as it is."""
    parts = urlsplit(url)
    if parts.netloc.lower() != engine:
        return url
    path = parts.path or "/"
    return f"{path}?{parts.query}" if parts.query else path


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a `Retry-After` header; None where there is none, or a date."""
    text = headers.get("retry-after", "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 8 else None
