"""Errors have owners.

HeadwayError ├── ConfigError     yours: a setting, a file, a name. One clear line; exit status 2. ├──
EngineError     theirs: an engine that answers wrongly, late or not at all. └── InvariantError  ours: a bug in
Headway. Please report it.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["ConfigError", "EngineError", "HeadwayError", "InvariantError", "unknown_name"]


class HeadwayError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(HeadwayError):
    """The user's configuration or input is wrong; the message names what and where in one line."""


class EngineError(HeadwayError):
    """An engine broke its protocol."""


class InvariantError(HeadwayError):
    """Headway contradicts itself: a bug of ours."""


def unknown_name(what: str, name: str, known: Iterable[str], *, where: str = "") -> ConfigError:
    """Build the error for a name nobody knows, with the nearest known one.

    >>> str(unknown_name("policy", "stagered", ["staggered", "random"]))
    "unknown policy 'stagered': did you mean 'staggered'? (known: random, staggered)"
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    place = f"{where}: " if where else ""
    return ConfigError(f"{place}unknown {what} {name!r}: {hint}(known: {', '.join(names) or 'none'})")
