"""Decides what a pass event looks like on the wire: msgpack maps under the schema `headway.pass/1`.

Rule 1. A message is one map. `schema` says how to read it, `type` which message it is; the other keys are
        the fields of the core event of the same meaning, under the same names.
Rule 2. What is unknown is left out or nil, never 0. Keys nobody knows are skipped, so that fields may be
        added within a version; a field that changes its meaning takes a new version.
Rule 3. A message that breaks the schema is an error of the engine's: `EngineError`, never a half-read event.
"""

import math
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from headway.core.errors import ConfigError, EngineError
from headway.core.events import (
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    PassEnded,
    PassStarted,
    Role,
    Snapshot,
    StepModel,
)

__all__ = ["SCHEMA", "Bye", "Hello", "PassEvent", "decode", "encode"]

SCHEMA: Final = "headway.pass/1"

#: What engines say of themselves; of the core's events these travel.
PassEvent = InstanceUp | InstanceDown | InstanceDraining | PassStarted | PassEnded | Snapshot

_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Count = Annotated[int, Meta(ge=0)]
_Counts = tuple[_Count, ...]
_Models = tuple[StepModel | None, ...]


class _Message(
    Struct, frozen=True, kw_only=True, omit_defaults=True, repr_omit_defaults=True, tag_field="type"
):
    schema: Literal["headway.pass/1"]
    instance: _Name


class Hello(_Message, tag="hello", frozen=True, kw_only=True):
    """The engine is there, in this epoch. Fields as in `InstanceUp`."""

    epoch: _Count
    role: Role
    ranks: _Count
    chunk_tokens: _Count
    kv_blocks: _Count | None = None
    block_tokens: _Count = 16
    max_running: _Count | None = None
    lockstep: bool = True


class _PassStarted(_Message, tag="pass-started", frozen=True, kw_only=True):
    epoch: _Count
    sequence: _Count
    first_rank: _Count = 0


class _Ranks(_Message, frozen=True, kw_only=True):
    """What reports share: who, the numbers that make late ones harmless, and the state of each rank."""

    epoch: _Count
    sequence: _Count
    acknowledged: _Count
    queued_tokens: _Counts | None = None
    kv_blocks: _Counts | None = None
    running: _Counts | None = None
    waiting: _Counts | None = None
    pab_tokens: tuple[int, ...] | None = None
    first_rank: _Count = 0


class _PassEnded(_Ranks, tag="pass-ended", frozen=True, kw_only=True):
    duration_s: Annotated[float, Meta(ge=0)]
    ran_tokens: _Counts
    decode_models: _Models | None = None
    mixed_models: _Models | None = None


class _Snapshot(_Ranks, tag="snapshot", frozen=True, kw_only=True):
    busy: bool


class Bye(_Message, tag="bye", frozen=True, kw_only=True):
    """The engine leaves; with `draining`, it takes nothing new and finishes what it has."""

    draining: bool = False


_TWINS: dict[type[Any], type[_Message]] = {
    InstanceUp: Hello,
    PassStarted: _PassStarted,
    PassEnded: _PassEnded,
    Snapshot: _Snapshot,
}
_CORE: dict[type[_Message], type[Any]] = {wire: core for core, wire in _TWINS.items()}
_FIELDS = {wire: wire.__struct_fields__[1:] for wire in _CORE}  # all but `schema`

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Hello | _PassStarted | _PassEnded | _Snapshot | Bye
)


def encode(event: PassEvent) -> bytes:
    """Return the event as one msgpack message. Raises TypeError for an event that does not travel."""
    if isinstance(event, InstanceDown | InstanceDraining):
        draining = isinstance(event, InstanceDraining)
        return _encoder.encode(Bye(schema=SCHEMA, instance=event.instance, draining=draining))
    twin = _TWINS.get(type(event))
    if twin is None:
        raise TypeError(f"{type(event).__name__} does not travel")
    values = {name: getattr(event, name) for name in _FIELDS[twin]}
    return _encoder.encode(twin(schema=SCHEMA, **values))


def decode(data: bytes) -> PassEvent:
    """Read one message. Raises EngineError when it is not one of `headway.pass/1`, saying where."""
    try:
        message = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(f"not a {SCHEMA} message: {error}") from None
    if isinstance(message, Bye):
        gone = InstanceDraining if message.draining else InstanceDown
        return gone(message.instance)
    if isinstance(message, _PassEnded) and not math.isfinite(message.duration_s):
        raise EngineError(f"not a {SCHEMA} message: duration_s is {message.duration_s}")
    values = {name: getattr(message, name) for name in _FIELDS[type(message)]}
    try:
        event: PassEvent = _CORE[type(message)](**values)
    except ConfigError as error:
        raise EngineError(f"not a {SCHEMA} message: {error}") from None
    return event
