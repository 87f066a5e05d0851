"""Pass-end events between engines and schedulers: ZeroMQ and msgpack, versioned (docs/pass-events.md)."""

from headway.wire.publisher import Publisher
from headway.wire.schema import SCHEMA, decode, encode
from headway.wire.subscriber import Subscriber

__all__ = ["SCHEMA", "Publisher", "Subscriber", "decode", "encode"]
