"""What a dialect is: a function that takes a request all the way through its engines, once.

It waits for the places it needs (`legs.place`), makes the legs, and raises LegError when an engine fails
one: what was started is then cut, and the request may go the way again.
"""

from collections.abc import Awaitable, Callable

import msgspec

from headway.hosts.gateway.flight import Flight
from headway.hosts.gateway.legs import Legs

__all__ = ["Way", "fields_of", "splice"]

Way = Callable[[Legs, Flight], Awaitable[None]]

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def fields_of(body: bytes) -> dict[str, msgspec.Raw]:
    """Return the top-level fields of a JSON object, their values unread."""
    return _fields.decode(body)


def splice(body: bytes, fields: bytes) -> bytes:
    """Put fields (`"a":1,"b":2`) at the front of a JSON object that is not empty, without reading it."""
    at = body.index(b"{") + 1
    return b"%b%b,%b" % (body[:at], fields, body[at:])
