"""Decides what the flags of `vllm-router` (0.1.17) and `smg launch` (1.13.0) mean here.

A start script swaps the program's name and works.

Rule 1. Every flag of theirs is known. It sets a key of the gateway's configuration, or it is taken with a
        warning that says it has no effect; none is dropped in silence. A flag that decides who gets in or
        where requests go is refused where it cannot be honoured (`drop_in_flags.py`).
Rule 2. A flag nobody knows is an error that names the nearest known one.
Rule 3. What a script leaves unsaid is Headway's default, but for what others in the script's surroundings
        rely on: the port (30000), the port of the metrics (29000), and smg's habit to listen everywhere.
Rule 4. `smg` is meant when the first word is `launch` or a flag says so; `vllm-router` else. They differ in
        the default host and engine, and in what `--api-key` guards: the engines in both; in smg also the
        gateway, for clients and operators.
Rule 5. Engines can be added by URL, as there; but where others can connect that needs a key, or
        `--open-worker-api`, which is ours.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.cli.drop_in_discovery import DISCOVERY_FLAGS, discovery_of
from headway.cli.drop_in_flags import ANY, IDLE, NONE, NOTES, ONE, REFUSED, SOME
from headway.cli.drop_in_policies import our_policy
from headway.cli.drop_in_words import GivenFlags, as_is, real, whole
from headway.core.errors import ConfigError, unknown_name
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.worker_api import instance_name

__all__ = ["DropIn", "check_flags", "read_flags"]

PORT, METRICS_PORT = 30_000, 29_000
#: SGLang's own default of `--disaggregation-bootstrap-port`.
BOOTSTRAP_PORT = 8998
#: A circuit breaker that opens after more failures than this is one that somebody disabled.
MOST_FAILURES = 1000
#: What a request gets there that found no place in time.
QUEUE_TIMEOUT_STATUS = 408
#: Where keys from the command line are put: the configuration names variables, never secrets.
DOOR_KEY_ENV, ENGINE_KEY_ENV = "HEADWAY_DROP_IN_API_KEY", "HEADWAY_DROP_IN_ENGINE_API_KEY"
OPERATORS_ENV = "HEADWAY_DROP_IN_OPERATORS"

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
    "--request-timeout-secs": ONE,
    "--disable-circuit-breaker": NONE,
    "--worker-startup-timeout-secs": ONE,
    "--cb-success-threshold": ONE,
    "--health-success-threshold": ONE,
    "--tls-cert-path": ONE,
    "--tls-key-path": ONE,
    "--tokenizer-path": ONE,
    "--kv-connector": ONE,
    "--dp-aware": NONE,
    "--cors-allowed-origins": ANY,
    "--control-plane-api-keys": ANY,
    "--open-worker-api": NONE,  # ours: whoever may send requests may add engines
    "--admin-token-env": ONE,  # ours: the variable with the operators' token
    "--model-path": ONE,
    "--model": ONE,
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
    "--dialect",
    "--seed",
    "--events",
    "--no-events",
)


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
    draft = _Draft(GivenFlags.scan(words, _TAKES, _OWN), host, port, policy or "")
    return DropIn(GatewayConfig.parse(draft.data(), where="command line"), draft.notes)


def check_flags(words: Sequence[str]) -> None:
    """Raise ConfigError for a flag that neither another router nor `headway serve` has."""
    GivenFlags.scan(words, _TAKES, _OWN)


def _breaker(flag: str, text: str) -> int:
    """Return after how many failures an engine is ejected; 0, never, for a number that is never reached."""
    failures = whole(flag, text)
    return failures if failures <= MOST_FAILURES else 0


#: Flags that set one key of one table.
_KEYS: dict[str, tuple[str, str, Callable[[str, str], Any]]] = {
    "--shutdown-grace-period-secs": ("server", "drain_timeout_s", real),
    "--max-payload-size": ("limits", "max_body_bytes", whole),
    "--queue-timeout-secs": ("limits", "queue_timeout_s", real),
    "--header-read-timeout-secs": ("limits", "header_timeout_s", real),
    "--stream-body-stall-timeout-secs": ("limits", "idle_timeout_s", real),
    "--cb-failure-threshold": ("health", "eject_after", _breaker),
    "--cb-timeout-duration-secs": ("health", "eject_for_s", real),
    "--health-failure-threshold": ("health", "down_after", whole),
    "--health-check-timeout-secs": ("health", "timeout_s", real),
    "--health-check-interval-secs": ("health", "interval_s", real),
    "--health-check-endpoint": ("health", "path", as_is),
    "--prometheus-host": ("metrics", "host", as_is),
    "--prometheus-port": ("metrics", "port", whole),
}

_TAKES: Mapping[str, str] = {
    **dict.fromkeys(_KEYS, ONE),
    **_SPECIAL,
    **DISCOVERY_FLAGS,
    **IDLE,
    **{flag: takes for flag, (takes, _) in REFUSED.items()},
}


class _Draft:
    """A configuration in the making."""

    def __init__(self, given: GivenFlags, host: str | None, port: int | None, policy: str) -> None:
        self.notes: list[str] = []
        self._given = given
        self._main_policy = policy
        self._ranks = given.number("--intra-node-data-parallel-size", whole) or 1
        self._chunk = given.number("--chunk-tokens", whole)
        host = host or ("0.0.0.0" if given.smg else "127.0.0.1")
        self._tables: dict[str, dict[str, Any]] = {
            "server": {
                "host": host,
                "port": PORT if port is None else port,
                "unknown_models": "pass-on",  # as they do: the engine decides
            },
            "limits": {"queue_timeout_status": QUEUE_TIMEOUT_STATUS},
            "metrics": {"port": METRICS_PORT},
        }
        for flag, (table, key, read) in _KEYS.items():
            if given.has(flag):
                self._set(table, key, given.number(flag, read))

    def data(self) -> dict[str, Any]:
        """Return it as plain data."""
        self._refuse()
        engine = {"dialect": self._dialect, "ranks": self._ranks, **self._chunk_key()}
        bootstrap = {"bootstrap_port": BOOTSTRAP_PORT} if self._dialect == "sglang" else {}
        found = discovery_of(self._given, engine, bootstrap, split=self._split)
        instances = [] if found is not None else self._instances()
        if found is not None and "namespace" not in found:
            self.notes.append("--service-discovery: this pod's namespace is watched; name another one")
        self._policy()
        self._limits()
        self._retries_and_breaker()
        self._secrets()
        for flag in self._given.all:
            if flag in IDLE:
                self.notes.append(f"{flag} {NOTES.get(flag, 'has no effect here')}")
        api = {"enabled": True, "open": self._given.has("--open-worker-api"), **engine}
        if self._given.has("--worker-startup-timeout-secs"):
            api["startup_timeout_s"] = self._given.number("--worker-startup-timeout-secs", real)
        pools = {"disaggregated": self._split, "instances": instances, "discovery": found}
        return {**self._tables, **pools, "worker_api": api}

    def _set(self, table: str, key: str, value: Any) -> None:
        self._tables.setdefault(table, {})[key] = value

    def _refuse(self) -> None:
        connector = self._given.text("--kv-connector", "nixl")
        if connector != "nixl":
            raise ConfigError(f"--kv-connector {connector}: only nixl's hand-over is spoken here")
        for flag in self._given.all:
            if flag in REFUSED:
                raise ConfigError(f"{flag}: {REFUSED[flag][1]}")
        if self._given.has("--dp-aware") and not self._given.has("--intra-node-data-parallel-size"):
            raise ConfigError("--dp-aware: needs the ranks of an engine: --intra-node-data-parallel-size N")

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
        number = None if port.lower() == "none" else whole("--prefill", port)
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
            self._set("policy", "cluster", our_policy("--policy", main, self.notes))
            return
        if given.has("--decode-policy") or (main and given.has("--prefill-policy")):
            parts[1] = parts[1] or main
        ours = [
            our_policy(flag, part, self.notes)
            for flag, part in zip(("--prefill-policy", "--decode-policy"), parts, strict=True)
        ]
        if not parts[1]:
            ours.pop()
        self._set("policy", "cluster", "+".join(ours))

    # Limits

    def _limits(self) -> None:
        """At most N are served and Q wait for a place among them; here both count towards one bound."""
        given = self._given
        served = given.number("--max-concurrent-requests", whole)
        waiting = given.number("--queue-size", whole)
        if served is not None and served > 0:
            self._set("limits", "concurrent_requests", served + (100 if waiting is None else waiting))
        elif waiting is not None:
            self.notes.append("--queue-size has no effect without --max-concurrent-requests")
        rate = given.number("--rate-limit-tokens-per-second", real)
        if rate:
            self._set("limits", "rate_limit_rps", rate)
        patience_s = given.number("--request-timeout-secs", real)
        if patience_s is not None:
            self._set("limits", "first_byte_timeout_s", patience_s)
            self._set("limits", "answer_timeout_s", patience_s)

    def _retries_and_breaker(self) -> None:
        given = self._given
        tries = 1 if given.has("--disable-retries") else given.number("--retry-max-retries", whole)
        if tries is not None:
            self._set("limits", "retries", max(0, tries - 1))  # they count the first one too
        if given.has("--disable-circuit-breaker"):
            self._set("health", "eject_after", 0)
        elif given.has("--cb-failure-threshold"):  # who names it expects theirs, which counts every failure
            self._set("health", "breaker", "consecutive")
        flags = ("--cb-success-threshold", "--health-success-threshold")
        successes = [given.number(flag, whole) for flag in flags if given.has(flag)]
        if successes:
            self._set("health", "return_after", max(successes))

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
        self._operators([key] if key and given.smg else [])
        if given.words("--cors-allowed-origins"):
            self._set("cors", "allowed_origins", given.words("--cors-allowed-origins"))
        if given.has("--tls-cert-path") or given.has("--tls-key-path"):
            pair = {"certificate": given.text("--tls-cert-path", ""), "key": given.text("--tls-key-path", "")}
            for name, path in pair.items():
                if not path:
                    raise ConfigError(f"TLS needs --tls-cert-path and --tls-key-path: the {name} is missing")
            self._tables["tls"] = pair
        flags = ("--tokenizer-path", "--model-path", "--model")
        flag = next((each for each in flags if given.has(each)), None)
        if flag is not None:
            self._tokenizer(flag, Path(given.text(flag, "")))

    def _operators(self, keys: list[str]) -> None:
        """Take the keys that operators may use: these, and those of the control plane with role admin."""
        given = self._given
        if given.has("--admin-token-env"):
            if keys or given.has("--control-plane-api-keys"):
                raise ConfigError("--admin-token-env: the flags name operators' keys already")
            self._set("admin", "token_env", given.text("--admin-token-env", ""))
            return
        for word in given.words("--control-plane-api-keys"):
            parts = word.split(":", 3)
            if len(parts) != 4 or parts[2] != "admin" or not parts[3] or "," in parts[3]:
                raise ConfigError("--control-plane-api-keys: only ID:NAME:admin:KEY is known here")
            keys.append(parts[3])
        if keys:
            os.environ[OPERATORS_ENV] = ",".join(keys)
            self._set("admin", "token_env", OPERATORS_ENV)

    def _tokenizer(self, flag: str, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if file.is_file():
            self._set("server", "tokenizer", str(file))
        else:
            self.notes.append(f"{flag} {path}: no tokenizer.json, lengths are learned instead")
