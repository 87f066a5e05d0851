"""Decides how an engine answers HTTP: one instance, on one port (rank by header) or on a port per rank.

A generation's way: faults → body → rank → KV from prefill, if it has to come → engine → tokens → answer. The
framework cancels the handler when its client goes; that withdraws the request wherever it is.
"""

import asyncio
import math
import os
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import orjson
from aiohttp import web

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.core.leadership import FENCE_HEADER, FENCED, Fence, read_token
from headway.core.request import Request, Slo
from headway.hosts.emulator.answers import SseStream, answer, embeddings
from headway.hosts.emulator.asks import Ask, Limits, parse_ask, parse_embeddings, rank_in_header
from headway.hosts.emulator.clock import Clock
from headway.hosts.emulator.dispatches import Dispatches
from headway.hosts.emulator.driver import Driver, Job
from headway.hosts.emulator.errors import ApiError
from headway.hosts.emulator.faults import Fault, parse_fault
from headway.hosts.emulator.handover import KvStore, Room, Rooms
from headway.hosts.emulator.metrics import Dialect, Metrics
from headway.model.cluster import ClusterSpec

__all__ = ["FaultPost", "Server"]

#: Told of a fault that was posted; None: it is over.
FaultPost = Callable[[Fault | None], None]

#: The rank behind a port; None: any, by header.
_RANK = web.AppKey("rank", object)

_MAX_BODY_BYTES = 64 << 20


class Server:
    """The HTTP side of one instance. `fault`: what is wrong with it now. `port`: its first, which names its
    bootstrap server too.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        driver: Driver,
        limits: Limits,
        clock: Clock,
        *,
        dialect: Dialect,
        kv_store: KvStore,
        rooms: Rooms,
        on_fault: FaultPost,
    ) -> None:
        pool = driver.instance.pool
        self.fault: Fault | None = None
        self.unhung = asyncio.Event()
        self.unhung.set()
        self.port = 0
        self.metrics = Metrics(dialect, limits.model, pool.role, pool.ranks)
        self._cluster, self._driver, self._limits, self._clock = cluster, driver, limits, clock
        self._dialect, self._kv_store, self._rooms, self._on_fault = dialect, kv_store, rooms, on_fault
        self._dispatches = Dispatches(driver.instance)
        self._fence = Fence()
        self._rng = random.Random(f"{limits.seed}/faults/{driver.instance.name}")
        self._requests = 0
        self._spared: asyncio.Transport | None = None
        self._runners: list[web.AppRunner] = []

    async def listen(self, host: str, ports: list[int], *, by_port: bool) -> list[int]:
        """Serve on these ports (0: a free one), the first rank on the first one if `by_port`.

        Return the ports. Raises ConfigError when one cannot be had.
        """
        taken = []
        for rank, port in enumerate(ports):
            runner = web.AppRunner(
                self._app(rank if by_port else None),
                handler_cancellation=True,
                access_log=None,
                shutdown_timeout=0.1,
            )
            self._runners.append(runner)
            await runner.setup()
            try:
                await web.TCPSite(runner, host, port, backlog=4096).start()
            except OSError as error:
                known = error.errno is not None and error.errno > 0
                reason = os.strerror(error.errno or 0).lower() if known else error.strerror
                raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from None
            taken.append(runner.addresses[0][1])
        self.port = taken[0]
        return taken

    def cut_connections(self) -> None:
        """Reset every connection, as the death of a process does; but for the one that asked for it."""
        for runner in self._runners:
            if runner.server is not None:
                for connection in list(runner.server.connections):
                    if connection.transport not in (None, self._spared):
                        connection.transport.abort()

    async def close(self) -> None:
        """Stop serving."""
        self.unhung.set()
        self.cut_connections()
        for runner in self._runners:
            await runner.cleanup()

    @property
    def engine_id(self) -> str:
        """What prefill hands over KV under: another life, another id."""
        return f"{self._driver.instance.name}@{self._driver.instance.epoch}"

    def _app(self, rank: int | None) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY_BYTES)
        app[_RANK] = rank
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_post("/fault", self._post_fault)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        if self._dialect == "sglang":
            app.router.add_get("/v1/loads", self._loads)
            app.router.add_get("/health_generate", self._health)
        return app

    # Faults and errors

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            if request.path != "/fault":
                await self._suffer(request)
            self._check_fence(request)
            return await handler(request)
        except ApiError as error:
            return _json(error.body(), error.status, error.headers)
        except web.HTTPException as error:
            return _json(ApiError(error.status, error.reason).body(), error.status)
        except ConnectionError:
            _cut(request)  # the client went as it was written to, which is no failure of ours

    def _check_fence(self, request: web.Request) -> None:
        """Refuse work of a leader that another one has followed; any request may be what shows its token."""
        token = read_token(request.headers.get(FENCE_HEADER))
        if not self._fence.admits(token) and request.method == "POST":
            newest = {FENCE_HEADER: str(self._fence.newest)}
            raise ApiError(FENCED, "Another leader has placed work here since.", headers=newest)

    async def _suffer(self, request: web.Request) -> None:
        fault = self.fault
        if not self.unhung.is_set():
            await self.unhung.wait()
        elif fault is None:
            return
        elif fault.kind == "crash" or (fault.kind == "refuse" and fault.status is None):
            _cut(request)
        elif fault.kind == "refuse":
            assert fault.status is not None
            raise ApiError(fault.status, "The engine refuses requests.")
        elif fault.kind == "error_rate" and request.method == "POST" and self._rng.random() < fault.rate:
            raise ApiError(fault.status or 500, "Injected error.")

    async def _post_fault(self, request: web.Request) -> web.Response:
        try:
            fault = parse_fault(await request.read())
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        self._spared = request.transport
        self._on_fault(fault)
        self._spared = None
        return _json(orjson.dumps({"instance": self._driver.instance.name, "fault": _kind(self.fault)}))

    # Small endpoints

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        model = {
            "id": self._limits.model,
            "object": "model",
            "created": 0,
            "owned_by": self._dialect,
            "max_model_len": self._limits.max_model_len,
        }
        return _json(orjson.dumps({"object": "list", "data": [model]}))

    async def _metrics(self, request: web.Request) -> web.Response:
        only = request.app[_RANK]
        body = self.metrics.render(self._driver, only if isinstance(only, int) else None)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _loads(self, request: web.Request) -> web.Response:
        return _json(orjson.dumps(self.metrics.loads_answer(self._driver)))

    async def _embeddings(self, request: web.Request) -> web.Response:
        inputs = parse_embeddings(await request.read(), self._limits)
        return _json(embeddings(inputs, self._limits.model))

    # Generation

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _generate(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        number = _dispatch_number(request)
        self._dispatches.expect(number)
        try:
            arrived_s = self._clock.now()
            ask = parse_ask(await request.read(), self._limits, chat=chat)
            generation = _Generation(request, ask, self._rank(request, ask), number, arrived_s)
            pool = self._driver.instance.pool
            if ask.remote_kv is not None and ask.remote_kv.keep:
                return await self._prefill_and_keep(generation)
            if ask.remote_kv is not None and ask.remote_kv.pull:
                await self._pull(generation, ask.remote_kv.engine_id, ask.remote_kv.block_ids)
                return await self._respond(generation, prefilled=True)
            if ask.room is not None and pool.role is not Role.AGGREGATED:
                return await self._bootstrap(generation, ask.room)
            return await self._respond(generation)
        finally:
            self._dispatches.receive(number)

    def _rank(self, request: web.Request, ask: Ask) -> int:
        """The rank of the port, else of the header, else of the body, else the quietest."""
        fixed = request.app[_RANK]
        if isinstance(fixed, int):
            return fixed
        rank = rank_in_header(request.headers)
        rank = ask.rank if rank is None else rank
        ranks = self._driver.instance.pool.ranks
        if rank is None:
            return self._driver.quietest_rank()
        if not 0 <= rank < ranks:
            raise ApiError(400, f"data_parallel_rank {rank} is out of range [0, {ranks}).")
        return rank

    # Prefill and decode apart

    async def _prefill_and_keep(self, generation: "_Generation") -> web.StreamResponse:
        ask, pool = generation.ask, self._driver.instance.pool
        job = self._job(generation, output_tokens=1)
        await self._run(generation, job)
        blocks = self._kv_store.keep(self.engine_id, ask.prompt_tokens, pool.block_tokens)
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": self.engine_id,
            "remote_block_ids": blocks,
            "remote_host": generation.request.url.host,
            "remote_port": self.port,
        }
        return self._whole(generation, job, {"kv_transfer_params": params})

    async def _pull(self, generation: "_Generation", engine_id: str, block_ids: list[int]) -> None:
        self._kv_store.pull(engine_id, block_ids, generation.ask.prompt_tokens)
        await self._transfer(generation)

    async def _bootstrap(self, generation: "_Generation", room: tuple[int | None, int]) -> web.StreamResponse:
        """Both legs at once. The decode leg counts as received now: its wait may be long."""
        port, number = room
        if self._driver.instance.pool.role is Role.PREFILL:
            with self._rooms.join(self.port, number, "prefill") as meeting:
                return await self._prefill_leg(generation, meeting)
        with self._rooms.join(port, number, "decode") as meeting:
            self._dispatches.receive(generation.number)
            await self._rooms.kv(meeting)
            await self._transfer(generation)
        return await self._respond(generation, prefilled=True)

    async def _prefill_leg(self, generation: "_Generation", room: Room) -> web.StreamResponse:
        await self._rooms.paired(room)
        job = self._job(generation, output_tokens=1)
        with self._in_engine(generation, job):
            await asyncio.wait((job.done, room.aborted), return_when=asyncio.FIRST_COMPLETED)
            if not job.done.done():
                raise ApiError(500, "KVTransferError: the other leg was aborted")
            self._settle(generation, job)
        room.computed()
        return self._whole(generation, job, {})

    async def _transfer(self, generation: "_Generation") -> None:
        seconds = self._cluster.kv_transfer_s(generation.ask.prompt_tokens)
        await asyncio.sleep(self._clock.wall_s(seconds))

    # In the engine

    async def _respond(self, generation: "_Generation", *, prefilled: bool = False) -> web.StreamResponse:
        ask = generation.ask
        tokens = 1 if self._driver.instance.pool.role is Role.PREFILL else ask.output_tokens
        if ask.stream:
            return await self._stream(generation, tokens, prefilled)
        job = self._job(generation, tokens, prefilled)
        await self._run(generation, job)
        return self._whole(generation, job, {})

    async def _stream(self, generation: "_Generation", tokens: int, prefilled: bool) -> web.StreamResponse:
        request = generation.request
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        response.headers["Cache-Control"] = "no-cache"
        await response.prepare(request)
        if request.transport is None:
            raise ConnectionResetError
        sse = SseStream(
            generation.ask,
            generation.name,
            self._limits.model,
            generation.created,
            request.transport,
            chunked=request.version.minor == 1,
        )
        job = self._job(generation, tokens, prefilled, sse.upto)
        await self._run(generation, job)
        await response.write_eof(sse.rest(job.tokens))
        return response

    def _job(
        self,
        generation: "_Generation",
        output_tokens: int,
        prefilled: bool = False,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Job:
        ask, headers = generation.ask, generation.request.headers
        self._requests += 1
        slo = self._cluster.slo
        request = Request(
            f"{generation.name}/{self._requests}",
            generation.arrived_s,
            ask.prompt_tokens,
            Slo(
                self._target_s(headers.get("x-slo-ttft-ms"), slo.ttft_s),
                self._target_s(headers.get("x-slo-tpot-ms"), slo.tpot_s),
            ),
            max_output_tokens=ask.max_tokens,
            prefix=ask.prefix,
            prefix_block_tokens=self._limits.block_tokens,
        )
        return Job(request, output_tokens, generation.rank, prefilled=prefilled, on_tokens=on_tokens)

    def _target_s(self, text: str | None, otherwise_s: float) -> float:
        """A target in wall milliseconds, in the model's seconds; nonsense is nobody's target."""
        try:
            seconds = float(text or "nan") / 1000 * self._clock.speed
        except ValueError:
            return otherwise_s
        return seconds if 0.0 < seconds < math.inf else otherwise_s

    async def _run(self, generation: "_Generation", job: Job) -> None:
        """Have the job done. One whose only token came with its KV needs no engine."""
        if job.needs_engine:
            with self._in_engine(generation, job):
                await job.done
                self._settle(generation, job)

    @contextmanager
    def _in_engine(self, generation: "_Generation", job: Job) -> Iterator[None]:
        self._driver.submit(job)
        self._dispatches.receive(generation.number)
        try:
            yield
        finally:
            self._driver.cancel(job)

    def _settle(self, generation: "_Generation", job: Job) -> None:
        """Count a job that is done; one whose engine died takes its connection along."""
        if not job.done.result():
            _cut(generation.request)
        now = self._clock.now()
        begun_s = now if job.begun_s is None else job.begun_s
        wall_s, arrived_s = self._clock.wall_s, generation.arrived_s
        self.metrics.finished(job, wall_s(begun_s - arrived_s), wall_s(now - arrived_s))

    def _whole(self, generation: "_Generation", job: Job, more: dict[str, Any]) -> web.Response:
        model, created = self._limits.model, generation.created
        return _json(answer(generation.ask, generation.name, model, created, job.tokens, more))


class _Generation:
    """A request on its way through the server."""

    __slots__ = ("arrived_s", "ask", "created", "name", "number", "rank", "request")

    def __init__(
        self, request: web.Request, ask: Ask, rank: int, number: int | None, arrived_s: float
    ) -> None:
        self.request, self.ask, self.rank, self.number = request, ask, rank, number
        self.arrived_s = arrived_s
        self.created = int(time.time())
        given = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        self.name = f"{'chatcmpl' if ask.chat else 'cmpl'}-{given}"


def _cut(request: web.Request) -> NoReturn:
    """Reset the connection; the handler ends with it."""
    if request.transport is not None:
        request.transport.abort()
    raise asyncio.CancelledError


def _json(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    told = {"Content-Type": "application/json"} | dict(headers or {})
    return web.Response(body=body, status=status, headers=told)


def _kind(fault: Fault | None) -> str:
    return "none" if fault is None else fault.kind


def _dispatch_number(request: web.Request) -> int | None:
    text = request.headers.get("x-headway-dispatch", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None
