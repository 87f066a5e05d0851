"""Decides what the service-discovery flags of `vllm-router` and `smg` mean: a `[discovery]` table."""

import re
from collections.abc import Mapping
from typing import Any

from headway.cli.drop_in_flags import NONE, ONE, SOME
from headway.cli.drop_in_words import GivenFlags, whole
from headway.core.errors import ConfigError

__all__ = ["DISCOVERY_FLAGS", "discovery_of"]

#: The flags that are read here, and how many words follow each.
DISCOVERY_FLAGS: dict[str, str] = {
    "--service-discovery": NONE,
    "--discovery-provider": ONE,
    "--selector": SOME,
    "--prefill-selector": SOME,
    "--decode-selector": SOME,
    "--service-discovery-port": ONE,
    "--service-discovery-namespace": ONE,
}
#: The port of an engine's pod where none is given, as there.
PORT = 80
_ENGINES = ("--worker-urls", "--prefill", "--decode")


def discovery_of(
    given: GivenFlags, engine: Mapping[str, Any], prefill: Mapping[str, Any], *, split: bool
) -> dict[str, Any] | None:
    """Return the table that the flags ask for, None where engines are not to be discovered.

    `engine`: what an engine is beside its address; `prefill`: what a prefill engine is besides. `split`:
    whether prefill and decode are apart. Raises ConfigError for flags that do not fit together.
    """
    provider = given.text("--discovery-provider", "kubernetes")
    if provider != "kubernetes":
        raise ConfigError(f"--discovery-provider {provider}: only kubernetes can be asked here")
    if not given.has("--service-discovery") and not given.has("--discovery-provider"):
        _refuse_strays(given)
        return None
    both = next((flag for flag in _ENGINES if given.words(flag)), None)
    if both is not None:
        raise ConfigError(f"{both}: with --service-discovery the engines are found, not named")
    table: dict[str, Any] = {
        "target_ports": [given.number("--service-discovery-port", whole) or PORT],
        "engine": dict(engine),
    }
    namespace = given.text("--service-discovery-namespace", "")
    if namespace:
        table["namespace"] = namespace
    if split:
        selectors = {flag: _labels(given, flag) for flag in ("--prefill-selector", "--decode-selector")}
        table["prefill"] = {**engine, **prefill}
        return table | {flag[2:].replace("-", "_"): labels for flag, labels in selectors.items()}
    return table | {"selector": _labels(given, "--selector")}


def _refuse_strays(given: GivenFlags) -> None:
    stray = next((flag for flag in DISCOVERY_FLAGS if given.has(flag)), None)
    if stray is not None:
        raise ConfigError(f"{stray}: needs --service-discovery")


def _labels(given: GivenFlags, flag: str) -> str:
    words = given.words(flag)
    if not words:
        raise ConfigError(f"--service-discovery: needs {flag} KEY=VALUE…")
    for word in words:
        if not re.fullmatch(r"[\w./-]+=[\w.-]*", word):
            raise ConfigError(f"{flag}: {word!r} is not KEY=VALUE")
    return ",".join(words)
