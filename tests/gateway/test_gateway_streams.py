"""The gateway before stand-in engines, over real sockets: what comes out, and what when things break."""

import asyncio
import json
import socket

import aiohttp
import pytest
from standins import ANSWER, CHAT, DONE, EVENT, USAGE, StandIn, chat, error_of, gateway, run, until

from headway.front.requests import read_call


def test_a_json_answer_and_the_body_go_through_unchanged():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            body = b'{ "model": "tiny",\n "messages": [{"role":"user","content":"h\\u00e9"}], "seed": 1.50 }'
            status, headers, answer = await chat(client, body, headers={"x-request-id": "mine"})
            assert (status, json.loads(answer)) == (200, ANSWER)
            assert headers["x-request-id"] == "mine"
            assert engine.bodies == [body]

    run(check())


def test_a_stream_goes_through_byte_for_byte_and_the_first_event_does_not_wait():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            engine.more.clear()
            async with client.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
                assert answer.headers["Content-Type"] == "text/event-stream"
                first = await answer.content.readany()
                assert first == EVENT
                engine.more.set()
                assert first + await answer.read() == EVENT + EVENT + USAGE + DONE

    run(check())


def test_the_policy_hears_of_first_and_last_token_and_the_length_is_learned():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            seen = []
            front.driver._observers += (lambda now, event, actions: seen.append(event),)
            await chat(client, stream=True)
            await until(lambda: not front.driver.requests)
            names = [type(event).__name__ for event in seen]
            assert names.index("Arrived") < names.index("PrefillDone") < names.index("Finished")
            finished = next(event for event in seen if type(event).__name__ == "Finished")
            assert finished.output_tokens == 3
            call = read_call("/v1/chat/completions", json.dumps(CHAT).encode())
            assert front._lengths.measure(call) > 4  # 7 tokens for "hello" in one message

    run(check())


def test_a_client_that_goes_away_is_gone_at_the_engine():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.more.clear()
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            await answer.content.readany()
            answer.close()
            await until(lambda: engine.aborted == 1, "the engine's abort")
            await until(lambda: not front.driver.requests)

    run(check())


def test_a_client_that_goes_away_while_it_is_held_never_reaches_an_engine():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            front.workers.drain("engine-0")
            task = asyncio.create_task(chat(client))
            await until(lambda: len(front.driver.held()) == 1)
            task.cancel()
            await until(lambda: not front.driver.requests)
            assert not front.driver.held() and not engine.requests

    run(check())


def test_a_failed_leg_goes_elsewhere_before_the_first_byte():
    async def check():
        async with StandIn() as bad, StandIn() as good, gateway([bad, good]) as (front, client):
            bad.status = 500
            for _ in range(4):
                status, _, _ = await chat(client)
                assert status == 200
            assert bad.requests and len(good.requests) == 4
            assert b'headway_retries_total{reason="error"}' in front.metrics.text()

    run(check())


def test_a_killed_engine_loses_only_the_streams_it_was_sending():
    async def check():
        async with StandIn() as bad, StandIn() as good, gateway([bad, good]) as (_, client):
            bad.more.clear()
            streaming = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            await streaming.content.readany()
            good.go.clear()
            other = asyncio.create_task(chat(client))  # at the good one
            await until(lambda: len(good.requests) == 1)
            bad.go.clear()
            waiting = asyncio.create_task(chat(client))  # at the bad one, no byte yet
            await until(lambda: len(bad.requests) == 2)
            await bad.kill()
            good.go.set()
            assert [(await task)[0] for task in (other, waiting)] == [200, 200]
            try:
                rest = await streaming.read()
            except aiohttp.ClientPayloadError:
                rest = b""
            streaming.close()
            assert b"[DONE]" not in rest

    run(check())


def test_a_stream_that_breaks_is_not_repeated_and_is_told_as_broken():
    async def check():
        async with StandIn() as bad, StandIn() as good, gateway([bad, good]) as (_, client):
            bad.break_after = good.break_after = 1
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            assert await answer.content.readany() == EVENT
            told = b""
            try:
                while chunk := await answer.content.readany():
                    told += chunk
                raise AssertionError("the stream ended as if it were whole")
            except aiohttp.ClientPayloadError:
                assert error_of(told.removeprefix(b"data: ")) == "engine_error"
            answer.close()
            assert len(bad.requests) + len(good.requests) == 1

    run(check())


def test_retries_end():
    async def check():
        async with (
            StandIn() as one,
            StandIn() as two,
            StandIn() as three,
            gateway([one, two, three], limits={"retries": 1}) as (front, client),
        ):
            for worker in front.workers:
                worker.health.suspicions = 3  # no engine is credible: a third would be asked
            one.status = two.status = three.status = 500
            assert (await chat(client))[0] == 500
            assert sum(len(engine.requests) for engine in (one, two, three)) == 2

    run(check())


def test_retries_of_what_engines_refuse_have_a_budget_those_of_a_dead_engine_have_none():
    async def check():
        limits = {"retry_budget": 0.0}
        async with StandIn() as bad, StandIn() as good, gateway([bad, good], limits=limits) as (_, client):
            bad.status = 500
            assert sorted([(await chat(client))[0] for _ in range(2)]) == [200, 500]
            await bad.kill()
            assert [(await chat(client))[0] for _ in range(4)] == [200] * 4

    run(check())


def test_an_engines_own_refusal_is_passed_on():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            engine.status = 400
            status, _, body = await chat(client)
            assert (status, json.loads(body)) == (400, {"error": {"message": "no"}})
            assert len(engine.requests) == 1

    run(check())


def test_an_engine_that_hangs_is_given_up():
    async def check():
        limits = {"answer_timeout_s": 0.1, "retries": 0}
        async with StandIn() as engine, gateway([engine], limits=limits) as (_, client):
            engine.go.clear()
            status, _, body = await chat(client)
            assert (status, error_of(body)) == (504, "engine_timeout")
            await until(lambda: engine.aborted == 1)

    run(check())


def test_a_stream_that_stalls_is_ended():
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"idle_timeout_s": 0.05}) as (_, client):
            engine.more.clear()
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            try:
                told = await answer.read()
            except aiohttp.ClientPayloadError:
                told = b""
            answer.close()
            assert b"[DONE]" not in told
            await until(lambda: engine.aborted == 1)

    run(check())


BIG = b"data: " + bytes(100_000).replace(b"\0", b"x") + b"\n\n"


async def stalled(front, path, **fields):
    """Ask for a stream and read nothing of it; return the connection."""
    body = json.dumps(CHAT | {"stream": True} | fields).encode()
    host, _, port = front.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.transport.pause_reading()
    writer.write(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body))
    return writer


@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/something"])
def test_a_client_that_does_not_read_is_gone_and_no_engine_is_to_blame(path):
    async def check():
        limits = {"idle_timeout_s": 0.05}
        async with StandIn() as engine, gateway([engine], limits=limits) as (front, _):
            engine.chunks = [BIG] * 400
            writer = await stalled(front, path)
            await until(lambda: engine.aborted == 1, "the engine's abort")
            await until(lambda: not front.serving.buffer.in_flight)
            await until(lambda: not front._listeners[0].connections, "the client's connection closed")
            numbers = front.metrics.text()
            assert b'status="504"' not in numbers and b'status="502"' not in numbers
            if path == b"/v1/chat/completions":
                assert b'headway_requests_total{status="499"} 1.0' in numbers
            assert front.workers.named("engine-0").health.failures == 0
            writer.transport.abort()

    run(check())


def test_an_engine_that_answers_nobody_is_tried_elsewhere_and_ejected():
    """Its `/health` is well, and no budget of retries is left."""

    async def check():
        limits = {"first_byte_timeout_s": 0.05, "retry_budget": 0.0}
        health = {"interval_s": 60.0, "eject_after": 3}
        async with (
            StandIn() as hung,
            StandIn() as good,
            gateway([hung, good], "least-requests", limits=limits, health=health) as (front, client),
        ):
            hung.go.clear()
            ejected = []
            carry_out = front.workers._carry_out

            def watched(worker, change):
                if change is not None and change.new == "ejected":
                    ejected.append((worker.name, change.reason))
                carry_out(worker, change)

            front.workers._carry_out = watched
            while not ejected:
                assert (await chat(client, stream=True))[0] == 200
            assert ejected == [("engine-0", "engine-0 was silent for too long")]
            assert len(hung.requests) == 3

    run(check())


def test_an_engine_that_is_slow_for_one_request_and_answers_others_is_not_to_blame():
    async def check():
        limits = {"answer_timeout_s": 0.3}
        async with StandIn() as engine, gateway([engine], limits=limits) as (front, client):
            engine.go.clear()
            long = [asyncio.create_task(chat(client)) for _ in range(4)]
            await until(lambda: len(engine.requests) == 4)
            waits, engine.go = engine.go, asyncio.Event()
            engine.go.set()
            while not all(task.done() for task in long):  # others are answered all along
                assert (await chat(client))[0] == 200
            assert [(await task)[0] for task in long] == [504] * 4
            assert front.workers.named("engine-0").health.failures == 0 and front.workers.ready()
            waits.set()

    run(check())


def test_targets_that_a_client_states_reach_the_engine():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            await chat(
                client, headers={"x-llm-d-slo-ttft-ms": "250", "x-slo-tpot-ms": "20", "x-priority": "3"}
            )
            sent = engine.requests[0][1]
            assert (sent["x-slo-ttft-ms"], sent["x-slo-tpot-ms"], sent["x-priority"]) == ("250", "20", "3")
            await chat(client)
            assert not any(name.lower().startswith(("x-slo", "x-prio")) for name in engine.requests[1][1])

    run(check())


def test_both_sides_are_without_nagles_delay():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.more.clear()
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            await answer.content.readany()
            to_engines = [connection._transport for connection in front.scheduler.transport.connections]
            to_clients = [c._transport for c in front._listeners[0].connections]
            assert to_engines and to_clients
            for transport in to_engines + to_clients:
                sock = transport.get_extra_info("socket")
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            engine.more.set()
            await answer.read()

    run(check())


def test_requests_are_held_for_an_engine_that_comes_back():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.healthy = False
            await until(lambda: front.workers.named("engine-0").state.value == "down")
            task = asyncio.create_task(chat(client))
            await until(lambda: len(front.driver.held()) == 1)
            engine.healthy = True
            assert (await task)[0] == 200

    run(check())


def test_many_streams_at_once_with_half_of_the_clients_gone():
    async def check():
        async with StandIn() as a, StandIn() as b, gateway([a, b], "staggered") as (front, client):
            a.more.clear()
            b.more.clear()
            client.connector._limit = 0
            tasks = [asyncio.create_task(chat(client, stream=True)) for _ in range(60)]
            await until(lambda: front.driver.requests == 60)
            for task in tasks[::2]:
                task.cancel()
            a.more.set()
            b.more.set()
            kept = await asyncio.gather(*tasks[1::2])
            assert {(status, body) for status, _, body in kept} == {(200, EVENT + EVENT + USAGE + DONE)}

    run(check())


def test_an_error_that_comes_as_the_first_event_of_a_stream_is_told_as_an_error():
    """vLLM answers 200 to a stream before it looks at what is asked."""

    async def check():
        async with StandIn() as first, StandIn() as second, gateway([first, second]) as (_, client):
            for engine in (first, second):
                engine.chunks = [b'data: {"error": {"message": "no such rank", "code": 400}}\n\n', DONE]
            status, _, body = await chat(client, stream=True)
            assert status == 400 and b"no such rank" in body
            assert len(first.requests) + len(second.requests) == 1

            for engine in (first, second):
                engine.chunks = [b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n', DONE]
            status, _, body = await chat(client, stream=True)
            assert status == 500 and b"EngineCore died" in body
            assert len(first.requests) + len(second.requests) == 3  # one at each: it is the request's fault

            first.chunks = [b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n', DONE]
            second.chunks = [EVENT, DONE]
            status, _, body = await chat(client, stream=True)
            assert (status, body) == (200, EVENT + DONE)

    run(check())
