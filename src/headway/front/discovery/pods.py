"""Decides which engine a pod is, and when it joins, drains and leaves. No IO: pods come in, instances go out.

Rule 1. A pod joins when it is Ready for the first time: one that still loads its weights is no engine yet.
Rule 2. One that is being deleted, or Ready no more, gets nothing new and finishes what it has. Ready again,
        it is taken back; a deletion is not called off.
Rule 3. It leaves when it is gone, over (phase Succeeded or Failed), or selected no more.
Rule 4. Every target port of a pod is a DP rank of one instance, in the pool's order. A pod's annotation
        `llm-d.ai/active-ports` names those that it serves.
Rule 5. A pod that does not fit is left out with the reason. It keeps no other out.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.front.addresses import Addresses
from headway.front.config import DiscoverySpec, EngineSpec, InstanceSpec, labels_of, parse_instance
from headway.front.discovery.contract import Found

__all__ = ["Members", "Pod", "instance_of", "role_of"]

#: Annotations by which a pod says which of the pool's target ports it serves; the second is the older name.
ACTIVE_PORTS = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")

#: What `llm-d.ai/role` may say. Who does both, and more, is an engine of an aggregated cluster.
ROLES = {
    "prefill": Role.PREFILL,
    "decode": Role.DECODE,
    "both": Role.AGGREGATED,
    "prefill-decode": Role.AGGREGATED,
    "encode-prefill-decode": Role.AGGREGATED,
    "all": Role.AGGREGATED,
    "aggregated": Role.AGGREGATED,
}

_MOST_NAME = 64
_ENDED = ("Succeeded", "Failed")


class _Metadata(msgspec.Struct, rename="camel"):
    name: str
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    deletion_timestamp: str | None = None


class _Condition(msgspec.Struct):
    type: str
    status: str


class _Status(msgspec.Struct, rename="camel"):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: list[_Condition] | None = None


class Pod(msgspec.Struct):
    """What is read of a pod, as the API server writes it."""

    metadata: _Metadata
    status: _Status = msgspec.field(default_factory=_Status)

    @property
    def ready(self) -> bool:
        """Whether its condition Ready is met; readiness gates count, as the kubelet counts them."""
        return any(each.type == "Ready" and each.status == "True" for each in self.status.conditions or ())

    @property
    def leaving(self) -> bool:
        """Whether its deletion has begun."""
        return self.metadata.deletion_timestamp is not None

    @property
    def gone(self) -> bool:
        """Whether nothing can be sent there: it has no address, or has ended."""
        return not self.status.pod_ip or self.status.phase in _ENDED


class Members:
    """The pods that are engines. `fits(instance)` raises ConfigError for one that does not belong into the
    cluster. `misfits`: name of a pod → why it is left out.
    """

    def __init__(self, spec: DiscoverySpec, fits: Callable[[InstanceSpec], None]) -> None:
        self.misfits: dict[str, str] = {}
        self._spec = spec
        self._fits = fits
        self._joined: set[str] = set()
        self._known: dict[str, tuple[Pod, tuple[int, ...], InstanceSpec | str]] = {}

    def update(self, pods: Iterable[Pod], ports: Sequence[int]) -> Found:
        """Return the engines among the pods of a pool with these target ports."""
        there = {pod.metadata.name: pod for pod in pods if not pod.gone}
        new = {name for name, pod in there.items() if pod.ready and not pod.leaving}
        self._joined = (self._joined & there.keys()) | new
        self._known = {name: self._read(there[name], tuple(ports)) for name in sorted(self._joined)}
        read = _distinct({name: instance for name, (_, _, instance) in self._known.items()})
        self.misfits = {name: why for name, why in read.items() if isinstance(why, str)}
        members = {name: instance for name, instance in read.items() if isinstance(instance, InstanceSpec)}
        draining = frozenset(instance.name for name, instance in members.items() if name not in new)
        return Found(tuple(members.values()), draining)

    def _read(self, pod: Pod, ports: tuple[int, ...]) -> tuple[Pod, tuple[int, ...], InstanceSpec | str]:
        """Return what a pod is, or why it is nothing; one that is as it was is not read again."""
        known = self._known.get(pod.metadata.name)
        if known is not None and known[0] is pod and known[1] == ports:
            return known
        try:
            return pod, ports, self._instance(pod, ports)
        except ConfigError as error:
            return pod, ports, str(error)

    def _instance(self, pod: Pod, ports: tuple[int, ...]) -> InstanceSpec:
        name, labels = pod.metadata.name, pod.metadata.labels or {}
        where = f"pod {name}"
        instance = instance_of(self._spec, name, pod.status.pod_ip, _active(pod, ports), labels, where=where)
        self._fits(instance)
        return instance


def _distinct(read: dict[str, InstanceSpec | str]) -> dict[str, InstanceSpec | str]:
    """Return what the pods are, with the reason in place of one that has an address of another's."""
    taken = Addresses()
    distinct: dict[str, InstanceSpec | str] = {}
    for name, instance in read.items():
        distinct[name] = instance
        if isinstance(instance, InstanceSpec):
            try:
                taken.claim(instance)
            except ConfigError as error:
                distinct[name] = f"pod {name}: {error}"
    return distinct


def instance_of(
    spec: DiscoverySpec, name: str, host: str, ports: Sequence[int], labels: Mapping[str, str], *, where: str
) -> InstanceSpec:
    """Build the engine that listens at the ports of a host. Raises ConfigError that begins with `where`."""
    role = role_of(spec, labels, where=where)
    engine = spec.engine_of(role)
    at = f"[{host}]" if ":" in host else host
    data: dict[str, Any] = {
        "name": instance_name(name),
        "url": f"{engine.scheme}://{at}:{ports[0]}",
        "role": role,
        **engine.model_dump(include=_COPIED),
    }
    if len(ports) > 1:
        data |= {"ranks": len(ports), "rank_by": "port"}
        if any(port != ports[0] + rank for rank, port in enumerate(ports)):
            data["ports"] = tuple(ports)
    for key, port in (("events", engine.events_port), ("snapshots", engine.snapshots_port)):
        if port is not None:
            data[key] = f"tcp://{at}:{port}"
    if role is not Role.PREFILL:
        data.pop("bootstrap_port")
    return parse_instance(data, where=where)


#: Keys of an engine that are those of an instance.
_COPIED = set(EngineSpec.model_fields) - {"scheme", "events_port", "snapshots_port"}


def role_of(spec: DiscoverySpec, labels: Mapping[str, str], *, where: str) -> Role:
    """Return the role that a pod's labels tell, the configured role without any. Raises ConfigError."""
    if spec.prefill_selector is not None and spec.decode_selector is not None:
        return _role_by_selectors(spec.prefill_selector, spec.decode_selector, labels, where=where)
    text = labels.get(spec.role_label)
    if text is None:
        return spec.role
    if text not in ROLES:
        raise ConfigError(f"{where}: label {spec.role_label} is {text!r}, known: {', '.join(sorted(ROLES))}")
    return ROLES[text]


def _role_by_selectors(prefill: str, decode: str, labels: Mapping[str, str], *, where: str) -> Role:
    roles = [
        role
        for role, selector in ((Role.PREFILL, prefill), (Role.DECODE, decode))
        if labels_of(selector).items() <= labels.items()
    ]
    if len(roles) != 1:
        which = "both" if roles else "neither"
        raise ConfigError(f"{where}: its labels match {which} of prefill_selector and decode_selector")
    return roles[0]


def instance_name(name: str) -> str:
    """Return a name of an instance for one of Kubernetes, which may be four times as long.

    >>> instance_name("vllm-decode-0")
    'vllm-decode-0'
    """
    sound = re.sub(r"[^A-Za-z0-9._:-]+", "-", name)
    if len(sound) <= _MOST_NAME and sound == name:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{sound[: _MOST_NAME - 13]}-{digest}"


def _active(pod: Pod, ports: Sequence[int]) -> list[int]:
    """Return the target ports that the pod serves. Raises ConfigError when it serves none."""
    annotations = pod.metadata.annotations or {}
    key = next((key for key in ACTIVE_PORTS if key in annotations), None)
    if key is None:
        return list(ports)
    said = {part.strip() for part in annotations[key].split(",")}
    active = [port for port in ports if str(port) in said]
    if not active:
        raise ConfigError(
            f"pod {pod.metadata.name}: {key} is {annotations[key]!r}, but the target ports are "
            f"{', '.join(map(str, ports)) or 'none'}"
        )
    return active
