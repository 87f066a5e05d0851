"""Faults to inject into a simulation, and how they are written on a command line.

die:prefill-1@12.5       everything there is lost; `recover` restarts it, empty, in a new epoch
hang:decode-0@3          passes never end, polls go unanswered; `recover` lets it go on where it was
slow:prefill-0@10x3      passes take three times as long, until `recover`
recover:prefill-1@20
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from headway.core.errors import ConfigError, unknown_name

__all__ = ["Fault", "FaultKind", "parse_fault"]

FaultKind = Literal["die", "hang", "slow", "recover"]

_FORM = re.compile(r"(?P<kind>[^:@]+):(?P<instance>[^:@]+)@(?P<at>[^x]+)(?:x(?P<factor>.+))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong, or right again, with one instance at `at_s`.

    `factor` multiplies pass times; only `slow` has one. Raises ConfigError for a kind nobody knows, a time
    that is negative or not finite, a factor that is not positive.
    """

    at_s: float
    instance: str
    kind: FaultKind
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise unknown_name("fault", self.kind, get_args(FaultKind))
        if not 0.0 <= self.at_s < math.inf:
            raise ConfigError(
                f"fault {self.kind}:{self.instance}: the time must be at least 0 s, got {self.at_s!r}"
            )
        if not 0.0 < self.factor < math.inf:
            raise ConfigError(
                f"fault {self.kind}:{self.instance}: the factor must be positive, got {self.factor!r}"
            )


def parse_fault(text: str) -> Fault:
    """Read `kind:instance@seconds`, or `slow:instance@secondsxfactor`.

    Raises ConfigError saying what is wrong.

    >>> parse_fault("slow:prefill-0@10x3")
    Fault(at_s=10.0, instance='prefill-0', kind='slow', factor=3.0)
    """
    found = _FORM.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"fault {text!r}: write kind:instance@seconds, for instance die:prefill-1@12.5")
    kind, factor = found["kind"], found["factor"]
    if kind not in get_args(FaultKind):
        raise unknown_name("fault", kind, get_args(FaultKind), where=f"fault {text!r}")
    if (kind == "slow") != (factor is not None):
        raise ConfigError(
            f"fault {text!r}: slow needs a factor, as in slow:{found['instance']}@10x3; no other has one"
        )
    at_s, times = _number(text, found["at"]), _number(text, factor or "1")
    return Fault(at_s, found["instance"], cast(FaultKind, kind), times)


def _number(text: str, digits: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise ConfigError(f"fault {text!r}: {digits!r} is not a number") from None
