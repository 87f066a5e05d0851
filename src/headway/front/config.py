"""Decides what the file of a front door may say, whichever host it is for: engines, who places work, limits.

    [[instances]]
    name = "engine-0"
    url = "http://10.0.0.1:8000"
    [policy]
    cluster = "staggered"

Unknown keys are refused with the nearest known one. Secrets never stand in the file: it names the environment
variables that hold them.
"""

import ipaddress
import os
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from headway.core.cluster import check_cluster
from headway.core.complaints import Location, complaint
from headway.core.engine_health import HealthRules
from headway.core.errors import ConfigError
from headway.core.events import InstanceUp, Role
from headway.core.request import Slo
from headway.front.addresses import Addresses
from headway.wire.publisher import has_sound_port

__all__ = [
    "AdminSpec",
    "Count",
    "Dialect",
    "DiscoverySpec",
    "DoorSpec",
    "EngineSpec",
    "FrontConfig",
    "HealthSpec",
    "InferenceSpec",
    "InstanceSpec",
    "LeaderSpec",
    "LimitsSpec",
    "LogsSpec",
    "MetricsSpec",
    "PolicySpec",
    "Port",
    "Seconds",
    "SecondsOrNone",
    "SloSpec",
    "Spec",
    "Times",
    "TlsSpec",
    "Url",
    "is_loopback",
    "labels_of",
    "parse_instance",
]

Dialect = Literal["vllm", "sglang"]


class Spec(BaseModel):
    """A table: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _http_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        port_is_sound = parts.port is None or parts.port > 0
    except ValueError:
        port_is_sound = False
    if not port_is_sound or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be http://HOST[:PORT] or https://HOST[:PORT]")
    if parts.query or parts.fragment or parts.username is not None:
        raise ValueError("must not have a query, a fragment or a user")
    if not text.isprintable() or " " in text:
        raise ValueError("must not have spaces")
    try:
        parts.hostname.encode("idna")  # as it is when it is connected to
    except UnicodeError:
        raise ValueError("the host's name must be parts of 1 to 63 characters between dots") from None
    return text.rstrip("/")


#: A name in Kubernetes; it becomes a part of a path.
_DNS_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"

#: Labels and their values, as `key=value,key=value`.
_LABELS = r"^[\w./-]+=[\w.-]*(,[\w./-]+=[\w.-]*)*$"


def labels_of(selector: str) -> dict[str, str]:
    """Return the labels of a selector.

    >>> labels_of("app=vllm,component=prefill")
    {'app': 'vllm', 'component': 'prefill'}
    """
    return dict(label.split("=", 1) for label in selector.split(","))


_SUBSCRIBABLE = re.compile(r"tcp://[^\s:]+:[1-9]\d{0,4}|tcp://\[[^\s\]]+\]:[1-9]\d{0,4}|ipc://\S+")


def _zmq_address(text: str) -> str:
    if not _SUBSCRIBABLE.fullmatch(text) or text.startswith("tcp://*"):
        raise ValueError("must be tcp://HOST:PORT or ipc://PATH")
    if not has_sound_port(text):
        raise ValueError("the port must be from 1 to 65535")
    return text


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


Url = Annotated[str, AfterValidator(_http_url)]
ZmqAddress = Annotated[str, AfterValidator(_zmq_address)]
Port = Annotated[int, Field(ge=0, le=65535)]
#: Where somebody else listens.
KnownPort = Annotated[int, Field(ge=1, le=65535)]

#: The longest duration that is believed: a week. Timers and Envoy's durations overflow far beyond it.
MOST_SECONDS = 604_800.0
#: The largest number of things that is believed; it still is a whole number as a float.
MOST_COUNT = 1 << 50
#: A duration in seconds that is more than none, or may be none.
Seconds = Annotated[float, Field(gt=0, le=MOST_SECONDS)]
SecondsOrNone = Annotated[float, Field(ge=0, le=MOST_SECONDS)]
#: A number of things, at least one.
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]
#: How often something is done, in a row or again.
Times = Annotated[int, Field(ge=1, le=1_000_000)]


class DoorSpec(Spec):
    """The public side. `models`: names served; empty: what the engines say.

    `tokenizer`: a tokenizer.json for exact prompt lengths; without it they are learned from `usage`.
    `unknown_models`: what becomes of a request for a model that no engine lists: "refuse" (404), or "pass-on"
    to any engine.
    `max_prompt_tokens`: longer prompts are refused (None: the engines' own `max_model_len`).
    """

    host: str = "127.0.0.1"
    models: tuple[str, ...] = ()
    unknown_models: Literal["refuse", "pass-on"] = "refuse"
    tokenizer: Path | None = None
    max_prompt_tokens: Count | None = None
    drain_timeout_s: SecondsOrNone = 30.0


class InstanceSpec(Spec):
    """An engine. Capacities are per rank; `chunk_tokens`: most prompt tokens of one pass.

    `rank_by`: "header" sends `X-data-parallel-rank`; with "port" rank r listens at the url's port + r, or
    where `ports` says.
    `events`, `snapshots`: ZeroMQ addresses of its pass events, if it publishes any.
    `bootstrap_port`: of an SGLang prefill instance.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$")
    url: Url
    role: Role = Role.AGGREGATED
    dialect: Dialect = "vllm"
    ranks: int = Field(default=1, ge=1, le=1024)
    rank_by: Literal["header", "port"] = "header"
    ports: tuple[KnownPort, ...] | None = None
    lockstep: bool = True
    chunk_tokens: Count = 8192
    kv_blocks: Count | None = None
    block_tokens: Count = 16
    max_running: Count | None = None
    events: ZmqAddress | None = None
    snapshots: ZmqAddress | None = None
    bootstrap_port: KnownPort | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.snapshots and not self.events:
            raise ValueError("snapshots needs events")
        if self.bootstrap_port is not None and self.dialect != "sglang":
            raise ValueError("bootstrap_port is for dialect 'sglang'")
        if self.ports is not None and (self.rank_by != "port" or len(self.ports) != self.ranks):
            raise ValueError("ports needs rank_by 'port' and one port for each rank")
        if self.ports is not None and self.ports[0] != urlsplit(self.url).port:
            raise ValueError("ports begins with the port of the url")
        in_a_row = self.rank_by == "port" and self.ports is None and self.ranks > 1
        if in_a_row and (urlsplit(self.url).port or 0) + self.ranks > 65536:
            raise ValueError("rank_by 'port' needs a url with a port that has room for every rank")
        return self

    def urls(self) -> list[str]:
        """Return the URL of each rank, the same one once."""
        return list(dict.fromkeys(self.rank_url(rank) for rank in range(self.ranks)))

    def rank_url(self, rank: int) -> str:
        """Return where a rank listens."""
        if self.rank_by == "header" or rank == 0:
            return self.url
        parts = urlsplit(self.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        first = parts.port or (443 if parts.scheme == "https" else 80)
        port = first + rank if self.ports is None else self.ports[rank]
        return f"{parts.scheme}://{host}:{port}{parts.path}"

    def instance_up(self, epoch: int) -> InstanceUp:
        """Return the event that introduces the instance to a policy."""
        return InstanceUp(
            self.name,
            self.role,
            self.ranks,
            self.chunk_tokens,
            self.kv_blocks,
            self.block_tokens,
            self.max_running,
            self.lockstep,
            epoch,
        )


class EngineSpec(Spec):
    """What an engine is that is found, beside its address, role and ports; keys as of an instance.

    `ranks`: of an engine with one port; one with several has a rank for each. `events_port`,
    `snapshots_port`: where it publishes its pass events, if it does.
    """

    scheme: Literal["http", "https"] = "http"
    dialect: Dialect = "vllm"
    ranks: int = Field(default=1, ge=1, le=1024)
    lockstep: bool = True
    chunk_tokens: Count = 8192
    kv_blocks: Count | None = None
    block_tokens: Count = 16
    max_running: Count | None = None
    events_port: KnownPort | None = None
    snapshots_port: KnownPort | None = None
    bootstrap_port: KnownPort | None = None


class DiscoverySpec(Spec):
    """Where engines are found (`front/discovery`): in a `file`, in an InferencePool, or by a label `selector`
    with `target_ports`.

    `prefill_selector`, `decode_selector`: in place of `selector` and `role_label`, the labels
    ("app=vllm,component=prefill") by which pods of each role are known. They have a key in common.

    `namespace`: None: of this pod. `role`: of an engine without the label. `prefill`, `decode`: what engines
    of that role are, in place of `engine`. `interval_s`: how often it is looked whether the file has changed.
    `api_server`: None: the cluster's this pod runs in, with its token and CA.
    """

    file: Path | None = None
    pool: str | None = Field(default=None, pattern=_DNS_NAME)
    namespace: str | None = Field(default=None, pattern=_DNS_NAME)
    selector: str | None = Field(default=None, min_length=1)
    prefill_selector: str | None = Field(default=None, pattern=_LABELS)
    decode_selector: str | None = Field(default=None, pattern=_LABELS)
    target_ports: tuple[KnownPort, ...] = Field(default=(), max_length=8)
    role_label: str = "llm-d.ai/role"
    role: Role = Role.AGGREGATED
    engine: EngineSpec = EngineSpec()
    prefill: EngineSpec | None = None
    decode: EngineSpec | None = None
    interval_s: Seconds = 1.0
    api_server: Url | None = None
    token_file: Path | None = None
    ca_file: Path | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        by_role = (self.prefill_selector, self.decode_selector)
        if (by_role[0] is None) != (by_role[1] is None):
            raise ValueError("prefill_selector and decode_selector go together")
        sources = [key for key in ("file", "pool", "selector") if getattr(self, key) is not None]
        if by_role[0] is not None and by_role[1] is not None:
            sources.append("prefill_selector")
            if not labels_of(by_role[0]).keys() & labels_of(by_role[1]).keys():
                raise ValueError("prefill_selector and decode_selector need a label's key in common")
        if len(sources) != 1:
            has = " and ".join(sources) or "none"
            raise ValueError(f"needs one of file, pool and selector, and has {has}")
        if bool(self.target_ports) != (sources[0] in ("selector", "prefill_selector")):
            raise ValueError("selector and target_ports go together: a pool has ports of its own")
        if len(set(self.target_ports)) != len(self.target_ports):
            raise ValueError("target_ports has a port twice")
        return self

    @property
    def watched(self) -> str | None:
        """The label selector that selects all engines; None for a file or a pool."""
        if self.prefill_selector is None or self.decode_selector is None:
            return self.selector
        prefill, decode = labels_of(self.prefill_selector), labels_of(self.decode_selector)
        common = sorted(prefill.keys() & decode.keys())
        return ",".join(
            f"{key}={prefill[key]}"
            if prefill[key] == decode[key]
            else f"{key} in ({prefill[key]},{decode[key]})"
            for key in common
        )

    def engine_of(self, role: Role) -> EngineSpec:
        """Return what an engine of a role is."""
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode}.get(role) or self.engine


def _store_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        sound = parts.port is None or parts.port > 0
    except ValueError:
        sound = False
    if not sound or parts.scheme not in ("valkey", "valkeys", "redis", "rediss") or not parts.hostname:
        raise ValueError("must be valkey://HOST[:PORT][/DB], or valkeys:// for TLS")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not have a user or a password: password_env names a variable for it")
    if parts.query or parts.fragment or not re.fullmatch(r"/?\d{0,4}", parts.path):
        raise ValueError("must have nothing after HOST[:PORT] but the number of a database")
    return text


class LeaderSpec(Spec):
    """Which of several replicas places the requests of a pool (`docs/leader.md`).

    "memory": this process is alone. Else one replica holds a lease of `lease_s` in a Valkey server (`url`)
    or in a Kubernetes Lease, and the others follow; of a leader's death they know after as long. `pool`: the
    lease's name; None: that of `[discovery]`, or "default". `wait_s`: how long a request is held where nobody
    leads, or another; None: two leases. `replica`: this one's name; None: the host's. `replicas`: names of
    all, so that the pools spread over them.
    """

    backend: Literal["memory", "valkey", "kubernetes-lease"] = "memory"
    pool: str | None = Field(default=None, pattern=_DNS_NAME)
    lease_s: float = Field(default=5.0, ge=0.5, le=300)
    wait_s: float | None = Field(default=None, ge=0, le=3600)
    replica: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    replicas: tuple[str, ...] = ()
    url: Annotated[str, AfterValidator(_store_url)] | None = None
    password_env: str | None = None
    namespace: str | None = Field(default=None, pattern=_DNS_NAME)
    api_server: Url | None = None
    token_file: Path | None = None
    ca_file: Path | None = None

    @model_validator(mode="after")
    def _fits_backend(self) -> Self:
        if self.backend == "valkey" and self.url is None:
            raise ValueError("backend 'valkey' needs url")
        for backend, keys in (
            ("valkey", ("url", "password_env")),
            ("kubernetes-lease", ("namespace", "api_server", "token_file", "ca_file")),
        ):
            stray = next((key for key in keys if getattr(self, key) is not None), None)
            if stray is not None and backend != self.backend:
                raise ValueError(f"{stray} is for backend {backend!r}, and this is {self.backend!r}")
        if self.replicas and self.replica not in self.replicas:
            raise ValueError(f"replicas needs replica to be one of them, and it is {self.replica!r}")
        return self

    @property
    def shared(self) -> bool:
        """Whether there may be other replicas."""
        return self.backend != "memory"

    @property
    def patience_s(self) -> float:
        """How long a request is held where nobody leads, or another."""
        return 2 * self.lease_s if self.wait_s is None else self.wait_s


class PolicySpec(Spec):
    """A cluster policy spec ("prefill+decode" for two pools), and the seed of its random numbers."""

    cluster: str = "staggered"
    seed: int = 0


class SloSpec(Spec):
    """Targets of requests that name none."""

    ttft_s: Seconds = 2.0
    tpot_s: Seconds = 0.05

    def slo(self) -> Slo:
        """Return the targets as the core has them."""
        return Slo(self.ttft_s, self.tpot_s)


class LimitsSpec(Spec):
    """Bounds. The buffer holds what is not dispatched; every wait ends by itself.

    `retries`: how often a request may be placed again after an engine failed it. `retry_budget`: retries over
    requests, above which none is made (a dying cluster must not be asked twice for everything).
    `concurrent_requests`, `rate_limit_rps`: None is no limit. `max_sequences`: samples and prompts of one
    request where prefill and decode are apart; each becomes a request of its own. `kv_lease_s`: how long
    after its prefill a prompt's KV may be fetched by another engine; less than vLLM's `kv_lease_duration` of
    30 s, after which the decode engine would read what others have written there.

    `first_byte_timeout_s`: from sending a request that streams to its first byte. `answer_timeout_s`: from
    sending one that does not stream to its answer. `no_engine_timeout_s`: how long a request waits for an
    engine where none is up. `queue_timeout_status`: what a request gets that found no place in
    `queue_timeout_s`.
    """

    buffer_requests: Count = 20_000
    buffer_tokens: Count = 200_000_000
    buffer_bytes: Count = 1 << 30
    concurrent_requests: Count | None = None
    rate_limit_rps: float | None = Field(default=None, gt=0, le=1e9)
    max_body_bytes: int = Field(default=32 << 20, ge=1, le=1 << 30)
    max_sequences: int = Field(default=64, ge=1, le=1024)
    header_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 30.0
    queue_timeout_s: Seconds = 120.0
    connect_timeout_s: Seconds = 3.0
    first_byte_timeout_s: Seconds = 300.0
    answer_timeout_s: Seconds = 1800.0
    no_engine_timeout_s: SecondsOrNone = 5.0
    queue_timeout_status: Literal[408, 429, 503, 504] = 429
    idle_timeout_s: Seconds = 120.0
    kv_lease_s: Seconds = 25.0
    retries: int = Field(default=2, ge=0, le=1_000)
    retry_budget: float = Field(default=0.2, ge=0, le=1)


class HealthSpec(Spec):
    """Health checks, and the circuit breaker of each engine (`core/engine_health.py`).

    `eject_after`: failed requests in a row after which an engine is ejected; 0: never, so that clients get
    the engine's own errors. `down_after`: failed health checks in a row after which it is down; None: as
    `eject_after`, or 3. `return_after`, `return_most`: healthy checks in a row for a return, doubled after
    each ejection up to the most. `eject_for_s`: least time an ejected engine stays out. `breaker`: "outlier"
    ejects an engine that fails what others serve; "consecutive" counts every failed request, whatever other
    engines make of theirs, and ejects the last engine too.
    """

    path: str = Field(default="/health", pattern=r"^/")
    interval_s: Seconds = 2.0
    timeout_s: Seconds = 2.0
    eject_after: int = Field(default=3, ge=0, le=1_000)
    down_after: Times | None = None
    return_after: Times = 1
    return_most: Times = 16
    eject_for_s: SecondsOrNone = 0.0
    breaker: Literal["outlier", "consecutive"] = "outlier"

    def rules(self) -> HealthRules:
        """Return the numbers as the core has them."""
        return HealthRules(
            self.eject_after,
            self.down_after or self.eject_after or 3,
            self.return_after,
            self.return_most,
            self.eject_for_s,
            self.breaker == "consecutive",
        )


class InferenceSpec(Spec):
    """What is worked out where an engine publishes no events.

    `gather_s`: first bytes this close together come from one pass. `scrape_interval_s`: how often the load of
    decoding engines is scraped; 0: only when the policy asks.
    """

    gather_s: SecondsOrNone = 0.003
    scrape_interval_s: SecondsOrNone = 2.0


class AdminSpec(Spec):
    """The operators' side, on a bind of its own; no `port`: none. `token_env`: a variable's name; needed
    where others than this machine can connect.
    """

    host: str = "127.0.0.1"
    port: Port | None = None
    token_env: str | None = None


class MetricsSpec(Spec):
    """A bind for /metrics and /health alone, beside those of the public side; no `port`: none.

    `token_env`: an environment variable with the tokens, comma-separated, that /metrics wants on every bind.
    An operator token will do too.
    """

    host: str = "127.0.0.1"
    port: Port | None = None
    token_env: str | None = None


class LogsSpec(Spec):
    """What goes to standard error, as lines of JSON. `access`: one for each request that is over."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = True


class TlsSpec(Spec):
    """Certificate chain and key in PEM files."""

    certificate: Path
    key: Path


class FrontConfig(Spec):
    """What every front door's file says; a host adds its tables. `instances` may be empty: workers can be
    added while it runs, to the pools `[policy]` serves.

    `disaggregated`: whether there is a prefill and a decode pool; left out, the instances' roles tell.
    `discovery`: engines are found, in place of `instances`.
    """

    server: DoorSpec = DoorSpec()
    instances: tuple[InstanceSpec, ...] = ()
    discovery: DiscoverySpec | None = None
    disaggregated: bool | None = None
    policy: PolicySpec = PolicySpec()
    leader: LeaderSpec = LeaderSpec()
    slo: SloSpec = SloSpec()
    limits: LimitsSpec = LimitsSpec()
    health: HealthSpec = HealthSpec()
    inference: InferenceSpec = InferenceSpec()
    admin: AdminSpec = AdminSpec()
    metrics: MetricsSpec = MetricsSpec()
    logs: LogsSpec = LogsSpec()

    #: What it is of, in what a person is told.
    what: ClassVar[str] = "front"
    #: The tables by name, for the nearest known key of a wrong one.
    tables: ClassVar[Mapping[str, type[Spec]]] = {
        "server": DoorSpec,
        "instances": InstanceSpec,
        "discovery": DiscoverySpec,
        **{f"discovery.{which}": EngineSpec for which in ("engine", "prefill", "decode")},
        "policy": PolicySpec,
        "leader": LeaderSpec,
        "slo": SloSpec,
        "limits": LimitsSpec,
        "health": HealthSpec,
        "inference": InferenceSpec,
        "admin": AdminSpec,
        "metrics": MetricsSpec,
        "logs": LogsSpec,
    }

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = [each.name for each in self.instances]
        twice = next((name for name, times in Counter(names).items() if times > 1), None)
        if twice is not None:
            raise ValueError(f"two instances are called {twice!r}")
        if self.instances and self.discovery is not None:
            raise ValueError("instances: with [discovery] the engines are found there")
        if self.disaggregated is None:
            split = any(each.role is not Role.AGGREGATED for each in self.instances)
            object.__setattr__(self, "disaggregated", split)
        for each in self.instances:
            self.check_instance(each)
        Addresses(self.instances)
        self._check_pools()
        self._check_binds()
        return self

    def _check_pools(self) -> None:
        roles = {each.role for each in self.instances}
        missing = {Role.PREFILL, Role.DECODE} - roles
        if self.disaggregated and self.instances and missing:
            raise ValueError(f"instances: a disaggregated cluster needs a {missing.pop().value} instance")
        try:
            check_cluster(self.policy.cluster, disaggregated=bool(self.disaggregated))
        except ConfigError as error:
            raise ConfigError(f"policy.cluster: {error}") from None

    def _check_binds(self) -> None:
        for (one, host, port), (other, other_host, other_port) in combinations(self._binds(), 2):
            if port and port == other_port and _overlap(host, other_host):
                raise ConfigError(f"{other}: {other_port} is {one} already")
        admin = self.admin
        if admin.port is not None and admin.token_env is None and not is_loopback(admin.host):
            raise ConfigError(f"admin.host: others can connect to {admin.host!r}: admin.token_env is missing")

    def _binds(self) -> list[tuple[str, str, int | None]]:
        """Return key, host and port of all that listens."""
        tables = (("admin", self.admin), ("metrics", self.metrics))
        return [(f"{name}.port", table.host, table.port) for name, table in tables]

    @property
    def pool_name(self) -> str:
        """What the lease of its leader is called by."""
        found = None if self.discovery is None else self.discovery.pool
        return self.leader.pool or found or "default"

    @property
    def both_legs_at_once(self) -> bool:
        """Whether prefill and decode get the request together (SGLang P/D)."""
        return bool(self.disaggregated) and self._dialect == "sglang"

    @property
    def _dialect(self) -> str:
        if self.discovery is not None:
            return self.discovery.engine_of(Role.PREFILL).dialect
        return self.instances[0].dialect if self.instances else "vllm"

    def check_instance(self, instance: InstanceSpec) -> None:
        """Raise ConfigError when an instance does not belong into this cluster."""
        fits = {Role.PREFILL, Role.DECODE} if self.disaggregated else {Role.AGGREGATED}
        name = f"instance {instance.name!r}"
        if instance.role not in fits:
            kind = "disaggregated" if self.disaggregated else "aggregated"
            raise ConfigError(f"{name} has role {instance.role.value!r}, but the cluster is {kind}")
        if self.disaggregated and instance.dialect != self._dialect:
            raise ConfigError(
                f"{name} speaks {instance.dialect!r}, the rest of the cluster {self._dialect!r}"
            )
        of_sglang = bool(self.disaggregated) and self._dialect == "sglang"
        if of_sglang and instance.role is Role.PREFILL and instance.bootstrap_port is None:
            raise ConfigError(f"{name}: missing key bootstrap_port (an SGLang prefill instance has one)")

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str | None = None) -> Self:
        """Build from plain data. Raises ConfigError: one line with `where`, key path, nearest known key."""
        where = where or f"{cls.what} configuration"
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise complaint(error.errors(), cls._known_keys, where=where) from None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a file. Raises ConfigError as `parse` does, and when the file is no readable TOML."""
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the {cls.what} file: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
        return cls.parse(data, where=str(path))

    @classmethod
    def _known_keys(cls, table: Location) -> Sequence[str]:
        names = ".".join(part for part in table if isinstance(part, str))
        return _keys(cls.tables[names] if table else cls)

    def secret(self, variable: str | None, key: str) -> str | None:
        """Read a secret from the environment. Raises ConfigError when it is named but not set."""
        if variable is None:
            return None
        value = os.environ.get(variable, "")
        if not value:
            raise ConfigError(f"{key}: the environment variable {variable} is not set")
        return value


def parse_instance(data: Mapping[str, Any], *, where: str) -> InstanceSpec:
    """Build one instance from plain data, as the admin API gets it. Raises ConfigError as `parse` does."""
    try:
        return InstanceSpec.model_validate(data)
    except ValidationError as error:
        raise complaint(error.errors(), lambda loc: _keys(InstanceSpec), where=where) from None


def _overlap(one: str, other: str) -> bool:
    """Whether two hosts cannot both listen at one port: one is the other, or everywhere."""
    if one == other or "" in (one, other):
        return True
    if "0.0.0.0" in (one, other):
        return ":" not in one + other
    return "::" in (one, other) and "." not in one + other


def _keys(spec: type[Spec]) -> Sequence[str]:
    return tuple(spec.model_fields)
