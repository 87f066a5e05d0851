"""Reads a command line of another router: its flags, the words that follow each, and what they say."""

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from headway.cli.drop_in_flags import NONE, ONE, SOME
from headway.core.errors import ConfigError

__all__ = ["GivenFlags", "as_is", "real", "whole"]

#: Flags by which a command line is known to be smg's.
_OF_SMG = ("--pd-disaggregation", "--epd-disaggregation", "--backend", "--dp-aware")


class GivenFlags:
    """The flags of a command line: for each, the words that follow it, once per time it is given."""

    def __init__(self, smg: bool) -> None:
        self.smg = smg
        self.all: dict[str, list[list[str]]] = {}

    @classmethod
    def scan(cls, words: Sequence[str], takes: Mapping[str, str], known: Sequence[str]) -> "GivenFlags":
        """Sort words to flags. `takes`: how many words follow each flag; `known`: more flags, to name the
        nearest. Raises ConfigError for an unknown flag and for a word that belongs to no flag.
        """
        rest = list(words)
        launch = rest[:1] == ["launch"]
        given = cls(launch or any(word.partition("=")[0] in _OF_SMG for word in rest))
        rest = rest[1:] if launch else rest
        while rest:
            flag, equals, value = rest.pop(0).partition("=")
            if not flag.startswith("--"):
                raise ConfigError(f"command line: nothing takes {flag!r}")
            if flag not in takes:
                raise _unknown(flag, [*takes, *known])
            given.all.setdefault(flag, []).append([value] if equals else _take(flag, takes[flag], rest))
        return given

    def has(self, flag: str) -> bool:
        """Whether a flag is given."""
        return flag in self.all

    def words(self, flag: str) -> list[str]:
        """Return what follows a flag, all times together."""
        return [word for words in self.all.get(flag, []) for word in words]

    def text(self, flag: str, default: str) -> str:
        """Return the last value."""
        return self.words(flag)[-1] if self.has(flag) else default

    def number(self, flag: str, read: Callable[[str, str], float]) -> Any:
        """Return the last value as a number, None where the flag is not given."""
        return read(flag, self.words(flag)[-1]) if self.has(flag) else None


def _unknown(flag: str, known: Sequence[str]) -> ConfigError:
    """Name the nearest flag. The dashes do not count: every flag has them."""
    names = {name.lstrip("-"): name for name in known}
    near = get_close_matches(flag.lstrip("-"), names, n=1, cutoff=0.7)
    return ConfigError(
        f"unknown flag {flag}: " + (f"did you mean {names[near[0]]}?" if near else "see --help")
    )


def _take(flag: str, takes: str, rest: list[str]) -> list[str]:
    """Take the words that follow a flag off `rest`."""
    taken: list[str] = []
    most = {NONE: 0, ONE: 1}.get(takes, len(rest))
    while rest and len(taken) < most and not rest[0].startswith("--"):
        taken.append(rest.pop(0))
    if not taken and takes in (ONE, SOME):
        raise ConfigError(f"{flag}: a value is missing")
    return taken


def whole(flag: str, text: str) -> int:
    """Return a flag's value as a whole number. Raises ConfigError."""
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not a whole number") from None


def real(flag: str, text: str) -> float:
    """Return a flag's value as a finite number. Raises ConfigError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{flag}: {text!r} is not a number")
    return value


def as_is(flag: str, text: str) -> str:
    """Return a flag's value."""
    return text
