"""Decides what a picker's file may say beside what is every front door's (`front/config.py`).

    [server]
    grpc_port = 9002
    [[instances]]
    name = "engine-0"
    url = "http://10.0.0.1:8000"
    [policy]
    cluster = "staggered"
    [accounting]
    by = "access-log"

An engine's url has an address for its host, not a name: Envoy is told `ip:port`.
"""

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from headway.core.complaints import Location
from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.front.config import (
    DoorSpec,
    FrontConfig,
    InstanceSpec,
    MetricsSpec,
    Port,
    Seconds,
    SloSpec,
    Spec,
)

__all__ = ["AccountingSpec", "EppConfig", "EppServerSpec", "ObjectiveSpec", "PickerSpec", "SecureSpec"]


class EppServerSpec(DoorSpec):
    """Where Envoy connects to, and where health is asked after (`grpc_health_port` None: there too).

    `processors`: processes that speak with Envoy; 1: the one that decides does.
    """

    host: str = "0.0.0.0"
    grpc_port: Port = 9002
    grpc_health_port: Port | None = 9003
    processors: int = Field(default=1, ge=1, le=64)


class PickerSpec(Spec):
    """How Envoy is answered.

    `fallbacks`: so many other endpoints are named after the one picked, for Envoys that retry and take a
    list (override_host does, ORIGINAL_DST does not). `handover`: with prefill and decode apart, "sidecar"
    picks both at once and names the prefill's in `x-prefiller-host-port`; "phases" picks for each request
    that names its phase in `EPP-Profile`, and so decode late. `body_mode`: of an Envoy that does not say.
    `flow_share`: most of the buffer that requests of one `x-llm-d-inference-fairness-id` may take.
    """

    fallbacks: int = Field(default=0, ge=0, le=16)
    handover: Literal["sidecar", "phases"] = "sidecar"
    body_mode: Literal["full-duplex", "buffered"] = "full-duplex"
    flow_share: float = Field(default=1.0, gt=0, le=1)


class AccountingSpec(Spec):
    """How it is known that a request is over.

    "access-log": Envoy's gRPC access log tells. "response": answers come by here, which tells first bytes too
    and costs the more the more pieces they have. "events": an engine's report that acknowledges the request
    takes it over. `forget_after_s`: then a request of which nothing was heard counts as over. `reconnect_s`:
    so long an Envoy whose connection broke may take to come back, before what it carried counts as over.
    """

    by: Literal["access-log", "response", "events"] = "access-log"
    forget_after_s: Seconds = 1800.0
    reconnect_s: Seconds = 1.5


class SecureSpec(Spec):
    """TLS of the port Envoy connects to: with a certificate made at the start, one from files, or none.

    `client_ca`: Envoy has to show a certificate that one of these authorities signed.
    """

    mode: Literal["self-signed", "files", "off"] = "self-signed"
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.mode == "off" and self.client_ca is not None:
            raise ValueError("client_ca needs TLS, and mode is 'off'")
        if any((self.mode == "files") != (file is not None) for file in (self.certificate, self.key)):
            raise ValueError("mode 'files' goes with certificate and key, the others without")
        return self


class ObjectiveSpec(Spec):
    """What requests get that name this objective (`x-llm-d-inference-objective`), unless they say more."""

    priority: int = Field(default=0, ge=-1_000_000, le=1_000_000)
    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None

    def over(self, slo: SloSpec) -> SloSpec:
        """Return the targets of requests that name none."""
        return SloSpec(ttft_s=self.ttft_s or slo.ttft_s, tpot_s=self.tpot_s or slo.tpot_s)


class PickerMetricsSpec(MetricsSpec):
    """A bind for /metrics and /health; no `port`: none."""

    host: str = "0.0.0.0"
    port: Port | None = 9090


class EppConfig(FrontConfig):
    """All of it. `objectives`: by name. `engine_api_key_env`: names the variable with the key engines want of
    health checks.
    """

    server: EppServerSpec = EppServerSpec()
    metrics: PickerMetricsSpec = PickerMetricsSpec()
    picker: PickerSpec = PickerSpec()
    accounting: AccountingSpec = AccountingSpec()
    tls: SecureSpec = SecureSpec()
    objectives: Mapping[str, ObjectiveSpec] = Field(default_factory=dict)
    engine_api_key_env: str | None = None

    what: ClassVar[str] = "picker"
    tables: ClassVar[Mapping[str, type[Spec]]] = {
        **FrontConfig.tables,
        "server": EppServerSpec,
        "metrics": PickerMetricsSpec,
        "picker": PickerSpec,
        "accounting": AccountingSpec,
        "tls": SecureSpec,
    }

    @model_validator(mode="after")
    def _accounts_fit(self) -> Self:
        if self.accounting.by == "events" and self.disaggregated and self.picker.handover == "phases":
            raise ValueError("accounting.by: a report does not tell when a phase is over: use 'access-log'")
        return self

    @property
    def both_legs_at_once(self) -> bool:
        """See `FrontConfig`: one answer names both, so that decode cannot be placed late."""
        return bool(self.disaggregated) and self.picker.handover == "sidecar"

    def check_instance(self, instance: InstanceSpec) -> None:
        """See `FrontConfig.check_instance`; Envoy must be able to connect to it by address."""
        super().check_instance(instance)
        host = urlsplit(instance.url).hostname or ""
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ConfigError(
                f"instance {instance.name!r}: url needs an address, as 10.0.0.1, not the name {host!r}: "
                "Envoy is told ip:port"
            ) from None
        by_header = instance.rank_by == "header" and instance.ranks > 1
        if by_header and self.both_legs_at_once and instance.role is Role.PREFILL:
            name = f"instance {instance.name!r}"
            raise ConfigError(f"{name}: needs rank_by 'port': a sidecar is told a prefill rank's ip:port")

    @classmethod
    def _known_keys(cls, table: Location) -> Sequence[str]:
        if table and table[0] == "objectives":
            return tuple(ObjectiveSpec.model_fields)
        return super()._known_keys(table)

    def _binds(self) -> list[tuple[str, str, int | None]]:
        server = self.server
        ports = (("grpc_port", server.grpc_port), ("grpc_health_port", server.grpc_health_port))
        return [(f"server.{key}", server.host, port) for key, port in ports] + super()._binds()
