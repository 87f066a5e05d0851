"""Decides what a request's own latency targets are, and which are nonsense.

Rule 1. `slo_ttft_ms` and `slo_tpot_ms` are numbers of milliseconds: not text, not true, not zero or less.
Rule 2. Beyond ten minutes to the first token, or one between tokens, nobody is waiting: most likely the unit
        was mistaken, and that is said rather than obeyed.
Rule 3. A target that is not given is the engine's default.
"""

from collections.abc import Mapping
from typing import Any, Final

from headway.core.errors import ConfigError
from headway.core.request import Slo

__all__ = ["DISPATCH", "KEYS", "slo_of"]

#: Key → the most that is believed, in ms.
KEYS: Final[dict[str, float]] = {"slo_ttft_ms": 600_000.0, "slo_tpot_ms": 60_000.0}

#: Under this key the number of a dispatch comes with a request (`x-headway-dispatch`).
DISPATCH: Final = "headway_dispatch"


def slo_of(extra: Mapping[str, Any] | None, default: Slo) -> Slo:
    """Return the targets among a request's extra arguments. Raises ConfigError for one that is nonsense."""
    if not extra or not (KEYS.keys() & extra.keys()):
        return default
    ttft_ms, tpot_ms = (_milliseconds(extra, key) for key in KEYS)
    return Slo(
        default.ttft_s if ttft_ms is None else ttft_ms / 1000.0,
        default.tpot_s if tpot_ms is None else tpot_ms / 1000.0,
    )


def _milliseconds(extra: Mapping[str, Any], key: str) -> float | None:
    value = extra.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} must be a number of milliseconds, got {value!r}")
    if not 0.0 < value <= KEYS[key]:  # NaN fails too
        raise ConfigError(
            f"{key} must be more than 0 and at most {KEYS[key]:.0f} milliseconds, got {value!r}"
        )
    return float(value)
