"""What a picker and its ext_proc processes say to each other over their socket, and how.

    processor → picker    Up once it listens; what its streams ask (Place, Second, Aside, Withdraw) by a
                          number of its own; what they note (Told … BrokeOff); Refused at the door; Open;
                          Drained in the end
    picker → processor    Start first; Placed or Denied for each that was asked; Ready; Drain

Messages are MessagePack, each after its length in four bytes. Both ends are of one release: a picker starts
its processors itself.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

import msgspec

from headway.core.events import Role
from headway.front.errors import Refusal
from headway.hosts.envoy.desk import Answer, Asked, Served

__all__ = [
    "Aside",
    "Broke",
    "BrokeOff",
    "Denied",
    "Drain",
    "Drained",
    "FirstByte",
    "Link",
    "Open",
    "Over",
    "Place",
    "Placed",
    "Ready",
    "Refused",
    "Second",
    "Start",
    "Tokens",
    "Told",
    "Up",
    "Withdraw",
]

log = logging.getLogger("headway.picker")

LENGTH_BYTES = 4


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Anything that is sent."""


class Start(Message, frozen=True):
    """Listen. `config`: as JSON; `certificate`, `key`, `client_ca`: in PEM, empty for plain text."""

    config: bytes
    port: int
    certificate: bytes
    key: bytes
    client_ca: bytes
    reads_prefixes: bool
    ready: bool


class Up(Message, frozen=True):
    """It listens; `error`: or cannot."""

    error: str = ""


class Place(Message, frozen=True):
    """See `Desk.place`."""

    number: int
    asked: Asked


class Second(Message, frozen=True):
    """See `Desk.second`."""

    number: int
    request_id: str
    subset: frozenset[str] | None


class Aside(Message, frozen=True):
    """See `Desk.aside`."""

    number: int
    role: Role | None
    subset: frozenset[str] | None


class Withdraw(Message, frozen=True):
    """Nobody waits for the answer any more."""

    number: int


class Placed(Message, frozen=True):
    """The answer."""

    number: int
    answer: Answer


class Denied(Message, frozen=True):
    """A refusal for an answer."""

    number: int
    status: int
    code: str
    message: str
    param: str | None
    retry_after_s: float | None

    @classmethod
    def of(cls, number: int, refusal: Refusal) -> "Denied":
        """Write a refusal down."""
        return cls(number, refusal.status, refusal.code, str(refusal), refusal.param, refusal.retry_after_s)

    def refusal(self) -> Refusal:
        """Return it."""
        return Refusal(
            self.status, self.code, self.message, param=self.param, retry_after_s=self.retry_after_s
        )


class Told(Message, frozen=True):
    """See `Desk.told`."""

    key: str
    envoy_id: str
    peer: str


class FirstByte(Message, frozen=True):
    """See `Desk.first_byte`."""

    key: str


class Tokens(Message, frozen=True):
    """See `Desk.tokens`."""

    key: str
    prompt_tokens: int | None
    output_tokens: int | None


class Over(Message, frozen=True):
    """See `Desk.over`."""

    key: str
    served: Served
    peer: str


class BrokeOff(Message, frozen=True):
    """See `Desk.broke_off`."""

    envoy_id: str
    served: Served
    peer: str


class Broke(Message, frozen=True):
    """See `Desk.broke`."""

    peer: str


class Refused(Message, frozen=True):
    """A request was refused at the door."""

    path: str
    request_id: str
    status: int
    code: str


class Open(Message, frozen=True):
    """So many streams are open."""

    streams: int


class Ready(Message, frozen=True):
    """Whether to be sent requests, for health checks."""

    ready: bool


class Drained(Message, frozen=True):
    """Nothing is open any more; `whole`: all came to their end by themselves."""

    whole: bool


class Drain(Message, frozen=True):
    """Take nothing new; end when all are answered, or after this long."""

    patience_s: float


_AnyMessage = (
    Start | Up | Place | Second | Aside | Withdraw | Placed | Denied | Told | FirstByte | Tokens | Over
    | Broke | BrokeOff | Refused | Open | Ready | Drain | Drained
)  # fmt: skip
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_AnyMessage)


class Link(asyncio.Protocol):
    """One end of the socket. `hear(message)` for each that comes, `lost()` when the other end is gone."""

    def __init__(self, hear: Callable[[Any], None], lost: Callable[[], None]) -> None:
        self._hear = hear
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        self._lost()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        data = self._rest + data if self._rest else data
        start, end = 0, len(data)
        while start + LENGTH_BYTES <= end:
            body = start + LENGTH_BYTES
            following = body + int.from_bytes(data[start:body])
            if following > end:
                break
            self._one(data[body:following])
            start = following
        self._rest = data[start:]

    def send(self, message: Message) -> None:
        """Send a message; one to an end that is gone is lost with it."""
        if self._transport is not None:
            body = _encoder.encode(message)
            self._transport.write(len(body).to_bytes(LENGTH_BYTES) + body)

    def close(self) -> None:
        """Hang up when all is sent."""
        if self._transport is not None:
            self._transport.close()

    def _one(self, body: bytes) -> None:
        try:
            self._hear(_decoder.decode(body))
        except Exception:  # one request's trouble is not that of all others
            log.exception("a message between picker and processor went wrong")
