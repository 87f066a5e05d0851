"""Decides what can go wrong with an emulated engine while it runs.

refuse      connections are closed before an answer; with `status` (503, say) that is the answer
hang        nothing is answered and no pass ends, until it recovers
slow        passes take `factor` times as long
crash       all connections are cut, requests and KV are lost; it comes back in a new epoch
error_rate  a share `rate` of the requests is answered with `status` (500), before an engine sees them
"""

import math
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from headway.core.errors import ConfigError, unknown_name

__all__ = ["Fault", "FaultKind", "parse_fault"]

FaultKind = Literal["refuse", "hang", "slow", "crash", "error_rate"]


class Fault(Struct, frozen=True, forbid_unknown_fields=True):
    """A fault to switch on. `for_s`: it ends by itself after so long (wall time); None: when it is told to.

    Raises ConfigError for a kind nobody knows, a factor that is not positive, a rate outside of [0, 1].
    """

    kind: str
    factor: float = 2.0
    rate: float = 0.1
    status: Annotated[int, Meta(ge=400, le=599)] | None = None
    for_s: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise unknown_name("fault", self.kind, (*get_args(FaultKind), "none"))
        for name in ("factor", "for_s"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"fault {self.kind}: {name} must be a positive number, got {value!r}")
        if not 0.0 <= self.rate <= 1.0:
            raise ConfigError(f"fault {self.kind}: rate must be between 0 and 1, got {self.rate!r}")


def parse_fault(body: bytes) -> Fault | None:
    """Read `{"kind": …}` as posted to /fault; kind "none" ends the fault. Raises ConfigError.

    >>> parse_fault(b'{"kind": "slow", "factor": 3}')
    Fault(kind='slow', factor=3.0, rate=0.1, status=None, for_s=None)
    """
    try:
        raw = msgspec.json.decode(body)
        if isinstance(raw, dict) and raw.get("kind") == "none":
            return None
        return msgspec.convert(raw, Fault)
    except ConfigError:
        raise
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"fault: {error}") from None
