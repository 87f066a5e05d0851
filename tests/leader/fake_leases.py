"""A small Kubernetes API server that keeps Leases, and writes only over the version that was read."""

import json

from aiohttp import web

ALL = "/apis/coordination.k8s.io/v1/namespaces/{ns}/leases"


class FakeLeases:
    """`leases` by (namespace, name). `before_write` is called once before the next write; `lose`: the answer
    to the next write is lost. `refuse`: (status, message) of every answer.
    """

    def __init__(self):
        self.leases = {}
        self.writes = 0
        self.before_write = None
        self.lose = False
        self.refuse = None
        self._version = 100

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post(ALL, self._create)
        app.router.add_get(ALL + "/{name}", self._get)
        app.router.add_put(ALL + "/{name}", self._put)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    def only(self):
        (lease,) = self.leases.values()
        return lease

    def edit(self, **metadata):
        """Write as somebody else does."""
        ((key, lease),) = self.leases.items()
        self._keep(key, lease | {"metadata": lease["metadata"] | metadata})

    def _keep(self, key, data):
        self._version += 1
        self.leases[key] = data | {
            "metadata": data["metadata"] | {"resourceVersion": str(self._version), "uid": "u"}
        }
        return self.leases[key]

    async def _get(self, request):
        if self.refuse:
            return _status(*self.refuse)
        lease = self.leases.get((request.match_info["ns"], request.match_info["name"]))
        return _status(404, "not found") if lease is None else web.json_response(lease)

    async def _create(self, request):
        data = await self._read(request)
        key = (request.match_info["ns"], data["metadata"]["name"])
        if key in self.leases:
            return _status(409, "already exists")
        return self._wrote(request, web.json_response(self._keep(key, data), status=201))

    async def _put(self, request):
        data = await self._read(request)
        key = (request.match_info["ns"], request.match_info["name"])
        there = self.leases.get(key)
        if there is None:
            return _status(404, "not found")
        if data["metadata"].get("resourceVersion") != there["metadata"]["resourceVersion"]:
            return _status(409, "the object has been modified")
        return self._wrote(request, web.json_response(self._keep(key, data)))

    async def _read(self, request):
        assert request.content_type == "application/json"
        data = json.loads(await request.read())
        assert (data["apiVersion"], data["kind"]) == ("coordination.k8s.io/v1", "Lease")
        before, self.before_write = self.before_write, None
        if before is not None:
            before()
        return data

    def _wrote(self, request, answer):
        self.writes += 1
        if self.lose:
            self.lose = False
            request.transport.abort()
        return answer


def _status(code, message):
    return web.json_response({"kind": "Status", "message": message, "code": code}, status=code)
