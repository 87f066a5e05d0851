"""Finds the engines of an InferencePool: the pool says which pods and ports, the pods say how they are.

Rule 1. List, then watch from there. A watch that ends goes on where it was; one that is told 410 Gone, or
        an error nobody knows, lists anew.
Rule 2. What fails is tried again, later each time, up to half a minute. One line says what is wrong, when it
        begins to be; one that it is over.
Rule 3. Every object is read by itself. One that cannot be read is named in one line and stays what it was: a
        single pod of an odd shape keeps no other out.
Rule 4. A pool that is deleted leaves its engines draining: what streams goes on, and if the pool comes back
        nothing was lost.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Any, Generic, TypeVar

import msgspec

from headway.front.config import DiscoverySpec, InstanceSpec
from headway.front.discovery.api import Api, ApiError, own_namespace
from headway.front.discovery.contract import Found, Tell
from headway.front.discovery.pods import Members, Pod

__all__ = ["KubernetesSource", "Pool"]

log = logging.getLogger("headway.discovery")

POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/{}/inferencepools"
PODS = "/api/v1/namespaces/{}/pods"

#: After a failure it is tried again so much later, doubled with each up to the most.
BACKOFF_S, MOST_BACKOFF_S = 0.5, 30.0
#: A watch that ends sooner than this did not work.
SOUND_WATCH_S = 1.0

#: The version is too old to go on from.
GONE = 410


class _Metadata(msgspec.Struct, rename="camel"):
    name: str
    resource_version: str = ""


class _Selector(msgspec.Struct, rename="camel"):
    match_labels: dict[str, str]


class _Port(msgspec.Struct):
    number: int


class _PoolSpec(msgspec.Struct, rename="camel"):
    selector: _Selector
    target_ports: list[_Port]


class Pool(msgspec.Struct):
    """What is read of an InferencePool."""

    metadata: _Metadata
    spec: _PoolSpec

    @property
    def selector(self) -> str:
        """Its selector, as a query has it."""
        return ",".join(f"{key}={value}" for key, value in sorted(self.spec.selector.match_labels.items()))

    @property
    def ports(self) -> tuple[int, ...]:
        """Its target ports, in its order."""
        return tuple(port.number for port in self.spec.target_ports)


class _ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str


class _List(msgspec.Struct):
    metadata: _ListMetadata
    items: list[msgspec.Raw]


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Versioned(msgspec.Struct):
    metadata: _ListMetadata


class _Named(msgspec.Struct):
    metadata: _Metadata


class _Failure(msgspec.Struct):
    code: int = 0
    message: str = ""


_T = TypeVar("_T", Pod, Pool)


class Watch(Generic[_T]):
    """Follows the objects of one kind. `changed(objects)` hears all of them by name, after the list and after
    every change; it returns at once.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        params: Mapping[str, str],
        kind: type[_T],
        changed: Callable[[Mapping[str, _T]], None],
    ) -> None:
        self._api, self._path, self._params = api, path, params
        self._kind: type[_T] = kind
        self._changed: Callable[[Mapping[str, _T]], None] = changed
        self._objects: dict[str, _T] = {}
        self._version: str | None = None
        self._begun = False
        self._problem: str | None = None
        self._unreadable: dict[str, str] = {}  # name of an object → what is wrong with it

    async def run(self) -> None:
        """Follow until cancelled."""
        clock = asyncio.get_running_loop().time
        failures = 0
        while True:
            began_s = clock()
            try:
                await self._round()
                failed = clock() - began_s < SOUND_WATCH_S
            except ApiError as error:
                failed = True
                if error.status != GONE and not (error.status == 0 and self._begun):  # those happen
                    self._say(str(error))
                if error.status != 0:  # it was there, and did not like what it was asked
                    self._version = None
            except Exception:
                failed, self._version = True, None
                log.exception("watching %s failed", self._path)
            if not failed or clock() - began_s > MOST_BACKOFF_S:
                failures = 0
            if failed:
                failures += 1
                most_s = min(MOST_BACKOFF_S, BACKOFF_S * 2 ** (failures - 1))
                await asyncio.sleep(random.uniform(most_s / 2, most_s))

    async def _round(self) -> None:
        self._begun = False
        if self._version is None:
            await self._list()
        async with aclosing(self._api.watch(self._path, self._params, self._version or "")) as lines:
            async for line in lines:
                self._begun = True
                self._well()
                if line:
                    self._take(line)

    async def _list(self) -> None:
        found = _decode(await self._api.list(self._path, self._params), _List)
        objects = dict(each for item in found.items if (each := self._read(item)) is not None)
        self._objects = {name: each for name, each in objects.items() if each is not None}
        self._unreadable = {name: why for name, why in self._unreadable.items() if name in objects}
        self._version = found.metadata.resource_version
        self._changed(self._objects)

    def _take(self, line: bytes) -> None:
        event = _decode(line, _Event)
        if event.type == "ERROR":
            failure = _decode(event.object, _Failure)
            raise ApiError(failure.code or 500, f"{failure.code} {failure.message}")
        version = _decode(event.object, _Versioned).metadata.resource_version
        if event.type == "BOOKMARK":
            self._version = version
            return
        if event.type == "DELETED":
            name = _decode(event.object, _Named).metadata.name
            self._objects.pop(name, None)
            self._unreadable.pop(name, None)
        elif (read := self._read(event.object)) is not None and read[1] is not None:
            self._objects[read[0]] = read[1]
        self._version = version
        self._changed(self._objects)

    def _read(self, data: msgspec.Raw) -> tuple[str, _T | None] | None:
        """Return an object by its name; as it was, if it cannot be read; None for one without a name."""
        try:
            name = str(_decode(data, _Named).metadata.name)
        except ApiError as error:
            self._leave_out("", str(error))
            return None
        try:
            read: _T = _decode(data, self._kind)
        except ApiError as error:
            self._leave_out(name, str(error))
            return name, self._objects.get(name)
        self._unreadable.pop(name, None)
        return name, read

    def _leave_out(self, name: str, why: str) -> None:
        """Say once what is wrong with an object."""
        if self._unreadable.get(name) != why:
            extra = {"object": name or "without a name", "reason": why}
            log.warning("an object of %s cannot be read", self._path, extra=extra)
        self._unreadable[name] = why

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            log.warning("cannot watch %s: %s", self._path, problem)
        self._problem = problem

    def _well(self) -> None:
        if self._problem is not None:
            log.info("%s can be watched again", self._path)
        self._problem = None


class KubernetesSource:
    """The pods of a pool, or of a selector. `fits(instance)`: as `Members`."""

    def __init__(self, spec: DiscoverySpec, fits: Callable[[InstanceSpec], None]) -> None:
        self._spec = spec
        self._namespace = spec.namespace or own_namespace()
        self._members = Members(spec, fits)
        self._ports = spec.target_ports
        self._selector = spec.watched
        self._pods: Mapping[str, Pod] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._last = Found(())
        self._complained: dict[str, str] = {}

    def check(self) -> None:
        """Raise ConfigError when there is no API server to ask."""
        self._api()

    async def follow(self, tell: Tell) -> None:
        """Tell the engines there are until cancelled."""
        self._tell = tell
        async with self._api() as self._asked:
            try:
                if self._spec.pool is None:
                    await self._watch_pods()
                else:
                    await self._watch_pool(self._spec.pool)
            finally:
                await self._stop_pods()

    def _api(self) -> Api:
        spec = self._spec
        return Api(spec.api_server, token_file=spec.token_file, ca_file=spec.ca_file)

    async def _watch_pool(self, name: str) -> None:
        one = {"fieldSelector": f"metadata.name={name}"}
        path = POOLS.format(self._namespace)
        await Watch(self._asked, path, one, Pool, lambda pools: self._pool_changed(name, pools)).run()

    def _pool_changed(self, name: str, pools: Mapping[str, Pool]) -> None:
        pool = pools.get(name)
        if pool is None:
            self._pool_is_gone(name)
            return
        self._ports = pool.ports
        if pool.selector != self._selector or self._watch is None:
            self._selector = pool.selector
            self._begin_pods()
        else:
            self._update()

    def _pool_is_gone(self, name: str) -> None:
        log.warning("there is no InferencePool %s in namespace %s", name, self._namespace)
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._selector = self._pods = None
        self._last = Found(self._last.instances, frozenset(each.name for each in self._last.instances))
        self._tell(self._last)

    def _begin_pods(self) -> None:
        """Watch the pods of another selector. Those of the one before stay until there is a list."""
        if self._watch is not None:
            self._watch.cancel()
        self._pods = None
        self._watch = asyncio.create_task(self._watch_pods())

    async def _watch_pods(self) -> None:
        selected = {"labelSelector": self._selector or ""}
        await Watch(self._asked, PODS.format(self._namespace), selected, Pod, self._pods_changed).run()

    def _pods_changed(self, pods: Mapping[str, Pod]) -> None:
        self._pods = pods
        self._update()

    def _update(self) -> None:
        if self._pods is None:
            return
        self._last = self._members.update(self._pods.values(), self._ports)
        for name, why in self._members.misfits.items():
            if self._complained.get(name) != why:
                log.warning("pod left out", extra={"pod": name, "reason": why})
        self._complained = dict(self._members.misfits)
        self._tell(self._last)

    async def _stop_pods(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)


def _decode(data: bytes | msgspec.Raw, kind: type[Any]) -> Any:
    """Read JSON. Raises ApiError for what is none of this kind."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(200, f"not a {kind.__name__.strip('_')}: {error}") from None
