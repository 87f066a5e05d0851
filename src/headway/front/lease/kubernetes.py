"""Keeps the lease in a `Lease` of coordination.k8s.io/v1, as Kubernetes' own controllers do.

Rule 1. Every write names the version that was read, so that of two only one succeeds.
Rule 2. The times in a Lease are of its holder's clock, and mean nothing here: it has run out when it has not
        changed for its length, by our clock, since we first saw it so. A follower that begins to look late
        therefore takes over late, never early.
Rule 3. The token is an annotation, which `leaseTransitions` could not be: that begins at 0 again when
        somebody deletes the Lease.
"""

import math
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import msgspec

from headway.core.leadership import Claim
from headway.front.discovery.api import Api, ApiError
from headway.front.lease.contract import Granted, StoreError, Taken

__all__ = ["FENCE_ANNOTATION", "LEASES", "KubernetesStore"]

LEASES = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"
FENCE_ANNOTATION = "headway/fence"
#: Somebody else wrote between our look and our write; then we look again, so often.
_CONFLICT, _TRIES = 409, 3
_MISSING = 404


class _Metadata(msgspec.Struct, rename="camel"):
    resource_version: str
    annotations: dict[str, str] | None = None


class _Spec(msgspec.Struct, rename="camel"):
    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    lease_transitions: int | None = None


class _Lease(msgspec.Struct):
    metadata: _Metadata
    spec: _Spec = msgspec.field(default_factory=_Spec)

    @property
    def holder(self) -> str:
        return self.spec.holder_identity or ""

    @property
    def token(self) -> int:
        """Of its holder; 0 of one who knows no tokens."""
        text = (self.metadata.annotations or {}).get(FENCE_ANNOTATION, "")
        return int(text) if text.isascii() and text.isdigit() else 0


class KubernetesStore:
    """The lease `name` in `namespace` for `holder`, whose name nobody else has. An object for one event loop.

    `clock`: monotonic seconds. `wall`: seconds since 1970, for the times people read and where tokens begin.
    """

    def __init__(
        self,
        api: Api,
        namespace: str,
        name: str,
        holder: str,
        lease_s: float,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._api = api
        self._all = LEASES.format(namespace)
        self._path = f"{self._all}/{name}"
        self._name, self._namespace = name, namespace
        self._holder = holder
        self._duration_s = math.ceil(lease_s)  # the field is in whole seconds
        self._clock = clock
        self._wall = wall
        self._opened = AsyncExitStack()
        self._is_open = False
        self._seen: tuple[str, float] = ("", 0.0)  # the version, and since when

    async def claim(self, claim: Claim) -> Granted | Taken:
        """See `Store.claim`."""
        for _ in range(_TRIES):
            try:
                return await self._claim(claim)
            except ApiError as error:
                if error.status != _CONFLICT:
                    raise StoreError(str(error)) from None
        raise StoreError(f"the lease {self._name!r} is written by others all the time")

    async def release(self, token: int) -> None:
        """See `Store.release`."""
        try:
            data, lease = await self._read()
            if (
                data is not None
                and lease is not None
                and (lease.holder, lease.token) == (self._holder, token)
            ):
                data["spec"]["holderIdentity"] = ""
                await self._write("PUT", self._path, data)
        except ApiError as error:
            raise StoreError(str(error)) from None

    async def close(self) -> None:
        """See `Store.close`."""
        await self._opened.aclose()

    async def _claim(self, claim: Claim) -> Granted | Taken:
        data, lease = await self._read()
        if data is None or lease is None:
            token = self._next_token(0, claim.above)
            await self._write("POST", self._all, self._filled({}, token, transitions=0))
            return Granted(token)
        free_in_s = self._free_in_s(lease)
        if lease.holder not in ("", self._holder) and free_in_s > 0.0:
            return Taken(lease.holder, free_in_s)
        transitions = lease.spec.lease_transitions or 0
        token = lease.token
        if lease.holder != self._holder:
            transitions += 1
        if lease.holder != self._holder or token <= claim.above:
            token = self._next_token(token, claim.above)
        await self._write("PUT", self._path, self._filled(data, token, transitions=transitions))
        return Granted(token)

    def _free_in_s(self, lease: _Lease) -> float:
        version, since_s = self._seen
        now = self._clock()
        if version != lease.metadata.resource_version:
            since_s = now
            self._seen = (lease.metadata.resource_version, now)
        return since_s + (lease.spec.lease_duration_seconds or self._duration_s) - now

    def _next_token(self, token: int, above: int) -> int:
        return max(token + 1, above + 1, int(self._wall() * 1000))

    def _filled(self, data: dict[str, Any], token: int, *, transitions: int) -> dict[str, Any]:
        """Return the Lease with us as its holder; what else others have written into it stays."""
        now = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        metadata = {"name": self._name, "namespace": self._namespace} | data.get("metadata", {})
        metadata["annotations"] = (metadata.get("annotations") or {}) | {FENCE_ANNOTATION: str(token)}
        before = data.get("spec") or {}
        stays = before.get("holderIdentity") == self._holder
        spec = before | {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": self._duration_s,
            "acquireTime": before.get("acquireTime", now) if stays else now,
            "renewTime": now,
            "leaseTransitions": transitions,
        }
        kind = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"}
        return kind | data | {"metadata": metadata, "spec": spec}

    async def _read(self) -> tuple[dict[str, Any] | None, _Lease | None]:
        if not self._is_open:
            self._is_open = True
            await self._opened.enter_async_context(self._api)
        try:
            body = await self._api.send("GET", self._path)
        except ApiError as error:
            if error.status == _MISSING:
                return None, None
            raise
        try:
            return msgspec.json.decode(body, type=dict[str, Any]), msgspec.json.decode(body, type=_Lease)
        except msgspec.MsgspecError as error:
            raise ApiError(200, f"the lease {self._name!r} is not one: {error}") from None

    async def _write(self, method: str, path: str, data: dict[str, Any]) -> None:
        await self._api.send(method, path, msgspec.json.encode(data))
