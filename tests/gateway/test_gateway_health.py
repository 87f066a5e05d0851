"""Engines that are full, broken, slow or not there, and requests that break engines: who pays for it."""

import asyncio
import json
import logging
from contextlib import suppress

import aiohttp
import pytest
from aiohttp import web
from standins import StandIn, chat, error_of, gateway, run, until

from headway.core.concurrency_limit import ConcurrencyLimit

EMBED = {"model": "tiny", "input": "hello"}


class FullStandIn(StandIn):
    """Takes `slots` requests at once and refuses the others with `full`, as vLLM and SGLang do."""

    def __init__(self, slots, full=503, retry_after=None):
        super().__init__()
        self.slots, self.full, self.retry_after = slots, full, retry_after
        self.refused = self.most = self.served = 0

    async def _generate(self, request):
        if self.under_way >= self.slots:
            self.refused += 1
            headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
            body = {"error": {"message": "The request queue is full."}}
            return web.json_response(body, status=self.full, headers=headers)
        self.most = max(self.most, self.under_way + 1)
        answer = await super()._generate(request)
        self.served += 1
        return answer


class PoisonableStandIn(StandIn):
    """Fails a request that says POISON, by a 500 or by closing its connection, and serves all others."""

    fails_by = "error"

    async def _generate(self, request):
        if b"POISON" in await request.read():
            self.requests.append("poison")
            if self.fails_by == "error":
                return web.json_response({"error": {"message": "CUDA assert"}}, status=500)
            request.transport.abort()
        return await super()._generate(request)


async def poison(client):
    return await chat(client, {"model": "tiny", "messages": [{"role": "user", "content": "POISON"}]})


def ejections(front):
    return sum(worker.health.ejections for worker in front.workers)


# Backpressure


@pytest.mark.parametrize("policy", ["staggered", "least-requests"])
@pytest.mark.parametrize("full", [503, 429])
def test_a_full_engine_gets_what_it_takes_and_is_never_ejected(policy, full):
    async def check():
        async with FullStandIn(4, full) as engine, gateway([engine], policy) as (front, client):
            engine.go.clear()
            tasks = [asyncio.create_task(chat(client)) for _ in range(12)]
            await until(lambda: engine.under_way == 4 and engine.refused >= 1, "a full engine")
            await until(lambda: len(front.driver.held()) == 8, "the others held")
            refused = engine.refused
            engine.go.set()
            assert [(await task)[0] for task in tasks] == [200] * 12
            assert (engine.served, engine.most) == (12, 4)
            assert ejections(front) == 0 and engine.refused == refused
            worker = front.workers.named("engine-0")
            assert worker.limit.limit == 4 and worker.limit.refusals == refused
            assert b'headway_engine_limit_requests{role="aggregated",worker="engine-0"} 4.0' in (
                front.metrics.text()
            )
            assert b"headway_retries_total{" not in front.metrics.text()

    run(check())


def test_what_a_full_engine_refuses_goes_to_another_one_without_a_retry():
    async def check():
        limits = {"retries": 1, "retry_budget": 0.0}
        async with (
            FullStandIn(0) as full,
            StandIn() as free,
            gateway([full, free], limits=limits) as (front, client),
        ):
            assert [(await chat(client))[0] for _ in range(5)] == [200] * 5
            assert full.refused >= 1 and len(free.requests) == 5 and ejections(front) == 0
            assert front.serving._budget._left == 0.0 and b"retries_total{" not in front.metrics.text()

    run(check())


def test_of_prefill_and_decode_engines_each_has_a_limit_of_its_own():
    async def check():
        async with FullStandIn(9) as prefill, FullStandIn(1) as decode:
            instances = [
                {"name": "prefill-0", "url": prefill.url, "role": "prefill"},
                {"name": "decode-0", "url": decode.url, "role": "decode"},
            ]
            async with gateway([], "least-requests", instances=instances) as (front, client):
                decode.go.clear()
                tasks = [asyncio.create_task(chat(client)) for _ in range(4)]
                await until(lambda: decode.refused, "a refusal")
                decode.go.set()
                assert [(await task)[0] for task in tasks] == [200] * 4
                assert decode.refused and front.workers.named("decode-0").limit.limit is not None
                assert front.workers.named("prefill-0").limit.limit is None and ejections(front) == 0

    run(check())


@pytest.mark.parametrize("status", [429, 408])
def test_a_request_that_no_engine_has_room_for_waits_as_long_as_the_queue_allows(status):
    async def check():
        limits = {"queue_timeout_s": 0.15, "queue_timeout_status": status}
        async with FullStandIn(0) as engine, gateway([engine], limits=limits) as (front, client):
            told, headers, body = await chat(client)
            assert (told, error_of(body)) == (status, "queue_timeout") and "Retry-After" in headers
            assert engine.refused == 1 and ejections(front) == 0

    run(check())


def test_without_retries_a_refusal_is_the_clients_answer_as_it_came():
    async def check():
        limits = {"retries": 0}
        async with FullStandIn(0, 503, "7") as engine, gateway([engine], limits=limits) as (_, client):
            status, headers, body = await chat(client)
            assert (status, headers["Retry-After"]) == (503, "7")
            assert json.loads(body)["error"]["message"] == "The request queue is full."

    run(check())


def test_an_engine_is_left_alone_for_as_long_as_its_retry_after_says():
    async def check():
        limits = {"queue_timeout_s": 0.3}
        async with FullStandIn(0, 503, "60") as engine, gateway([engine], limits=limits) as (front, client):
            assert [(await chat(client))[0] for _ in range(2)] == [429, 429]
            assert engine.refused == 1
            assert front.workers.named("engine-0").state.value == "up"

    run(check())


def test_one_request_that_an_engine_always_refuses_does_not_slow_the_others(monkeypatch):
    monkeypatch.setattr("headway.core.concurrency_limit.PAUSE_S", 0.02)

    class Choosy(StandIn):
        async def _generate(self, request):
            if b"POISON" in await request.read():
                self.requests.append("poison")
                return web.json_response({}, status=503)
            return await super()._generate(request)

    async def check():
        async with Choosy() as engine, gateway([engine]) as (front, client):
            refused = asyncio.create_task(poison(client))
            await until(lambda: engine.requests.count("poison") >= 3, "refusals")
            assert front.workers.named("engine-0").limit.refusals == 1
            assert [(await chat(client))[0] for _ in range(5)] == [200] * 5
            refused.cancel()
            with suppress(asyncio.CancelledError):
                await refused
            await until(lambda: not front.serving.buffer.in_flight, "its end")

    run(check())


# Requests that break engines


@pytest.mark.parametrize("fails_by", ["error", "crash"])
def test_a_request_that_every_engine_fails_ejects_none_and_is_tried_at_two(fails_by):
    async def check():
        async with PoisonableStandIn() as one, PoisonableStandIn() as two, PoisonableStandIn() as three:
            engines = (one, two, three)
            for engine in engines:
                engine.fails_by = fails_by
            async with gateway(engines, "least-requests", limits={"retry_budget": 1.0}) as (front, client):
                for _ in range(10):
                    status, _, body = await poison(client)
                    assert status == (500 if fails_by == "error" else 502)
                    assert fails_by == "crash" or b"CUDA assert" in body
                    assert (await chat(client))[0] == 200
                assert ejections(front) == 0
                # By a crash each engine sees it twice: a reused connection may have been stale.
                most = 25 if fails_by == "error" else 50
                assert sum(engine.requests.count("poison") for engine in engines) <= most

    run(check())


def test_an_error_is_not_asked_of_the_same_engine_again_while_the_others_have_no_room():
    async def check():
        async with (
            FullStandIn(0, 503, "60") as full,
            PoisonableStandIn() as other,
            gateway([full, other], "round-robin") as (front, client),
        ):
            assert [(await chat(client))[0] for _ in range(2)] == [200, 200]
            assert front.workers.named("engine-0").limit.allowed(asyncio.get_running_loop().time()) == 0
            status, _, body = await poison(client)
            assert status == 500 and b"CUDA assert" in body
            assert other.requests.count("poison") == 1

    run(check())


def test_an_engine_that_fails_what_others_serve_is_ejected_after_three_of_them():
    async def check():
        async with StandIn() as bad, StandIn() as good:
            health = {"interval_s": 60.0}
            async with gateway([bad, good], limits={"retry_budget": 1.0}, health=health) as (front, client):
                bad.status = 500
                worker = front.workers.named("engine-0")
                while not worker.health.ejections:
                    assert (await chat(client))[0] == 200
                assert len(bad.requests) == 3 and front.workers.named("engine-1").health.ejections == 0

    run(check())


def test_an_engine_that_fails_everything_is_ejected_also_where_nothing_is_retried():
    async def check():
        limits, health = {"retries": 0}, {"interval_s": 60.0}
        async with (
            StandIn() as bad,
            StandIn() as good,
            gateway([bad, good], limits=limits, health=health) as (front, client),
        ):
            bad.status = 500
            worker = front.workers.named("engine-0")
            while not worker.health.ejections:
                await chat(client)
            assert 3 <= len(bad.requests) <= 9

    run(check())


def test_the_last_engine_is_kept_whatever_it_answers():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.status = 500
            for _ in range(10):
                status, _, body = await chat(client)
                assert (status, json.loads(body)) == (500, {"error": {"message": "no"}})
            assert ejections(front) == 0 and len(engine.requests) == 10

    run(check())


def test_a_breaker_that_counts_consecutively_opens_and_then_half_opens():
    async def check():
        health = {"breaker": "consecutive", "eject_for_s": 0.3, "interval_s": 0.02}
        limits = {"no_engine_timeout_s": 0.0}
        async with StandIn() as engine, gateway([engine], health=health, limits=limits) as (front, client):
            engine.status = 500
            assert [(await chat(client))[0] for _ in range(3)] == [500] * 3
            assert error_of((await chat(client))[2]) == "no_engine"
            await until(front.workers.ready, "half open")
            assert (await chat(client))[0] == 500
            assert (await chat(client))[0] == 503
            engine.status = 200
            await until(front.workers.ready, "half open")
            assert [(await chat(client))[0] for _ in range(3)] == [200] * 3

    run(check())


def test_without_a_breaker_and_without_retries_clients_get_the_engines_own_errors():
    async def check():
        health, limits = {"eject_after": 0}, {"retries": 0}
        async with (
            StandIn() as one,
            StandIn() as two,
            gateway([one, two], health=health, limits=limits) as (front, client),
        ):
            one.status = two.status = 500
            assert [(await chat(client))[0] for _ in range(20)] == [500] * 20
            assert front.workers.ready() and ejections(front) == 0

    run(check())


def test_a_slow_answer_that_does_not_stream_is_computed_once():
    async def check():
        limits = {"answer_timeout_s": 0.1}
        async with (
            StandIn() as one,
            StandIn() as two,
            gateway([one, two], limits=limits) as (front, client),
        ):
            one.go.clear()
            two.go.clear()
            status, _, body = await chat(client)
            assert (status, error_of(body)) == (504, "engine_timeout")
            assert len(one.requests) + len(two.requests) == 1 and front.workers.ready()

    run(check())


# No engine


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
def test_with_no_engine_up_a_request_waits_for_a_bounded_time(path):
    async def check():
        limits = {"no_engine_timeout_s": 0.1}
        async with StandIn() as engine:
            engine.healthy = False
            async with gateway([engine], limits=limits) as (front, client):
                body = EMBED if path.endswith("embeddings") else None
                status, headers, told = await chat(client, body, path=path)
                assert (status, error_of(told)) == (503, "no_engine") and "Retry-After" in headers
        async with StandIn() as engine:
            engine.healthy = False
            async with gateway([engine]) as (front, client):
                waiting = asyncio.create_task(chat(client, body, path=path))
                await until(lambda: front.driver.held() or front.workers._waiting, "the wait")
                engine.healthy = True
                assert (await waiting)[0] == 200

    run(check())


def test_with_no_decode_engine_a_prompt_is_not_computed():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            decode.healthy = False
            instances = [
                {"name": "prefill-0", "url": prefill.url, "role": "prefill"},
                {"name": "decode-0", "url": decode.url, "role": "decode"},
            ]
            limits = {"no_engine_timeout_s": 0.1}
            async with gateway([], "least-requests", instances=instances, limits=limits) as (_, client):
                assert error_of((await chat(client))[2]) == "no_engine"

    run(check())


def test_why_an_engine_never_came_up_is_logged_once_for_each_reason(caplog):
    async def check():
        async with StandIn() as engine:
            engine.healthy = False
            async with gateway([engine], health={"interval_s": 0.01}) as (front, _):
                worker = front.workers.named("engine-0")
                await until(lambda: worker.health.missed > 5)
                await engine.kill()
                await until(lambda: "refused" in worker.health.reason, "another reason")

    with caplog.at_level(logging.WARNING, "headway.gateway"):
        run(check())
    reasons = [each.reason for each in caplog.records if each.message == "engine not up"]
    assert reasons == ["/health answers 500", "cannot connect: connection refused"]


@pytest.mark.parametrize("kind", ["nothing listens", "no engine", "no HTTP"])
def test_adding_what_is_no_engine_says_why_and_adds_nothing(kind):
    async def hear(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 404 Not Found\r\n\r\n" if kind == "no engine" else b"220 smtp\r\n")
        writer.close()

    async def check():
        server = await asyncio.start_server(hear, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        if kind == "nothing listens":
            server.close()
        api = {"enabled": True, "startup_timeout_s": 0.1}
        async with (
            StandIn() as engine,
            gateway([engine], worker_api=api) as (front, client),
            client.post("/add_worker", params={"url": url}) as answer,
        ):
            status, text = answer.status, await answer.text()
            assert (status, error_of(text)) == (400, "bad_worker")
            reason = {"nothing listens": "connection refused", "no engine": "answers 404"}.get(
                kind, "no HTTP"
            )
            assert reason in text
            assert [worker.name for worker in front.workers] == ["engine-0"]
        server.close()

    run(check())


def test_an_added_engine_may_take_its_time_to_start():
    async def check():
        async with StandIn() as engine, StandIn() as late:
            late.healthy = False
            async with gateway([engine], worker_api={"enabled": True}) as (front, client):
                adding = asyncio.create_task(client.post("/add_worker", params={"url": late.url}))
                await until(lambda: len(list(front.workers)) == 2)
                late.healthy = True
                assert (await adding).status == 200

    run(check())


def test_operators_see_an_engines_limit_and_its_refusals():
    async def check():
        async with (
            FullStandIn(0) as full,
            StandIn() as free,
            gateway([full, free], admin={"port": 0}) as (front, client),
        ):
            await chat(client)
            await chat(client)
            url = f"{front.admin_url}/workers"
            async with aiohttp.ClientSession() as admin, admin.get(url) as answer:
                shown = {each["name"]: each for each in await answer.json()}
            assert (shown["engine-0"]["concurrency_limit"], shown["engine-0"]["backpressure"]) == (1, 1)
            assert (shown["engine-1"]["concurrency_limit"], shown["engine-1"]["backpressure"]) == (
                None,
                0,
            )

    run(check())


def test_a_limit_is_forgotten_when_the_engine_restarts():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            worker = front.workers.named("engine-0")
            worker.limit = ConcurrencyLimit()
            worker.limit.refused(asyncio.get_running_loop().time(), 3, None)
            engine.healthy = False
            await until(lambda: worker.state.value == "down")
            assert worker.limit.limit is None
            engine.healthy = True
            assert (await chat(client))[0] == 200

    run(check())
