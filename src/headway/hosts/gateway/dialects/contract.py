"""What a dialect is: a function that takes a request all the way through its engines, once.

It waits for the places it needs (`legs.place`), makes the legs, and raises LegError when an engine fails
one: what was started is then cut, and the request may go the way again.
"""

from collections.abc import Awaitable, Callable

from headway.front.json_body import MOST_WHITE_BYTES
from headway.front.transport import Body, pieces_of
from headway.hosts.gateway.flight import Flight
from headway.hosts.gateway.legs import Legs

__all__ = ["Way", "override", "splice"]

#: Larger bodies are not copied: that stops the event loop.
MOST_COPIED_BYTES = 1 << 20

Way = Callable[[Legs, Flight], Awaitable[None]]


def splice(body: Body, fields: bytes) -> Body:
    """Put fields (`"a":1,"b":2`) at the front of a JSON object that is not empty, without reading it."""
    first, *rest = pieces_of(body)
    at = bytes(first[:MOST_WHITE_BYTES]).index(b"{") + 1
    return _joined(bytes(first[:at]) + fields + b",", memoryview(first)[at:], *rest)


def override(body: Body, fields: bytes) -> Body:
    """Put fields at the end of a JSON object that is not empty, without reading it: of fields with the same
    name, the last counts, for Python's `json` as for the gateway.
    """
    *before, last = pieces_of(body)
    at = len(last) - MOST_WHITE_BYTES if len(last) > MOST_WHITE_BYTES else 0
    at += bytes(last[at:]).rindex(b"}")
    return _joined(*before, memoryview(last)[:at], b"," + fields + b"}")


def _joined(*pieces: bytes | memoryview) -> Body:
    """Return a body in one piece where copying it is cheap."""
    return b"".join(pieces) if sum(map(len, pieces)) < MOST_COPIED_BYTES else pieces
