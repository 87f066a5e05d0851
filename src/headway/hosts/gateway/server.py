"""The public side: which path is what, who may ask, how much, and how a no is told.

POST /v1/chat/completions, /v1/completions      placed by the policy, streamed byte for byte
GET  /v1/models                                 what the engines serve
*    /v1/…                                      passed on to an engine
GET  /health /ready /metrics                    it lives; it can serve; its numbers
"""

import asyncio
import re
import secrets
from collections import Counter
from itertools import count

from headway.core.request import Slo
from headway.front.access import Keys
from headway.front.errors import Refusal, unavailable
from headway.front.lease import Elector
from headway.front.logs import AccessLog
from headway.front.metrics import Metrics
from headway.front.protocol import ClientSink, HttpRequest, HttpResponse, Routes, json_answer, refused
from headway.front.requests import GENERATIONS, read_call, read_targets
from headway.front.workers import Workers
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.passthrough import Passthrough
from headway.hosts.gateway.serving import Serving

__all__ = ["PublicSide"]

_SOUND_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class PublicSide:
    """Handles the clients' requests. `draining`: new ones are refused. `routes` may be added to."""

    def __init__(
        self,
        config: GatewayConfig,
        serving: Serving,
        passthrough: Passthrough,
        workers: Workers,
        elector: Elector,
        metrics: Metrics,
        keys: Keys,
        access_log: AccessLog,
    ) -> None:
        self.draining = False
        self.routes: Routes = {
            ("GET", "/health"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/liveness"): self._health,
            ("GET", "/readiness"): self._ready,
            **{("HEAD", path): self._health for path in ("/health", "/liveness")},
            **{("HEAD", path): self._ready for path in ("/ready", "/readiness")},
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            **{("POST", path): self._generate for path in GENERATIONS},
        }
        self._paths = {path for _, path in self.routes if path not in ("/v1/models",)}
        self._limits = config.limits
        self._slo: Slo = config.slo.slo()
        self._serving = serving
        self._passthrough = passthrough
        self._workers = workers
        self._elector = elector
        self._counts = metrics
        self._keys = keys
        self._access_log = access_log
        self._boot = secrets.token_hex(4)
        self._numbers = count(1)

    async def __call__(self, request: HttpRequest) -> HttpResponse | None:
        """Answer a request."""
        route = self.routes.get((request.method, request.path))
        if route is not None:
            return await route(request)
        if request.path.startswith("/v1/") and request.path not in self._paths:
            return await self._pass_on(request)
        return self._unknown(request)

    def _unknown(self, request: HttpRequest) -> HttpResponse:
        allowed = sorted(method for method, path in self.routes if path == request.path)
        if not allowed:
            return self._refuse(Refusal(404, "unknown_path", f"There is no {request.path[:100]!r} here."))
        answer = self._refuse(Refusal(405, "method_not_allowed", f"Use {' or '.join(allowed)}."))
        answer.headers["Allow"] = ", ".join(allowed)
        return answer

    # Generations

    async def _generate(self, request: HttpRequest) -> HttpResponse | None:
        request_id = self._request_id(request)
        sink = ClientSink(request, {"x-request-id": request_id})
        try:
            self._admit(request)
            slo, priority = read_targets(request.headers, self._slo)
            call = read_call(request.path, await self._body(request))
            flight = await self._serving.take_in(call, request.headers, request_id, slo, priority, sink)
        except Refusal as refusal:
            self._refused(request.path, request_id, refusal)
            await sink.fail(refusal)
            return None
        try:
            await self._serving.serve(flight)
        except Refusal as refusal:
            await sink.fail(refusal)
        return None

    def _admit(self, request: HttpRequest) -> None:
        self._keys.check(request.headers)
        if self.draining:
            raise unavailable("draining", "The gateway is shutting down.")
        length = request.headers.get("content-length")
        if length is not None and int(length) > self._limits.max_body_bytes:
            most = self._limits.max_body_bytes
            raise Refusal(413, "body_too_large", f"The body is larger than {most} bytes.")

    async def _body(self, request: HttpRequest) -> bytes:
        if "content-encoding" in request.headers:
            raise Refusal(400, "content_encoding", "A compressed body is not accepted.")
        if request.complete:
            return await request.read()
        try:
            async with asyncio.timeout(self._limits.body_timeout_s) as timer:
                return await request.read()
        except TimeoutError:
            if not timer.expired():
                raise
            message = f"No complete body in {self._limits.body_timeout_s:g} s."
            raise Refusal(408, "body_timeout", message) from None

    def _request_id(self, request: HttpRequest) -> str:
        given = request.headers.get("x-request-id")
        if given is not None and _SOUND_ID.fullmatch(given):
            return given
        return f"req-{self._boot}-{next(self._numbers)}"

    # The rest

    async def _pass_on(self, request: HttpRequest) -> HttpResponse | None:
        request_id = self._request_id(request)
        sink = ClientSink(request, {"x-request-id": request_id})
        try:
            self._admit(request)
            body = await self._body(request)
            status = await self._passthrough.serve(
                request.method, request.target, request.headers, body, request_id, sink
            )
        except (ConnectionError, asyncio.CancelledError):
            self._counts.refused(499)
            self._access_log.passed_on(request.method, request.path, request_id, 499)
            raise
        except Refusal as refusal:
            self._refused(request.path, request_id, refusal)
            await sink.fail(refusal)
            return None
        self._counts.refused(status)
        self._access_log.passed_on(request.method, request.path, request_id, status)
        return None

    async def _models(self, request: HttpRequest) -> HttpResponse | None:
        try:
            self._keys.check(request.headers)
        except Refusal as refusal:
            return self._refuse(refusal)
        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "headway"}
            | ({} if longest is None else {"max_model_len": longest})
            for name, longest in sorted(self._workers.models().items())
        ]
        return json_answer({"object": "list", "data": data})

    async def _health(self, request: HttpRequest) -> HttpResponse | None:
        return json_answer({"status": "ok"})

    async def _ready(self, request: HttpRequest) -> HttpResponse | None:
        ready = self._workers.ready() and self._elector.leads() and not self.draining
        told: dict[str, object] = {"ready": ready}
        told["workers"] = Counter(worker.state.value for worker in self._workers)
        if self._elector.shared:
            told["leader"] = self._elector.standing()
        return json_answer(told, 200 if ready else 503)

    async def _metrics(self, request: HttpRequest) -> HttpResponse | None:
        return HttpResponse(200, self._counts.text(), {"Content-Type": "text/plain; version=0.0.4"})

    def _refused(self, path: str, request_id: str, refusal: Refusal) -> None:
        self._counts.refused(refusal.status)
        self._access_log.refused(path, request_id, refusal.status, refusal.code)

    def _refuse(self, refusal: Refusal) -> HttpResponse:
        self._counts.refused(refusal.status)
        return refused(refusal)
