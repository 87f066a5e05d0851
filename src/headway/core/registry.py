"""Policies by name.

A *spec* is `name`, `name:setting=value:setting=value`, or `module:Class[:setting=value…]` for a policy of
one's own, which needs no registration:

    staggered
    stall-free:token_budget=2048
    my_package.mine:Patient:hold_s=0.1
"""

import importlib
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from headway.core.errors import ConfigError, unknown_name
from headway.core.settings import Settings

__all__ = ["Registry", "Rng", "split_spec"]


class Rng(Protocol):
    """The random numbers a policy may draw: a host hands in a seeded `random.Random`."""

    def random(self) -> float:
        """Return a number in [0, 1)."""
        ...

    def randrange(self, stop: int, /) -> int:
        """Return a whole number in [0, stop)."""
        ...


class _Policy(Protocol):
    Settings: type[Settings]


P = TypeVar("P", bound=type[Any])


class Registry:
    """The policies of one family. `base` is what a policy of one's own must derive from."""

    def __init__(self, what: str, base: type[Any]) -> None:
        self.what = what
        self._base = base
        self._classes: dict[str, type[Any]] = {}

    def register(self, name: str) -> Callable[[P], P]:
        """Class decorator: make a policy known under `name`."""

        def decorate(cls: P) -> P:
            if name in self._classes:
                raise ConfigError(f"{self.what} {name!r} is registered twice")
            self._classes[name] = cls
            cls.name = name
            return cls

        return decorate

    def names(self) -> list[str]:
        """Names in order of registration."""
        return list(self._classes)

    def find(self, spec: str) -> tuple[type[Any], Settings]:
        """Return the class and the parsed settings of a spec. Raises ConfigError naming what is wrong."""
        name, texts = split_spec(spec)
        cls = self._classes.get(name) or self._load(name)
        return cls, cls.Settings.parse(texts, where=f"{self.what} {name}")

    def create(self, spec: str, rng: Rng) -> Any:
        """Build the policy a spec names."""
        cls, settings = self.find(spec)
        return cls(settings, rng)

    def _load(self, name: str) -> type[Any]:
        module, colon, attribute = name.partition(":")
        if not colon:
            raise unknown_name(self.what, name, self._classes)
        if not all(part.isidentifier() for part in module.split(".")):
            raise ConfigError(f"{self.what} {name!r}: cannot import {module!r}: not the name of a module")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise ConfigError(f"{self.what} {name!r}: cannot import {module!r}: {error}") from None
        except AttributeError:
            raise ConfigError(f"{self.what} {name!r}: module {module!r} has no {attribute!r}") from None
        if not (isinstance(found, type) and issubclass(found, self._base)):
            raise ConfigError(f"{self.what} {name!r} is not a subclass of {self._base.__name__}")
        return found


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split a spec into its name and its settings as text.

    >>> split_spec("my.mod:Mine:hold_s=0.1")
    ('my.mod:Mine', {'hold_s': '0.1'})
    """
    parts = spec.strip().split(":")
    names = [p for p in parts if "=" not in p]
    texts = {}
    for part in parts[len(names) :]:
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{spec!r}: settings come last, as name=value; {part!r} is not one")
        texts[key.strip()] = value.strip()
    name = ":".join(names)
    if not name:
        raise ConfigError(f"{spec!r} names no policy")
    return name, texts
