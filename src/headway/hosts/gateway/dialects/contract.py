"""What a dialect is: a function that takes a request all the way through its engines, once.

It waits for the places it needs (`legs.place`), makes the legs, and raises LegError when an engine fails
one: what was started is then cut, and the request may go the way again.
"""

from collections.abc import Awaitable, Callable

from headway.hosts.gateway.flight import Flight
from headway.hosts.gateway.legs import Legs

__all__ = ["Way", "override", "splice"]

Way = Callable[[Legs, Flight], Awaitable[None]]


def splice(body: bytes, fields: bytes) -> bytes:
    """Put fields (`"a":1,"b":2`) at the front of a JSON object that is not empty, without reading it."""
    at = body.index(b"{") + 1
    return b"%b%b,%b" % (body[:at], fields, body[at:])


def override(body: bytes, fields: bytes) -> bytes:
    """Put fields at the end of a JSON object that is not empty, without reading it: of fields with the same
    name, the last counts, for Python's `json` as for the gateway.
    """
    at = body.rindex(b"}")
    return b"%b,%b}" % (body[:at], fields)
