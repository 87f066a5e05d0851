"""Finds the engines in a file that others write: TOML, JSON or YAML, by its suffix.

    [[instances]]                  as in the configuration
    name = "engine-0"
    url = "http://10.0.0.1:8000"

or, as llm-d's file discovery has it, `endpoints`: `name`, `address`, `port`, `labels`, and `namespace`, which
then stands before the name. What such an engine is beside that, `[discovery]` says, as of a pod.

Rule 1. The file is read again when it has changed. One that is no list of engines changes nothing, and one
        line says why: the writer may be in the middle of it.
Rule 2. Every entry is read by itself. A wrong one leaves its engine as it was, and keeps no other out; one
        line says what is wrong. One without a name could be any engine's: then the file changes nothing.
Rule 3. It lists all engines. One that is listed no more is drained. At the start nothing may be wrong.
"""

import asyncio
import json
import logging
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from headway.core.complaints import complaint
from headway.core.errors import ConfigError
from headway.front.addresses import Addresses
from headway.front.config import DiscoverySpec, InstanceSpec, Spec, parse_instance
from headway.front.discovery.contract import Found, Tell
from headway.front.discovery.pods import instance_name, instance_of

__all__ = ["FileSource", "read_instances"]

log = logging.getLogger("headway.discovery")


class _Endpoint(Spec):
    """An entry of `endpoints`."""

    name: str = Field(min_length=1)
    address: str = Field(pattern=r"^[A-Za-z0-9.:-]+$")
    port: int = Field(ge=1, le=65535)
    namespace: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one entry of the file is: an engine, or what is wrong with it. `name` None: it cannot be read."""

    name: str | None
    found: InstanceSpec | ConfigError


class FileSource:
    """A file of engines. `fits(instance)` raises ConfigError for one that is not for this cluster."""

    def __init__(self, spec: DiscoverySpec, file: Path, fits: Callable[[InstanceSpec], None]) -> None:
        self._spec, self._file, self._fits = spec, file, fits
        self._last: dict[str, InstanceSpec] = {}
        self._complained: set[str] = set()

    def check(self) -> None:
        """Raise ConfigError when the file, or any engine in it, is wrong."""
        for entry in self._entries():
            if isinstance(entry.found, ConfigError):
                raise entry.found

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
        """Return the engines there are. Raises ConfigError when that cannot be known (rule 2)."""
        entries = self._entries()
        found: dict[str, InstanceSpec] = {}
        problems: set[str] = set()
        for entry in entries:
            if isinstance(entry.found, InstanceSpec):
                found[entry.found.name] = entry.found
            elif entry.name is None:
                raise entry.found
            else:
                problems.add(str(entry.found))
                if entry.name in self._last:
                    found.setdefault(entry.name, self._last[entry.name])
        for problem in sorted(problems - self._complained):
            log.error("an engine is left as it was: %s", problem)
        self._last, self._complained = found, problems
        return Found(tuple(found.values()))

    def _entries(self) -> list[_Entry]:
        """Read every entry by itself. Raises ConfigError when the file is no list of engines."""
        names: set[str] = set()
        taken = Addresses()
        return [self._fitted(entry, names, taken) for entry in _entries(self._file, self._spec)]

    def _fitted(self, entry: _Entry, names: set[str], taken: Addresses) -> _Entry:
        """Return an entry, with what is wrong with it beside the others."""
        if isinstance(entry.found, ConfigError):
            return entry
        try:
            if entry.found.name in names:
                raise ConfigError(f"two engines are called {entry.found.name!r}")
            self._fits(entry.found)
            taken.claim(entry.found)
        except ConfigError as error:
            return _Entry(entry.name, ConfigError(f"{self._file}: {error}"))
        names.add(entry.found.name)
        return entry


def read_instances(file: Path, spec: DiscoverySpec) -> tuple[InstanceSpec, ...]:
    """Read a file of engines. Raises ConfigError: one line with the file and what is wrong in it."""
    found: list[InstanceSpec] = []
    for entry in _entries(file, spec):
        if isinstance(entry.found, ConfigError):
            raise entry.found
        found.append(entry.found)
    return tuple(found)


def _entries(file: Path, spec: DiscoverySpec) -> list[_Entry]:
    where = str(file)
    data = _data(file)
    tables = {key: data[key] for key in ("instances", "endpoints") if key in data}
    if len(tables) != 1 or len(data) != 1:
        raise ConfigError(f"{where}: needs the list instances or the list endpoints, and nothing else")
    ((key, entries),) = tables.items()
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ConfigError(f"{where}: {key} must be a list of tables")
    read = _instance if key == "instances" else _endpoint
    return [_entry(read, each, spec, f"{where}: {key}[{number}]") for number, each in enumerate(entries)]


def _entry(
    read: Callable[[Mapping[str, Any], DiscoverySpec, str], InstanceSpec],
    data: Mapping[str, Any],
    spec: DiscoverySpec,
    where: str,
) -> _Entry:
    try:
        found = read(data, spec, where)
    except ConfigError as error:
        name, namespace = data.get("name"), data.get("namespace")
        if not isinstance(name, str):
            return _Entry(None, error)
        whole = f"{namespace}.{name}" if isinstance(namespace, str) else name
        return _Entry(instance_name(whole), error)
    return _Entry(found.name, found)


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
    except RecursionError:
        raise ConfigError(f"{file}: not {file.suffix[1:].upper()}: nested too deeply") from None
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
