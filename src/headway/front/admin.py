"""The operators' side, on its own bind behind a token.

GET    /workers                  every engine: state, why, what is under way
POST   /workers                  add one: the keys of [[instances]] as JSON
POST   /workers/NAME/drain       nothing new goes there;  /undrain takes it back
DELETE /workers/NAME             drain (?timeout_s=30), then remove, also when the client is gone by then
GET    /held                     every request that waits, since when and why
GET    /metrics /health          as on the public side
GET    /  /admin/live            the page, and what it lives on (`page.py`)
"""

from typing import Any
from urllib.parse import unquote

import msgspec

from headway.core.errors import ConfigError
from headway.front.access import Gate
from headway.front.config import parse_instance
from headway.front.driver import Driver
from headway.front.errors import Refusal, bad_request
from headway.front.json_body import decode
from headway.front.metrics import Metrics
from headway.front.protocol import HttpRequest, HttpResponse, Routes, json_answer, refused
from headway.front.worker import Worker
from headway.front.workers import Workers

__all__ = ["AdminSide", "describe", "metrics_page"]

#: A removal waits this long for a worker's requests unless told otherwise, and never longer than the most.
DRAIN_S, MOST_DRAIN_S = 30.0, 3600.0
#: A body is a few lines: it is there in this time.
BODY_S = 10.0

_anything = msgspec.json.Decoder(Any)


def describe(worker: Worker) -> dict[str, object]:
    """Return a worker as operators see it."""
    return {
        "name": worker.name,
        "url": worker.spec.url,
        "role": worker.spec.role.value,
        "dialect": worker.spec.dialect,
        "ranks": worker.ranks,
        "state": worker.state.value,
        "draining": worker.draining,
        "why": worker.health.reason,
        "legs": len(worker.legs),
        "epoch": worker.epoch,
        "ejections": worker.health.ejections,
        "concurrency_limit": worker.limit.limit,
        "backpressure": worker.limit.refusals,
        "models": sorted(worker.models),
    }


class AdminSide:
    """Handles the operators' requests. `routes` may be added to, and `open_routes`, which need no token."""

    def __init__(self, workers: Workers, driver: Driver, metrics: Metrics, gate: Gate) -> None:
        self.routes: Routes = {
            ("GET", "/workers"): self._list,
            ("POST", "/workers"): self._add,
            ("GET", "/held"): self._held,
            ("GET", "/metrics"): self._metrics,
        }
        self.open_routes: Routes = {}
        self._workers = workers
        self._driver = driver
        self._counts = metrics
        self._gate = gate

    async def __call__(self, request: HttpRequest) -> HttpResponse | None:
        """Answer a request."""
        if (request.method, request.path) == ("GET", "/health"):
            return json_answer({"status": "ok"})
        open_route = self.open_routes.get((request.method, request.path))
        if open_route is not None:
            return await open_route(request)
        try:
            self._gate.check(request.headers)
            return await self._route(request)
        except ConfigError as error:
            refusal = bad_request(str(error), code="bad_worker")
        except Refusal as no:
            refusal = no
        return refused(refusal)

    async def _route(self, request: HttpRequest) -> HttpResponse | None:
        route = self.routes.get((request.method, request.path))
        if route is not None:
            return await route(request)
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        match (request.method, parts):
            case ("POST", ["workers", name, "drain"]):
                return json_answer(describe(self._workers.drain(self._known(name))))
            case ("POST", ["workers", name, "undrain"]):
                return json_answer(describe(self._workers.undrain(self._known(name))))
            case ("DELETE", ["workers", name]):
                return await self._remove(request, self._known(name))
        raise Refusal(404, "unknown_path", f"There is no {request.method} {request.path[:100]!r} here.")

    def _known(self, name: str) -> str:
        if self._workers.get(name) is None:
            raise Refusal(404, "unknown_worker", f"There is no worker {name[:100]!r}.")
        return name

    async def _list(self, request: HttpRequest) -> HttpResponse | None:
        return json_answer([describe(worker) for worker in self._workers])

    async def _add(self, request: HttpRequest) -> HttpResponse | None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # the one kind that no other site's page can send without asking us
            raise Refusal(415, "content_type", "Send Content-Type: application/json.")
        data = decode(_anything, await request.read(BODY_S))
        if not isinstance(data, dict):
            raise bad_request("A worker is a JSON object.")
        worker = await self._workers.add(parse_instance(data, where="worker"))
        return json_answer(describe(worker), 201)

    async def _remove(self, request: HttpRequest, name: str) -> HttpResponse | None:
        text = request.query.get("timeout_s", str(DRAIN_S))
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = -1.0
        if not 0.0 <= timeout_s <= MOST_DRAIN_S:
            raise bad_request(f"timeout_s must be 0 to {MOST_DRAIN_S:g} seconds.", param="timeout_s")
        await self._workers.remove(name, timeout_s=timeout_s)
        return json_answer({"removed": name})

    async def _held(self, request: HttpRequest) -> HttpResponse | None:
        held = self._driver.held()
        return json_answer([{"id": h.request_id, "since_s": h.since_s, "why": h.why} for h in held])

    async def _metrics(self, request: HttpRequest) -> HttpResponse | None:
        return metrics_page(self._gate, self._counts, request)


def metrics_page(gate: Gate, metrics: Metrics, request: HttpRequest) -> HttpResponse:
    """Return the metrics in Prometheus' text format. Raises Refusal when the gate lets nobody in."""
    gate.check(request.headers)
    return HttpResponse(200, metrics.text(), {"Content-Type": "text/plain; version=0.0.4"})
