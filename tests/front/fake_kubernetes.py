"""A small Kubernetes API server: lists and watches of pods and InferencePools, and what goes wrong there."""

import asyncio
import json
from contextlib import suppress

from aiohttp import web

PODS = "/api/v1/namespaces/{ns}/pods"
POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/{ns}/inferencepools"


class FakeKubernetes:
    """`put` and `delete` change its objects. Set its attributes to make it fail."""

    def __init__(self, *, token=None, tls=None):
        self.token = token
        self.asked = []  # (path, query) of every request
        self.refuse = {}  # resource → (status, message)
        self._tls = tls
        self._objects = {"pods": {}, "inferencepools": {}}
        self._log = []  # (version, resource, type, object)
        self._version = 100
        self._compacted = 0
        self._changed = asyncio.Condition()
        self._streams = set()
        self._under_way = {"pods": 0, "inferencepools": 0}
        self._ended = 0  # how often all watches were ended

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get(PODS, self._handle("pods"))
        app.router.add_get(POOLS, self._handle("inferencepools"))
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        await self._listen(0)
        return self

    async def _listen(self, port):
        self._site = web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=self._tls)
        await self._site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def go_away(self):
        """Close the port and every connection."""
        await self._site.stop()
        for connection in self._runner.server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def come_back(self):
        await self._listen(self.port)

    def cut(self):
        """Break off every watch."""
        for transport in list(self._streams):
            transport.abort()

    async def end(self):
        """End every watch as at the time that was asked for."""
        self._ended += 1
        async with self._changed:
            self._changed.notify_all()

    async def put(self, resource, data):
        """Create or replace an object."""
        name = data["metadata"]["name"]
        kind = "MODIFIED" if name in self._objects[resource] else "ADDED"
        await self._change(resource, kind, data)

    async def delete(self, resource, name):
        await self._change(resource, "DELETED", self._objects[resource][name])

    async def _change(self, resource, kind, data):
        self._version += 1
        data = data | {"metadata": data["metadata"] | {"resourceVersion": str(self._version)}}
        if kind == "DELETED":
            del self._objects[resource][data["metadata"]["name"]]
        else:
            self._objects[resource][data["metadata"]["name"]] = data
        self._log.append((self._version, resource, kind, data))
        async with self._changed:
            self._changed.notify_all()

    async def say(self, kind, data):
        """Send an event to every watch, whatever it watches."""
        self._version += 1
        self._log.append((self._version, None, kind, data))
        async with self._changed:
            self._changed.notify_all()

    def compact(self):
        """Forget what came before: a watch from an older version is told 410."""
        self._compacted = self._version

    def lists(self, resource):
        return [query for path, query in self.asked if path.endswith(resource) and "watch" not in query]

    def watches(self, resource):
        return [query for path, query in self.asked if path.endswith(resource) and "watch" in query]

    def watching(self, resource):
        """Whether a watch is under way."""
        return self._under_way[resource] > 0

    def _handle(self, resource):
        async def handle(request):
            self.asked.append((request.path, dict(request.query)))
            if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
                return _status(401, "Unauthorized")
            if resource in self.refuse:
                return _status(*self.refuse[resource])
            if "watch" in request.query:
                return await self._watch(resource, request)
            items = [each for each in self._objects[resource].values() if _selected(each, request.query)]
            return web.json_response(
                {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}
            )

        return handle

    async def _watch(self, resource, request):
        version = int(request.query["resourceVersion"])
        if version < self._compacted:
            return _status(410, "too old resource version")
        answer = web.StreamResponse(headers={"Content-Type": "application/json"})
        await answer.prepare(request)
        self._streams.add(request.transport)
        self._under_way[resource] += 1
        try:
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(float(request.query["timeoutSeconds"]) or None):
                    await self._stream(resource, request.query, version, answer)
        finally:
            self._streams.discard(request.transport)
            self._under_way[resource] -= 1
        return answer

    async def _stream(self, resource, query, version, answer):
        ended = self._ended
        while True:
            last = ended != self._ended
            for at, which, kind, data in [entry for entry in self._log if entry[0] > version]:
                version = at
                if which not in (resource, None) or (which and not _selected(data, query)):
                    continue
                await answer.write(json.dumps({"type": kind, "object": data}).encode() + b"\n")
            if last:
                return
            async with self._changed:
                while self._version <= version and ended == self._ended:
                    await self._changed.wait()


def _status(code, message):
    return web.json_response({"kind": "Status", "message": message, "code": code}, status=code)


def _selected(data, query):
    """Whether an object is selected by labels with `key=value`, or by its name."""
    labels = data["metadata"].get("labels") or {}
    wanted = [part.split("=") for part in query.get("labelSelector", "").split(",") if part]
    if any(labels.get(key) != value for key, value in wanted):
        return False
    field = query.get("fieldSelector")
    return field is None or field == f"metadata.name={data['metadata']['name']}"


def pool(name="llama", ports=(8000,), **labels):
    return {
        "kind": "InferencePool",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": labels or {"app": "vllm"}},
            "targetPorts": [{"number": port} for port in ports],
            "endpointPickerRef": {"name": "headway-epp", "port": {"number": 9002}},
        },
    }


def pod(name, ip=None, *, ready=True, leaving=False, app="vllm", **labels):
    """Return a pod. Each has an address of its own: pod "a" is at 127.0.0.1, "b" at 127.0.0.2, and so on."""
    metadata = {"name": name, "labels": {"app": app} | labels}
    if leaving:
        metadata["deletionTimestamp"] = "2026-11-24T10:00:00Z"
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    return {
        "kind": "Pod",
        "metadata": metadata,
        "status": {
            "phase": "Running",
            "podIP": ip or f"127.0.0.{(sum(name.encode()) - 96) % 250}",
            "conditions": [condition],
        },
    }
