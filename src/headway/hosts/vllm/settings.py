"""Decides what the plug-in is to do, from `--additional-config '{"headway": {…}}'` or the environment.

Rule 1. What `--additional-config` says goes before `HEADWAY_<NAME>` in the environment.
Rule 2. Whatever is wrong is a ConfigError of one line, at the start.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from headway.core.batch import BatchPolicy, batch_policies
from headway.core.errors import ConfigError
from headway.core.registry import Rng
from headway.core.request import Slo
from headway.core.settings import Settings, setting
from headway.wire.publisher import has_sound_port

__all__ = ["VllmSettings", "read"]

_ENVIRONMENT = "HEADWAY_"


@dataclass(frozen=True, slots=True)
class VllmSettings(Settings):
    """Settings of the plug-in. Raises ConfigError for a value that cannot be."""

    policy: str = setting(
        "fair", "batch policy, its settings after colons: fair, triage:aging_tokens_s=500, …"
    )
    ttft_s: float = setting(
        2.0, "TTFT target of requests that name none", unit="s", at_least=0.001, at_most=600
    )
    tpot_s: float = setting(
        0.05, "TPOT target of requests that name none", unit="s", at_least=0.001, at_most=60
    )
    margin: float | None = setting(
        None,
        "share of steps to end within their budget (margin_quantile of the policy)",
        unit="share",
        at_least=0,
        at_most=1,
    )
    name: str = setting("vllm", "the instance's name in pass events")
    events: str | None = setting(None, "ZeroMQ address to publish pass events at, as tcp://127.0.0.1:5557")
    snapshots: str | None = setting(None, "ZeroMQ address to answer snapshot requests at")
    steps: str | None = setting(None, "CSV file to record every step in, for headway calibrate")
    seed: int = setting(0, "of the policy's random numbers")

    def __post_init__(self) -> None:
        super(VllmSettings, self).__post_init__()  # slots: the class is made anew, which `super()` misses
        if self.snapshots and not self.events:
            raise ConfigError("snapshots needs events")
        for name in ("events", "snapshots"):
            address = getattr(self, name)
            if address is not None and not has_sound_port(address):
                raise ConfigError(
                    f"{name}: {address!r} needs a port from 0 to 65535, as tcp://127.0.0.1:5557"
                )
        if not self.name:
            raise ConfigError("name must not be empty")
        if self.steps is not None and not Path(self.steps).name:
            raise ConfigError(f"steps must name a file, got {self.steps!r}")
        batch_policies.find(self._spec)

    @property
    def slo(self) -> Slo:
        """Targets of requests that name none."""
        return Slo(self.ttft_s, self.tpot_s)

    @property
    def _spec(self) -> str:
        return self.policy if self.margin is None else f"{self.policy}:margin_quantile={self.margin}"

    def make_policy(self, rng: Rng) -> BatchPolicy:
        """Build the batch policy."""
        policy: BatchPolicy = batch_policies.create(self._spec, rng)
        return policy


def read(additional_config: Any, environment: Mapping[str, str] | None = None) -> VllmSettings:
    """Return the settings of an engine. Raises ConfigError naming the setting that is wrong."""
    if environment is None:
        environment = os.environ
    names = [field.name for field in fields(VllmSettings)]
    texts = {name: environment.get(_ENVIRONMENT + name.upper()) for name in names}
    given = additional_config.get("headway", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"additional_config: headway must be a map of settings, got {json.dumps(given)}")
    # One reader for both, so that a bad value reads the same whichever way it came.
    return VllmSettings.parse(
        {name: text for name, text in texts.items() if text is not None}
        | {name: "none" if value is None else str(value) for name, value in given.items()},
        where="headway in vLLM",
    )
