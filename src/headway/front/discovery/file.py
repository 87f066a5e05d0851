"""Finds the engines in a file that others write: TOML, JSON or YAML, by its suffix.

    [[instances]]                  as in the configuration
    name = "engine-0"
    url = "http://10.0.0.1:8000"

or, as llm-d's file discovery has it, `endpoints`: `name`, `address`, `port`, `labels`, and `namespace`, which
then stands before the name. What such an engine is beside that, `[discovery]` says, as of a pod.

Rule 1. The file is read again when it has changed. One that cannot be read, in whole or in part, changes
        nothing, and one line says why: the writer may be in the middle of it.
Rule 2. It lists all engines. One that is listed no more is drained.
"""

import asyncio
import json
import logging
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from headway.core.complaints import complaint
from headway.core.errors import ConfigError
from headway.front.config import DiscoverySpec, InstanceSpec, Spec, parse_instance
from headway.front.discovery.contract import Found, Tell
from headway.front.discovery.pods import instance_of

__all__ = ["FileSource", "read_instances"]

log = logging.getLogger("headway.discovery")


class _Endpoint(Spec):
    """An entry of `endpoints`."""

    name: str = Field(min_length=1)
    address: str = Field(pattern=r"^[A-Za-z0-9.:-]+$")
    port: int = Field(ge=1, le=65535)
    namespace: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)


class FileSource:
    """A file of engines. `fits(instance)` raises ConfigError for one that is not for this cluster."""

    def __init__(self, spec: DiscoverySpec, file: Path, fits: Callable[[InstanceSpec], None]) -> None:
        self._spec, self._file, self._fits = spec, file, fits

    def check(self) -> None:
        """Raise ConfigError when the file is wrong."""
        self._read()

    async def follow(self, tell: Tell) -> None:
        """Tell the engines there are until cancelled."""
        seen: object = None
        while True:
            stamp = await asyncio.to_thread(self._stamp)
            if stamp != seen:
                seen = stamp
                try:
                    found = await asyncio.to_thread(self._read)
                except ConfigError as error:
                    log.error("engines not read again: %s", error)
                else:
                    tell(found)
            await asyncio.sleep(self._spec.interval_s)

    def _stamp(self) -> object:
        """Return what differs when the file does. A changed ConfigMap is another file behind its link."""
        try:
            stat = self._file.stat()
        except OSError:
            return "missing"
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> Found:
        instances = read_instances(self._file, self._spec)
        for each in instances:
            try:
                self._fits(each)
            except ConfigError as error:
                raise ConfigError(f"{self._file}: {error}") from None
        return Found(instances)


def read_instances(file: Path, spec: DiscoverySpec) -> tuple[InstanceSpec, ...]:
    """Read a file of engines. Raises ConfigError: one line with the file and what is wrong in it."""
    where = str(file)
    data = _data(file)
    tables = {key: data[key] for key in ("instances", "endpoints") if key in data}
    if len(tables) != 1 or len(data) != 1:
        raise ConfigError(f"{where}: needs the list instances or the list endpoints, and nothing else")
    ((key, entries),) = tables.items()
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ConfigError(f"{where}: {key} must be a list of tables")
    read = _instance if key == "instances" else _endpoint
    found = tuple(read(each, spec, f"{where}: {key}[{number}]") for number, each in enumerate(entries))
    names = [each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: two engines are called {twice!r}")
    return found


def _instance(data: Mapping[str, Any], spec: DiscoverySpec, where: str) -> InstanceSpec:
    return parse_instance(data, where=where)


def _endpoint(data: Mapping[str, Any], spec: DiscoverySpec, where: str) -> InstanceSpec:
    try:
        entry = _Endpoint.model_validate(data)
    except ValidationError as error:
        raise complaint(error.errors(), lambda loc: tuple(_Endpoint.model_fields), where=where) from None
    name = entry.name if entry.namespace is None else f"{entry.namespace}.{entry.name}"
    return instance_of(spec, name, entry.address, [entry.port], entry.labels, where=where)


def _data(file: Path) -> dict[str, Any]:
    """Read what stands in the file: a table."""
    parsers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".json": json.loads,
        ".yaml": _yaml,
        ".yml": _yaml,
    }
    parse = parsers.get(file.suffix)
    if parse is None:
        raise ConfigError(f"{file}: a file of engines ends in .toml, .json, .yaml or .yml")
    try:
        data = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot read the engines: {error.strerror}") from None
    except ValueError as error:  # of all three, and of a text that is no UTF-8
        raise ConfigError(f"{file}: not {file.suffix[1:].upper()}: {' '.join(str(error).split())}") from None
    return data if isinstance(data, dict) else {"instances": data}


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError("a file of engines in YAML needs PyYAML: pip install pyyaml") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
