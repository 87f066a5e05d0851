"""Settings of policies: frozen dataclasses whose fields carry their unit, bounds and meaning.

    @dataclass(frozen=True, slots=True)
    class StallFreeSettings(Settings):
        token_budget: int = setting(512, "most tokens in one step", unit="tokens", at_least=1)

The same declaration validates, parses `name=value` text, and writes the documentation.
"""

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from headway.core.errors import ConfigError, unknown_name

__all__ = ["SettingDoc", "Settings", "setting"]


@dataclass(frozen=True, slots=True)
class SettingDoc:
    """One setting as shown to a person."""

    name: str
    default: Any
    unit: str
    doc: str


def setting(
    default: Any, doc: str, *, unit: str = "", at_least: float = -math.inf, at_most: float = math.inf
) -> Any:
    """Declare a field of a `Settings` dataclass. Bounds are inclusive; `None` values skip them."""
    return dataclasses.field(
        default=default, metadata={"doc": doc, "unit": unit, "at_least": at_least, "at_most": at_most}
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """Base of all settings. Raises ConfigError when a value is out of its bounds or not of its type."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            _check(type(self).__name__, field, hints[field.name], getattr(self, field.name))

    @classmethod
    def parse(cls, texts: Mapping[str, str], *, where: str) -> Self:
        """Build from text, as given on a command line. `where` names the policy in error messages."""
        hints = get_type_hints(cls)
        known = {field.name for field in dataclasses.fields(cls)}
        values = {}
        for name, text in texts.items():
            if name not in known:
                raise unknown_name("setting", name, known, where=where)
            values[name] = _convert(text, hints[name], f"{where}: {name}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def docs(cls) -> list[SettingDoc]:
        """Describe every setting, in order of declaration."""
        return [
            SettingDoc(f.name, f.default, f.metadata.get("unit", ""), f.metadata.get("doc", ""))
            for f in dataclasses.fields(cls)
        ]


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of `A | None`, or the hint alone."""
    return get_args(hint) if get_origin(hint) in (types.UnionType,) else (hint,)


def _convert(text: str, hint: Any, where: str) -> Any:
    options = _options(hint)
    if type(None) in options and text.lower() == "none":
        return None
    kind = next(o for o in options if o is not type(None))
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ConfigError(f"{where} must be one of {', '.join(get_args(kind))}, got {text!r}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{where} must be true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        name = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise ConfigError(f"{where} must be {name}, got {text!r}") from None


def _check(owner: str, field: Any, hint: Any, value: Any) -> None:
    options = _options(hint)
    if value is None and type(None) in options:
        return
    kind = next(o for o in options if o is not type(None))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{field.name} must be one of {', '.join(get_args(kind))}, got {value!r}")
        return
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
    if isinstance(value, float | int) and not isinstance(value, bool):
        low, high = field.metadata.get("at_least", -math.inf), field.metadata.get("at_most", math.inf)
        if not low <= value <= high:
            bound = f"at least {low:g}" if value < low or math.isnan(value) else f"at most {high:g}"
            raise ConfigError(f"{field.name} must be {bound}, got {value!r}")
