"""Adding and removing engines by URL on the public side, as `vllm-router` has it; off unless configured.

POST /add_worker?url=URL[&role=prefill|decode][&bootstrap_port=N]     "Successfully added worker: URL"
POST /remove_worker?url=URL        drains it first; 200 for an unknown URL too, which the text says
GET  /list_workers                 {"urls": [URL, …]}, URL@RANK where an engine has several ranks
GET  /workers                      {"workers": [{"url", "model_id", "worker_type", "is_healthy", "load"}, …]}
GET  /get_loads                    {"workers": [{"worker": URL, "load": requests under way}, …]}

These are operators' functions: `posture.py` decides who may call them. The admin side has more, on a bind of
its own.
"""

import re
from collections import Counter
from urllib.parse import urlsplit

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.front.access import Gate
from headway.front.addresses import address_of
from headway.front.config import InstanceSpec, parse_instance
from headway.front.errors import Refusal, bad_request
from headway.front.protocol import Handler, HttpRequest, HttpResponse, Routes, json_answer, refused
from headway.front.worker import State, Worker
from headway.front.workers import Workers
from headway.hosts.gateway.config import GatewayConfig

__all__ = ["CLOSED", "WorkerApi", "instance_name"]

#: What a caller reads where nobody may call these.
CLOSED = (
    "Changing engines needs an operator token here: set [admin] token_env (--admin-token-env). "
    "To let everyone do it who may send requests, set [worker_api] open = true (--open-worker-api)."
)

#: How the other routers call the roles.
_KINDS = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.AGGREGATED: "regular"}


def instance_name(url: str) -> str:
    """Name an engine after its URL.

    >>> instance_name("http://10.0.0.1:8000/")
    '10.0.0.1:8000'
    """
    parts = urlsplit(url)
    name = f"{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    return re.sub(r"[^A-Za-z0-9._:-]+", "-", name).strip("-")[-64:]


class WorkerApi:
    """Handles these requests. What is added is what `[worker_api]` says."""

    def __init__(self, config: GatewayConfig, workers: Workers, gate: Gate) -> None:
        self.routes: Routes = {
            ("POST", "/add_worker"): self._guarded(self._add),
            ("POST", "/remove_worker"): self._guarded(self._remove),
            ("GET", "/list_workers"): self._guarded(self._list),
            ("GET", "/workers"): self._guarded(self._describe),
            ("GET", "/get_loads"): self._guarded(self._loads),
        }
        self._config = config
        self._workers = workers
        self._gate = gate

    def _guarded(self, handle: Handler) -> Handler:
        async def route(request: HttpRequest) -> HttpResponse | None:
            try:
                self._gate.check(request.headers)
                return await handle(request)
            except ConfigError as error:
                refusal = bad_request(str(error), code="bad_worker")
            except Refusal as no:
                refusal = no
            return refused(refusal)

        return route

    async def _add(self, request: HttpRequest) -> HttpResponse:
        url = _url(request)
        if self._at(url):
            raise bad_request(f"There is a worker at {url[:200]} already.", param="url", code="bad_worker")
        worker = await self._workers.add(self._instance(url, request))
        await self._check_started(worker)
        return _text(f"Successfully added worker: {worker.spec.url}")

    async def _check_started(self, worker: Worker) -> None:
        """Wait for an added engine's first healthy check. Raises Refusal and removes it if there is none."""
        timeout_s = self._config.worker_api.startup_timeout_s
        if await self._workers.until(lambda: worker.state is not State.STARTING, timeout_s):
            return
        reason, url = worker.health.reason, worker.spec.url
        if self._workers.get(worker.name) is worker:
            await self._workers.remove(worker.name)
        message = f"The engine at {url[:200]} was not added: not healthy after {timeout_s:g} s: {reason}."
        raise bad_request(message, param="url", code="bad_worker")

    def _instance(self, url: str, request: HttpRequest) -> InstanceSpec:
        like = self._config.worker_api
        data = {
            "name": instance_name(url),
            "url": url,
            "dialect": like.dialect,
            "ranks": like.ranks,
            "chunk_tokens": like.chunk_tokens,
        }
        given = {key: request.query[key] for key in ("role", "bootstrap_port") if key in request.query}
        return parse_instance(data | given, where="add_worker")

    async def _remove(self, request: HttpRequest) -> HttpResponse:
        url = _url(request)
        workers = self._at(url)
        if not workers:
            return _text(f"There is no worker at {url[:200]}: nothing was removed.")
        for worker in workers:
            await self._workers.remove(worker.name, timeout_s=self._config.server.drain_timeout_s)
        return _text(f"Successfully removed worker: {url[:200]}")

    async def _list(self, request: HttpRequest) -> HttpResponse:
        return json_answer({"urls": [url for worker in self._workers for url in _listed(worker)]})

    async def _describe(self, request: HttpRequest) -> HttpResponse:
        described = [_described(worker) for worker in self._workers]
        kinds = Counter(str(each["worker_type"]) for each in described)
        stats = {f"{kind}_count": kinds[kind] for kind in _KINDS.values()}
        return json_answer({"workers": described, "total": len(described), "stats": stats})

    async def _loads(self, request: HttpRequest) -> HttpResponse:
        loads = [{"worker": each.spec.url, "load": len(each.legs)} for each in self._workers]
        return json_answer({"workers": loads})

    def _at(self, url: str) -> list[Worker]:
        """Return the engine that listens at a URL, however that is written, or none."""
        address = address_of(url)
        return [each for each in self._workers if address in map(address_of, each.spec.urls())]


def _text(said: str) -> HttpResponse:
    return HttpResponse(200, said.encode(), {"Content-Type": "text/plain; charset=utf-8"})


def _described(worker: Worker) -> dict[str, object]:
    """Return an engine with the fields that vllm-router and smg both show."""
    return {
        "url": worker.spec.url,
        "model_id": min(worker.models, default="unknown"),
        "worker_type": _KINDS[worker.spec.role],
        "is_healthy": worker.state is State.UP,
        "load": len(worker.legs),
    }


def _listed(worker: Worker) -> list[str]:
    url = worker.spec.url
    return [url] if worker.ranks == 1 else [f"{url}@{rank}" for rank in range(worker.ranks)]


def _url(request: HttpRequest) -> str:
    """The engine meant; of a rank's own URL, the engine's."""
    url = re.sub(r"@\d+$", "", request.query.get("url", "")).rstrip("/")
    if not url:
        raise bad_request("Say which: ?url=http://HOST:PORT.", param="url")
    try:
        address_of(url)
    except ValueError:
        raise bad_request(f"{url[:200]} is no URL: http://HOST:PORT.", param="url") from None
    return url
