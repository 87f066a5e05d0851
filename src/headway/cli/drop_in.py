"""Decides what the flags of `vllm-router` (0.1.17) and `smg launch` (1.13.0) mean here.

A start script swaps the program's name and works.

Rule 1. Every flag of theirs is known. It sets a key of the gateway's configuration, or it is taken with a
        warning that says it has no effect; none is dropped in silence. What would send requests astray
        (another KV hand-over, an encode pool) is refused.
Rule 2. A flag nobody knows is an error that names the nearest known one.
Rule 3. What a script leaves unsaid is Headway's default, but for what others in the script's surroundings
        rely on: the port (30000), the port of the metrics (29000), the size of a body (512 MiB), and smg's
        habit to listen everywhere.
Rule 4. `smg` is meant when the first word is `launch` or a flag says so; `vllm-router` else. They differ in
        the default host and engine, and in what `--api-key` guards: the engines in both, the door in smg.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from headway.cli.drop_in_flags import ANY, IDLE, NONE, ONE, SOME
from headway.core.cluster import cluster_policies
from headway.core.errors import ConfigError, unknown_name
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.worker_api import instance_name

__all__ = ["DropIn", "read_flags"]

PORT, METRICS_PORT, MOST_BODY_BYTES = 30_000, 29_000, 512 << 20
#: SGLang's own default of `--disaggregation-bootstrap-port`.
BOOTSTRAP_PORT = 8998
#: Where keys from the command line are put: the configuration names variables, never secrets.
DOOR_KEY_ENV, ENGINE_KEY_ENV = "HEADWAY_DROP_IN_API_KEY", "HEADWAY_DROP_IN_ENGINE_API_KEY"

#: Their policies and ours. What goes by prefix there goes to the policy that counts cached prefixes; what
#: goes by key or session goes by load.
POLICIES = {
    "random": "random",
    "round_robin": "round-robin",
    "passthrough": "round-robin",
    "power_of_two": "power-of-two",
    "least_load": "least-tokens",
    "bucket": "least-tokens",
    "cache_aware": "staggered",
    "kv_aware": "staggered",
    "prefix_hash": "staggered",
    "consistent_hash": "least-tokens",
    "consistent_hashing": "least-tokens",
    "sticky_least_loaded": "least-tokens",
    "manual": "least-tokens",
}
_BY_PREFIX = frozenset(("cache_aware", "kv_aware", "prefix_hash"))
_BY_LOAD = frozenset(name for name, ours in POLICIES.items() if ours == "least-tokens") - {"least_load"}

#: Flags with an effect that is more than one key, and what follows them.
_SPECIAL = {
    "--worker-urls": ANY,
    "--prefill": SOME,
    "--decode": ONE,
    "--prefill-policy": ONE,
    "--decode-policy": ONE,
    "--vllm-pd-disaggregation": NONE,
    "--pd-disaggregation": NONE,
    "--backend": ONE,
    "--intra-node-data-parallel-size": ONE,
    "--chunk-tokens": ONE,  # ours: what an engine takes in one pass
    "--max-concurrent-requests": ONE,
    "--queue-size": ONE,
    "--rate-limit-tokens-per-second": ONE,
    "--api-key": ONE,
    "--retry-max-retries": ONE,
    "--disable-retries": NONE,
    "--cb-failure-threshold": ONE,
    "--health-failure-threshold": ONE,
    "--cb-success-threshold": ONE,
    "--health-success-threshold": ONE,
    "--tls-cert-path": ONE,
    "--tls-key-path": ONE,
    "--tokenizer-path": ONE,
    "--kv-connector": ONE,
    "--epd-disaggregation": NONE,
    "--encode": SOME,
    "--log-json": NONE,  # they always are
}

#: Flags that `headway serve` has itself.
_OWN = (
    "--config",
    "--check",
    "--cluster",
    "--policy",
    "--host",
    "--port",
    "--log-level",
    "--speed",
    "--batch",
)
_OF_SMG = ("--pd-disaggregation", "--epd-disaggregation", "--backend", "--dp-aware")


@dataclass(frozen=True, slots=True)
class DropIn:
    """What a command line of theirs comes to. `notes`: one line for each thing that differs."""

    config: GatewayConfig
    notes: list[str]


def read_flags(
    words: Sequence[str], *, host: str | None = None, port: int | None = None, policy: str | None = None
) -> DropIn:
    """Read the flags of either program, but for those that `headway serve` has under the same name.

    Keys go into this process's environment, under the names that the configuration then has. Raises
    ConfigError for a flag or value nobody knows, naming the flag and the nearest known one.
    """
    draft = _Draft(_Given.scan(words), host, port, policy or "")
    return DropIn(GatewayConfig.parse(draft.data(), where="command line"), draft.notes)


class _Given:
    """The flags of a command line: for each, the words that follow it, once per time it is given."""

    def __init__(self, smg: bool) -> None:
        self.smg = smg
        self.all: dict[str, list[list[str]]] = {}

    @classmethod
    def scan(cls, words: Sequence[str]) -> "_Given":
        """Sort words to flags. Raises ConfigError for flags nobody knows and words that belong to none."""
        rest = list(words)
        launch = rest[:1] == ["launch"]
        given = cls(launch or any(word.partition("=")[0] in _OF_SMG for word in rest))
        rest = rest[1:] if launch else rest
        while rest:
            flag, equals, value = rest.pop(0).partition("=")
            if not flag.startswith("--"):
                raise ConfigError(f"command line: nothing takes {flag!r}")
            if flag not in _TAKES:
                raise _unknown(flag)
            given.all.setdefault(flag, []).append([value] if equals else _take(flag, rest))
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


def _unknown(flag: str) -> ConfigError:
    near = get_close_matches(flag, [*_TAKES, *_OWN], n=1, cutoff=0.5)
    return ConfigError(f"unknown flag {flag}: " + (f"did you mean {near[0]}?" if near else "see --help"))


def _take(flag: str, rest: list[str]) -> list[str]:
    """Take the words that follow a flag off `rest`."""
    takes = _TAKES[flag]
    taken: list[str] = []
    most = {NONE: 0, ONE: 1}.get(takes, len(rest))
    while rest and len(taken) < most and not rest[0].startswith("--"):
        taken.append(rest.pop(0))
    if not taken and takes in (ONE, SOME):
        raise ConfigError(f"{flag}: a value is missing")
    return taken


def _whole(flag: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag}: {text!r} is not a whole number") from None


def _real(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{flag}: {text!r} is not a number")
    return value


def _as_is(flag: str, text: str) -> str:
    return text


_Read = Callable[[str, str], Any]

#: Flags that set one key of one table.
_KEYS: dict[str, tuple[str, str, _Read]] = {
    "--shutdown-grace-period-secs": ("server", "drain_timeout_s", _real),
    "--max-payload-size": ("limits", "max_body_bytes", _whole),
    "--queue-timeout-secs": ("limits", "queue_timeout_s", _real),
    "--request-timeout-secs": ("limits", "first_byte_timeout_s", _real),
    "--header-read-timeout-secs": ("limits", "header_timeout_s", _real),
    "--stream-body-stall-timeout-secs": ("limits", "idle_timeout_s", _real),
    "--health-check-timeout-secs": ("health", "timeout_s", _real),
    "--health-check-interval-secs": ("health", "interval_s", _real),
    "--health-check-endpoint": ("health", "path", _as_is),
    "--prometheus-host": ("metrics", "host", _as_is),
    "--prometheus-port": ("metrics", "port", _whole),
}

_TAKES: Mapping[str, str] = {**dict.fromkeys(_KEYS, ONE), **_SPECIAL, **IDLE}


class _Draft:
    """A configuration in the making."""

    def __init__(self, given: _Given, host: str | None, port: int | None, policy: str) -> None:
        self.notes: list[str] = []
        self._given = given
        self._main_policy = policy
        self._ranks = given.number("--intra-node-data-parallel-size", _whole) or 1
        self._chunk = given.number("--chunk-tokens", _whole)
        host = host or ("0.0.0.0" if given.smg else "127.0.0.1")
        self._tables: dict[str, dict[str, Any]] = {
            "server": {"host": host, "port": PORT if port is None else port},
            "limits": {"max_body_bytes": MOST_BODY_BYTES},
            "metrics": {"port": METRICS_PORT},
        }
        for flag, (table, key, read) in _KEYS.items():
            if given.has(flag):
                self._set(table, key, given.number(flag, read))

    def data(self) -> dict[str, Any]:
        """Return it as plain data."""
        self._refuse()
        instances = self._instances()
        self._policy()
        self._limits()
        self._retries_and_breaker()
        self._secrets()
        for flag in self._given.all:
            if flag in IDLE:
                self.notes.append(f"{flag} has no effect here")
        api = {"enabled": True, "dialect": self._dialect, "ranks": self._ranks, **self._chunk_key()}
        pools = {"disaggregated": self._split, "instances": instances}
        return {**self._tables, **pools, "worker_api": api}

    def _set(self, table: str, key: str, value: Any) -> None:
        self._tables.setdefault(table, {})[key] = value

    def _refuse(self) -> None:
        connector = self._given.text("--kv-connector", "nixl")
        if connector != "nixl":
            raise ConfigError(f"--kv-connector {connector}: only nixl's hand-over is spoken here")
        for flag in ("--epd-disaggregation", "--encode"):
            if self._given.has(flag):
                raise ConfigError(f"{flag}: there is no encode pool here, only prefill and decode")

    # Engines

    @property
    def _split(self) -> bool:
        flags = ("--vllm-pd-disaggregation", "--pd-disaggregation", "--prefill", "--decode")
        return any(map(self._given.has, flags))

    @property
    def _dialect(self) -> str:
        given = self._given
        if given.has("--vllm-pd-disaggregation"):
            return "vllm"
        backend = given.text("--backend", "sglang" if given.smg else "vllm")
        if backend not in ("vllm", "sglang"):
            raise unknown_name("engine", backend, ("vllm", "sglang"), where="--backend")
        return backend

    def _instances(self) -> list[dict[str, Any]]:
        given = self._given
        if not self._split:
            return [self._instance(url) for url in given.words("--worker-urls")]
        if given.words("--worker-urls"):
            raise ConfigError("--worker-urls: with prefill and decode apart, say --prefill and --decode")
        prefill = [self._prefill(*words) for words in given.all.get("--prefill", [])]
        return prefill + [self._instance(url, role="decode") for url in given.words("--decode")]

    def _prefill(self, url: str, port: str = "none", *more: str) -> dict[str, Any]:
        if more:
            raise ConfigError(f"--prefill: URL [BOOTSTRAP_PORT], got {more[0]!r} too")
        number = None if port.lower() == "none" else _whole("--prefill", port)
        if self._dialect == "sglang":
            return self._instance(url, role="prefill", bootstrap_port=number or BOOTSTRAP_PORT)
        if number is not None:
            self.notes.append(f"--prefill {url} {port}: vLLM's hand-over needs no bootstrap port, unused")
        return self._instance(url, role="prefill")

    def _instance(self, url: str, **more: Any) -> dict[str, Any]:
        if "://" not in url:
            raise ConfigError(f"command line: {url!r} is not a URL: write http://HOST:PORT")
        name = instance_name(url) or "engine"
        return {
            "name": name,
            "url": url,
            "dialect": self._dialect,
            "ranks": self._ranks,
            **self._chunk_key(),
            **more,
        }

    def _chunk_key(self) -> dict[str, int]:
        return {} if self._chunk is None else {"chunk_tokens": self._chunk}

    # Policies

    def _policy(self) -> None:
        given = self._given
        main = self._main_policy
        parts = [given.text("--prefill-policy", main), given.text("--decode-policy", "")]
        if not self._split:
            self._set("policy", "cluster", self._ours("--policy", main))
            return
        if given.has("--decode-policy") or (main and given.has("--prefill-policy")):
            parts[1] = parts[1] or main
        ours = [self._ours(f, p) for f, p in zip(("--prefill-policy", "--decode-policy"), parts, strict=True)]
        if not parts[1]:
            ours.pop()
        self._set("policy", "cluster", "+".join(ours))

    def _ours(self, flag: str, name: str) -> str:
        """Their policy's name, or one of ours with its settings; ours by default."""
        if not name:
            return "staggered"
        if name in _BY_PREFIX:
            return self._by_prefix(flag, name)
        if name in POLICIES:
            if name in _BY_LOAD:
                self.notes.append(
                    f"{flag} {name}: {POLICIES[name]}, which goes by load and keeps no affinity"
                )
            return POLICIES[name]
        plain = name.partition("+")[0].partition(":")[0]
        if ":" not in name and plain not in cluster_policies.names():
            raise unknown_name("policy", name, (*POLICIES, *cluster_policies.names()), where=flag)
        return name

    def _by_prefix(self, flag: str, name: str) -> str:
        """Prefill goes where a prompt's beginning is cached; a decode pool gets its KV from there."""
        if flag == "--decode-policy":
            self.notes.append(f"{flag} {name}: least-tokens, for decode has no prompt to compute")
            return "least-tokens"
        ours = POLICIES[name]
        self.notes.append(f"{flag} {name}: {ours}, which looks for cached prefixes on the ranks free next")
        return ours

    # Limits

    def _limits(self) -> None:
        """At most N are served and Q wait for a place among them; here both count towards one bound."""
        given = self._given
        served = given.number("--max-concurrent-requests", _whole)
        waiting = given.number("--queue-size", _whole)
        if served is not None and served > 0:
            self._set("limits", "concurrent_requests", served + (100 if waiting is None else waiting))
        elif waiting is not None:
            self.notes.append("--queue-size has no effect without --max-concurrent-requests")
        rate = given.number("--rate-limit-tokens-per-second", _real)
        if rate:
            self._set("limits", "rate_limit_rps", rate)

    def _retries_and_breaker(self) -> None:
        given = self._given
        tries = 1 if given.has("--disable-retries") else given.number("--retry-max-retries", _whole)
        if tries is not None:
            self._set("limits", "retries", max(0, tries - 1))  # they count the first one too
        for key, flags, choose in (
            ("eject_after", ("--cb-failure-threshold", "--health-failure-threshold"), min),
            ("return_after", ("--cb-success-threshold", "--health-success-threshold"), max),
        ):
            numbers = [given.number(flag, _whole) for flag in flags if given.has(flag)]
            if numbers:
                self._set("health", key, choose(numbers))

    # Secrets and files

    def _secrets(self) -> None:
        given = self._given
        key = given.text("--api-key", "")
        if key:
            os.environ[ENGINE_KEY_ENV] = key
            self._set("auth", "engine_api_key_env", ENGINE_KEY_ENV)
        if key and given.smg:
            os.environ[DOOR_KEY_ENV] = key
            self._set("auth", "api_keys_env", DOOR_KEY_ENV)
        if given.has("--tls-cert-path") or given.has("--tls-key-path"):
            pair = {"certificate": given.text("--tls-cert-path", ""), "key": given.text("--tls-key-path", "")}
            for name, path in pair.items():
                if not path:
                    raise ConfigError(f"TLS needs --tls-cert-path and --tls-key-path: the {name} is missing")
            self._tables["tls"] = pair
        if given.has("--tokenizer-path"):
            self._tokenizer(Path(given.text("--tokenizer-path", "")))

    def _tokenizer(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            self._set("server", "tokenizer", str(file))
        else:
            self.notes.append(f"--tokenizer-path {path}: no tokenizer.json, lengths are learned instead")
