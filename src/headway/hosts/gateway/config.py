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
from typing import ClassVar

from pydantic import Field

from headway.front.config import Dialect, DoorSpec, FrontConfig, Port, Spec, TlsSpec, Url

__all__ = [
    "AuthSpec",
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
    """Names of environment variables: the clients' keys (comma-separated), and the key the engines want."""

    api_keys_env: str | None = None
    engine_api_key_env: str | None = None


class TracesSpec(Spec):
    """Where spans go, over OTLP/HTTP; no endpoint: nowhere, and trace context is only handed on.

    `sample_ratio`: of requests whose client has not decided.
    """

    otlp_endpoint: Url | None = None
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    service_name: str = "headway"


class WorkerApiSpec(Spec):
    """Whether engines can be added by URL on the public side (`worker_api.py`), and what they are then."""

    enabled: bool = False
    dialect: Dialect = "vllm"
    ranks: int = Field(default=1, ge=1, le=1024)
    chunk_tokens: int = Field(default=8192, ge=1)


class GatewayConfig(FrontConfig):
    """All of it."""

    server: ServerSpec = ServerSpec()
    auth: AuthSpec = AuthSpec()
    traces: TracesSpec = TracesSpec()
    worker_api: WorkerApiSpec = WorkerApiSpec()
    tls: TlsSpec | None = None

    what: ClassVar[str] = "gateway"
    tables: ClassVar[Mapping[str, type[Spec]]] = {
        **FrontConfig.tables,
        "server": ServerSpec,
        "auth": AuthSpec,
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
