"""Decides what a gateway file may say beside what is every front door's (`front/config.py`).

[server]
port = 8080
[[instances]]
name = "engine-0"
url = "http://10.0.0.1:8000"
[policy]
cluster = "staggered"
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from headway.front.config import (
    Count,
    Dialect,
    DoorSpec,
    FrontConfig,
    Port,
    SecondsOrNone,
    Spec,
    TlsSpec,
    Url,
)

__all__ = [
    "AuthSpec",
    "CorsSpec",
    "GatewayConfig",
    "ServerSpec",
    "TracesSpec",
    "WorkerApiSpec",
    "waits_for_restart",
]


class ServerSpec(DoorSpec):
    """The public side, as `DoorSpec`. `port` 0: any free one."""

    port: Port = 8080


class AuthSpec(Spec):
    """Which keys clients and engines want.

    `api_keys_env`: an environment variable with the clients' keys, comma-separated. `keys_file`: a TOML file
    of keys with names and limits (`front/keys.py`). With neither, clients need no key. `engine_api_key_env`:
    an environment variable with the key that engines want.
    """

    api_keys_env: str | None = None
    keys_file: Path | None = None
    engine_api_key_env: str | None = None

    @property
    def checks_keys(self) -> bool:
        """Whether clients need a key."""
        return self.api_keys_env is not None or self.keys_file is not None


class CorsSpec(Spec):
    """Which origins' pages may use the API. `allowed_origins`: "https://app.example", or "*" for all.

    `allow_headers`: "*" allows what a page asks for. `max_age_s`: how long a browser may keep the answer.
    """

    allowed_origins: tuple[str, ...] = ()
    allow_methods: tuple[str, ...] = ("GET", "POST", "DELETE", "HEAD", "OPTIONS")
    allow_headers: tuple[str, ...] = ("*",)
    max_age_s: int = Field(default=600, ge=0, le=86_400)

    @field_validator("allowed_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, _, rest = origin.partition("://")
            if origin != "*" and (scheme not in ("http", "https") or not rest or "/" in rest):
                raise ValueError(f"must be http(s)://HOST[:PORT] without a path, or '*', and has {origin!r}")
        return tuple(origin.lower() for origin in origins)


class TracesSpec(Spec):
    """Where spans go, over OTLP/HTTP; no endpoint: nowhere, and trace context is only handed on.

    `sample_ratio`: of requests whose client has not decided.
    """

    otlp_endpoint: Url | None = None
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    service_name: str = "headway"


class WorkerApiSpec(Spec):
    """Whether engines can be added by URL on the public side (`worker_api.py`), and what they are then.

    `open`: whoever may send requests may add and remove engines too. Without it an operator token is needed,
    except on a loopback address of a gateway whose clients need no key. `startup_timeout_s`: how long an
    added engine has to pass its first health check; one that does not is not added.
    """

    enabled: bool = False
    open: bool = False
    dialect: Dialect = "vllm"
    ranks: int = Field(default=1, ge=1, le=1024)
    chunk_tokens: Count = 8192
    startup_timeout_s: SecondsOrNone = 10.0


class GatewayConfig(FrontConfig):
    """All of it."""

    server: ServerSpec = ServerSpec()
    auth: AuthSpec = AuthSpec()
    cors: CorsSpec = CorsSpec()
    traces: TracesSpec = TracesSpec()
    worker_api: WorkerApiSpec = WorkerApiSpec()
    tls: TlsSpec | None = None

    what: ClassVar[str] = "gateway"
    tables: ClassVar[Mapping[str, type[Spec]]] = {
        **FrontConfig.tables,
        "server": ServerSpec,
        "auth": AuthSpec,
        "cors": CorsSpec,
        "traces": TracesSpec,
        "worker_api": WorkerApiSpec,
        "tls": TlsSpec,
    }

    def _binds(self) -> list[tuple[str, str, int | None]]:
        return [("server.port", self.server.host, self.server.port), *super()._binds()]


def waits_for_restart(running: GatewayConfig, wanted: GatewayConfig) -> list[str]:
    """Name the tables in which a configuration differs from the running one and that are read at the start
    alone: all but `[[instances]]`.
    """
    names = [name for name in GatewayConfig.model_fields if getattr(running, name) != getattr(wanted, name)]
    return [f"[{name}]" if name in GatewayConfig.tables else name for name in names if name != "instances"]
