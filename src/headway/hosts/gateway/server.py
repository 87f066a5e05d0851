"""Answer clients' requests: find what a path is (`endpoints.py`), check who asks and how much, and refuse.

Generations go to `Serving`, what the policy does not place to `Passthrough`, and what concerns every engine
to `Broadcast`. What concerns the gateway itself is in `OwnPages`.
"""

import asyncio
import secrets
from collections.abc import Sequence
from itertools import count

from headway.core.request import Slo
from headway.front.access import Gate
from headway.front.body_reader import BodyReader
from headway.front.content_coding import decode_body
from headway.front.errors import Refusal, unavailable
from headway.front.keys import CLIENT_NAME, Client, ClientKeys
from headway.front.lease import Elector
from headway.front.logs import AccessLog
from headway.front.metrics import Metrics
from headway.front.protocol import ClientSink, HttpRequest, HttpResponse, Routes, refused
from headway.front.request_ids import given_request_id
from headway.front.requests import Call, read_targets
from headway.front.workers import Workers
from headway.hosts.gateway.broadcast import Broadcast
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.cors import Cors
from headway.hosts.gateway.endpoints import Endpoint, Kind, find, is_operated
from headway.hosts.gateway.own_pages import OwnPages
from headway.hosts.gateway.passthrough import Passthrough
from headway.hosts.gateway.sequences import Sequences
from headway.hosts.gateway.serving import Serving
from headway.hosts.gateway.websocket import Tunnels

__all__ = ["PublicSide"]

#: Paths that need no client key: probes have none, and /metrics has a gate of its own.
_KEYLESS = frozenset(
    ("/health", "/liveness", "/ready", "/readiness", "/health_generate", "/ping", "/metrics")
)


class PublicSide:
    """Handles the clients' requests. `draining`: new ones are refused.

    `operator_routes` may be added to: they check by themselves who asks, and no other site may read them.
    """

    def __init__(
        self,
        config: GatewayConfig,
        serving: Serving,
        passthrough: Passthrough,
        broadcast: Broadcast,
        workers: Workers,
        elector: Elector,
        metrics: Metrics,
        keys: ClientKeys,
        metrics_gate: Gate,
        operators_gate: Gate,
        access_log: AccessLog,
        reader: BodyReader,
    ) -> None:
        self.draining = False
        self._pages = OwnPages(workers, elector, metrics, metrics_gate, lambda: self.draining)
        self.routes: Routes = dict(self._pages.routes)
        self.operator_routes: Routes = {}
        self._operators_here = config.worker_api.enabled
        self._cors = Cors(config.cors)
        self._limits = config.limits
        self._slo: Slo = config.slo.slo()
        self._serving = serving
        self._splits = bool(config.disaggregated)
        self._sequences = Sequences(serving, self._read, config.limits)
        self._passthrough = passthrough
        self.tunnels = Tunnels(passthrough, serving.buffer, config.limits)
        self._broadcast = broadcast
        self._counts = metrics
        self._keys = keys
        self._operators_gate = operators_gate
        self._access_log = access_log
        self._reader = reader
        self._boot = secrets.token_hex(4)
        self._numbers = count(1)

    async def __call__(self, request: HttpRequest) -> HttpResponse | None:
        """Answer a request. Check who asks first: without a key, a client learns nothing about paths."""
        own = self.operator_routes.get((request.method, request.path))
        if own is not None:
            return await own(request)
        preflight = self._cors.preflight(request)
        if preflight is not None:
            return preflight
        request.answer_headers = self._cors.headers(request.headers)
        if request.path in _KEYLESS or is_operated(request.path):
            return await self._answer(request)
        try:
            client = self._keys.check(request.headers)
        except Refusal as refusal:
            return self._not_let_in(request, refusal)
        if client is None:
            return await self._answer(request)
        name = CLIENT_NAME.set(client.spec.name)
        try:
            return await self._answer_client(client, request)
        finally:
            CLIENT_NAME.reset(name)

    async def _answer_client(self, client: Client, request: HttpRequest) -> HttpResponse | None:
        try:
            client.enter(request.headers)
        except Refusal as refusal:
            return self._not_let_in(request, refusal)
        try:
            return await self._answer(request)
        finally:
            client.leave()

    def _not_let_in(self, request: HttpRequest, refusal: Refusal) -> HttpResponse:
        request_id = self._request_id(request)
        self._refused(request.path, request_id, refusal)
        answer = refused(refusal, request.path)
        answer.headers["x-request-id"] = request_id
        return answer

    async def _answer(self, request: HttpRequest) -> HttpResponse | None:
        route = self.routes.get((request.method, request.path))
        try:
            if route is not None:
                return await route(request)
            endpoint = find(request.path)
        except Refusal as refusal:
            return self._refuse(refusal)
        if endpoint is None:
            return self._unknown(request)
        if endpoint.methods and request.method not in endpoint.methods:
            return self._wrong_method(endpoint.methods)
        match endpoint.kind:
            case Kind.SCHEDULED:
                return await self._generate(request)
            case Kind.GATEWAY:
                return await self._describe_model(request)
            case Kind.REFUSED:
                message = f"The gateway does not serve {endpoint.path}. {endpoint.why}"
                return self._refuse(Refusal(501, "not_served", message))
            case Kind.TUNNELLED:
                return await self._open_tunnel(endpoint, request)
            case Kind.JOINED | Kind.OPERATED:
                return await self._ask_all(endpoint, request)
            case _:
                return await self._pass_on(endpoint, request)

    def _unknown(self, request: HttpRequest) -> HttpResponse:
        allowed = sorted(method for method, path in self.routes if path == request.path)
        if allowed:
            return self._wrong_method(allowed)
        return self._refuse(Refusal(404, "unknown_path", f"There is no {request.path[:100]!r} here."))

    async def _describe_model(self, request: HttpRequest) -> HttpResponse:
        try:
            return await self._pages.model(request)
        except Refusal as refusal:
            return self._refuse(refusal)

    def _wrong_method(self, allowed: Sequence[str]) -> HttpResponse:
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
            body = await self._body(request)
            call = await self._read(request.path, body)
            if call.sequences > 1 and self._splits:
                await self._sequences.serve(call, request.headers, request_id, slo, priority, sink)
                return None
            flight = await self._serving.take_in(
                call, request.headers, request_id, slo, priority, sink, request.received
            )
        except Refusal as refusal:
            self._refused(request.path, request_id, refusal)
            await sink.fail(refusal)
            return None
        try:
            await self._serving.serve(flight)
        except Refusal as refusal:
            await sink.fail(refusal)
        return None

    async def _read(self, path: str, body: bytes) -> Call:
        return await self._reader.read(path, body, prefixes=self._serving.reads_prefixes)

    def _admit(self, request: HttpRequest) -> None:
        if self.draining:
            raise unavailable("draining", "The gateway is shutting down.")
        length = request.headers.get("content-length")
        if length is not None and int(length) > self._limits.max_body_bytes:
            most = self._limits.max_body_bytes
            raise Refusal(413, "body_too_large", f"The body is larger than {most} bytes.")

    async def _body(self, request: HttpRequest) -> bytes:
        body = await request.read(self._limits.body_timeout_s)
        coding = request.headers.pop("content-encoding", None)
        if coding is not None:  # engines get the plain body
            body = await decode_body(body, coding, self._limits.max_body_bytes, request.received)
        return body

    def _request_id(self, request: HttpRequest) -> str:
        return given_request_id(request.headers) or f"req-{self._boot}-{next(self._numbers)}"

    # The rest

    async def _pass_on(self, endpoint: Endpoint, request: HttpRequest) -> HttpResponse | None:
        request_id = self._request_id(request)
        sink = ClientSink(request, {"x-request-id": request_id})
        try:
            self._admit(request)
            body = await self._body(request)
            status = await self._passthrough.serve(
                endpoint, request.method, request.query_string, request.headers, body, request_id, sink
            )
        except (ConnectionError, asyncio.CancelledError):
            self._passed_on(request, request_id, 499)
            raise
        except Refusal as refusal:
            self._refused(request.path, request_id, refusal)
            await sink.fail(refusal)
            return None
        self._passed_on(request, request_id, status)
        return None

    async def _open_tunnel(self, endpoint: Endpoint, request: HttpRequest) -> HttpResponse | None:
        request_id = self._request_id(request)
        allowed = "Access-Control-Allow-Origin" in request.answer_headers
        try:
            self._admit(request)
            status = await self.tunnels.serve(endpoint, request, request_id, origin_allowed=allowed)
        except (ConnectionError, asyncio.CancelledError):
            self._passed_on(request, request_id, 499)
            raise
        except Refusal as refusal:
            answer = self._not_let_in(request, refusal)
            if refusal.status == 426:
                answer.headers["Upgrade"] = "websocket"
            return answer
        self._passed_on(request, request_id, status)
        return None

    async def _ask_all(self, endpoint: Endpoint, request: HttpRequest) -> HttpResponse | None:
        request_id = self._request_id(request)
        try:
            if endpoint.kind is Kind.OPERATED:
                self._check_operator(request)
            self._admit(request)
            body = await self._body(request)
            answer = await self._broadcast.serve(endpoint, request.method, request.query_string, body)
        except (ConnectionError, asyncio.CancelledError):
            self._passed_on(request, request_id, 499)
            raise
        except Refusal as refusal:
            self._refused(request.path, request_id, refusal)
            return refused(refusal)
        self._passed_on(request, request_id, answer.status)
        answer.headers["x-request-id"] = request_id
        return answer

    def _check_operator(self, request: HttpRequest) -> None:
        """Raise Refusal unless operators are let in here, and this is one."""
        if not self._operators_here:
            message = "This is for operators: ask at the admin address, or enable [worker_api]."
            raise Refusal(403, "operators_only", message)
        self._operators_gate.check(request.headers)

    def _passed_on(self, request: HttpRequest, request_id: str, status: int) -> None:
        self._counts.refused(status)
        self._access_log.passed_on(request.method, request.path, request_id, status)

    def _refused(self, path: str, request_id: str, refusal: Refusal) -> None:
        self._counts.refused(refusal.status)
        self._access_log.refused(path, request_id, refusal.status, refusal.code)

    def _refuse(self, refusal: Refusal) -> HttpResponse:
        self._counts.refused(refusal.status)
        return refused(refusal)
