"""How a wrong configuration is told to its owner: one line with file, key path and the nearest key there is.

Takes the errors of a validator as plain dictionaries (`type`, `loc`, `msg`, `input`: pydantic's `errors()`),
so that the core needs none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from headway.core.errors import ConfigError

__all__ = ["complaint", "key_path"]

_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")

Location = Sequence[int | str]


def key_path(loc: Location) -> str:
    """Write a location as in TOML.

    >>> key_path(("instances", 0, "url"))
    'instances[0].url'
    """
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def complaint(
    errors: Iterable[Mapping[str, Any]],
    known_keys: Callable[[Location], Sequence[str]],
    *,
    where: str,
    path_of: Callable[[Location], str] = key_path,
) -> ConfigError:
    """Build the error for the first of `errors`, a misspelt key before the key that is missing for it.

    `known_keys(loc)` names the keys of the table at `loc`; `where` is the file. `path_of(loc)`
    writes a location, where the validator's is not quite the file's.
    """
    first = min(errors, key=lambda each: each["type"] not in _UNKNOWN_KEY)
    *table, last = first["loc"] or ("",)
    path = path_of(first["loc"])
    if first["type"] in _UNKNOWN_KEY:
        known = known_keys(table)
        near = get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return ConfigError(f"{where}: unknown key {path}: {hint}(known: {', '.join(known)})")
    if first["type"] == "missing":
        return ConfigError(f"{where}: missing key {path}")
    message = first["msg"].removeprefix("Value error, ")
    place = f"{where}: {path}" if path else where
    given = f", got {first['input']!r}" if isinstance(first["input"], str | int | float) else ""
    return ConfigError(f"{place}: {message[0].lower()}{message[1:]}{given}")
