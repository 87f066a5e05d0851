"""What is passed on to engines unread: bounded and ended like generations, and no way around their rules."""

import asyncio
import json
from contextlib import suppress

import aiohttp
import pytest
from aiohttp import web
from standins import ANSWER, StandIn, chat, error_of, gateway, run, until

EMBEDDINGS = "/v1/embeddings"
INPUT = {"input": "x"}


def test_embeddings_and_what_else_there_is_are_passed_on():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            headers = {"X-data-parallel-rank": "9", "X-Other": "1"}
            status, _, body = await chat(client, INPUT, path=EMBEDDINGS, headers=headers)
            assert (status, json.loads(body)) == (200, ANSWER)
            path, headers, sent = engine.requests[0]
            assert (path, sent, headers["X-Other"]) == (EMBEDDINGS, INPUT, "1")
            assert "X-data-parallel-rank" not in headers
            await chat(client, INPUT, path="/v1/score?a=%20b")
            assert engine.requests[1][0] == "/v1/score"

    run(check())


def test_a_drain_waits_for_what_was_passed_on():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.go.clear()
            task = asyncio.create_task(chat(client, INPUT, path=EMBEDDINGS))
            await until(lambda: engine.requests)
            assert front.serving.buffer.in_flight == 1 and front.serving.buffer.requests == 0
            assert not await front.drain(timeout_s=0.02)
            engine.go.set()
            assert await front.drain()
            assert (await task)[0] == 200

    run(check())


def test_what_is_passed_on_counts_against_the_bounds():
    async def check():
        limits = {"concurrent_requests": 1, "buffer_bytes": 1000}
        async with StandIn() as engine, gateway([engine], limits=limits) as (_, client):
            status, _, body = await chat(client, INPUT | {"pad": "x" * 1000}, path=EMBEDDINGS)
            assert (status, error_of(body)) == (429, "buffer_bytes")
            engine.go.clear()
            task = asyncio.create_task(chat(client, INPUT, path=EMBEDDINGS))
            await until(lambda: engine.requests)
            status, headers, body = await chat(client, INPUT, path=EMBEDDINGS)
            assert (status, error_of(body)) == (429, "too_many_requests") and "Retry-After" in headers
            engine.go.set()
            assert (await task)[0] == 200

    run(check())


def test_an_engine_that_hangs_is_given_up_and_one_that_answers_nobody_ejected():
    async def check():
        limits = {"answer_timeout_s": 0.05}
        health = {"interval_s": 60.0, "eject_after": 2}
        async with StandIn() as engine, gateway([engine], limits=limits, health=health) as (front, client):
            engine.go.clear()
            status, _, body = await chat(client, INPUT, path=EMBEDDINGS)
            assert (status, error_of(body)) == (504, "engine_timeout")
            await until(lambda: engine.aborted == 1, "the engine's abort")
            worker = front.workers.named("engine-0")
            assert worker.health.failures == 1
            ejections = worker.health.ejections
            assert (await chat(client, INPUT, path=EMBEDDINGS))[0] == 504
            assert worker.health.ejections == ejections + 1

    run(check())


def test_an_answer_that_stalls_is_cut():
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"idle_timeout_s": 0.05}) as (_, client):
            engine.more.clear()
            answer = await client.post("/v1/something", json=INPUT | {"stream": True})
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.read()
            answer.close()
            await until(lambda: engine.aborted == 1, "the engine's abort")

    run(check())


def test_an_engine_that_goes_down_ends_what_has_no_byte_yet():
    async def check():
        health = {"interval_s": 0.02, "eject_after": 1}
        async with StandIn() as engine, gateway([engine], health=health) as (_, client):
            engine.go.clear()
            task = asyncio.create_task(chat(client, INPUT, path=EMBEDDINGS))
            await until(lambda: engine.requests)
            engine.healthy = False
            status, headers, body = await task
            assert (status, error_of(body)) == (503, "engine_unavailable") and "Retry-After" in headers

    run(check())


def test_a_client_that_goes_away_is_gone_at_the_engine():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.go.clear()
            task = asyncio.create_task(chat(client, INPUT, path=EMBEDDINGS))
            await until(lambda: engine.requests)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await until(lambda: engine.aborted == 1, "the engine's abort")
            await until(lambda: not front.serving.buffer.in_flight)

    run(check())


def test_engines_see_one_key_and_clients_no_header_twice(monkeypatch):
    monkeypatch.setenv("ENGINE_KEY", "inner")

    async def check():
        auth = {"engine_api_key_env": "ENGINE_KEY"}
        async with StandIn() as engine, gateway([engine], auth=auth) as (_, client):

            async def generate(request):
                engine.requests.append((request.path, request.headers.copy(), None))
                headers = {
                    "Cache-Control": "max-age=5",
                    "X-Request-ID": "theirs",
                    "X-Kept": "1",
                    "X-Hop": "1",
                    "Connection": "x-hop",
                }
                answer = web.Response(text="{}", headers=headers)
                answer.headers.add("Set-Cookie", "a=1; Expires=Thu, 01 Jan 2026 00:00:00 GMT")
                answer.headers.add("Set-Cookie", "b=2")
                return answer

            engine._generate = generate
            given = {"authorization": "Bearer outer", "x-request-id": "mine", "X-Mine": "1"}
            status, headers, _ = await chat(client, INPUT, path=EMBEDDINGS, headers=given)
            assert status == 200 and engine.requests[0][1].getall("Authorization") == ["Bearer inner"]
            names = [name.lower() for name in headers]
            assert len(names) == len(set(names)), names
            assert (headers["x-request-id"], headers["Cache-Control"]) == ("mine", "max-age=5")
            assert headers["X-Kept"] == "1"
            assert not {"set-cookie", "server", "x-hop"} & set(names)

    run(check())


async def post_raw(front, target, body):
    """Post to a target that no client library would send; return (status, code of the error or None)."""
    host, _, port = front.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    status = int(answer.split(b" ", 2)[1])
    return status, None if status == 200 else error_of(answer.partition(b"\r\n\r\n")[2])


STEERED = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"kv_transfer_params":{"a":1}}'


@pytest.mark.parametrize(
    ("target", "answer"),
    [
        ("/v1/chat/completions", (400, "invalid_request")),
        ("/v1/%63hat/completions", (400, "invalid_request")),
        ("/v1/chat%2fcompletions", (400, "invalid_request")),
        ("/v1/chat/completions/", (404, "unknown_path")),
        ("/v1/chat/completions//", (404, "unknown_path")),
        ("/v1//chat/completions", (404, "unknown_path")),
        ("/v1/Chat/Completions", (404, "unknown_path")),
        ("/v1/completions/?a", (404, "unknown_path")),
        ("/v1/%2563hat/completions", (400, "invalid_request")),
        ("/v1/./chat/completions", (400, "invalid_request")),
        ("/v1/x/../chat/completions", (400, "invalid_request")),
        ("/v1/x/%2e%2e/chat/completions", (400, "invalid_request")),
        ("/v1/chat/completions;a=b", (400, "invalid_request")),
        ("/v1/chat%5ccompletions", (400, "invalid_request")),
        ("/v1/embeddings/", (404, "unknown_path")),
        ("/generate/", (404, "unknown_path")),
        ("//generate", (404, "unknown_path")),
        ("/%2fgenerate", (404, "unknown_path")),
        ("/v1/../generate", (400, "invalid_request")),
        ("/v1/%2e%2e/generate", (400, "invalid_request")),
        ("/Generate", (404, "unknown_path")),
        ("/generate;a", (404, "unknown_path")),
        ("/%2567enerate", (404, "unknown_path")),
        ("/./generate", (404, "unknown_path")),
        ("/%67enerate", (400, "invalid_request")),  # decoded, it is /generate: its body is refused
    ],
)
def test_no_spelling_of_a_path_brings_a_generation_past_the_policy(target, answer):
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, _):
            assert await post_raw(front, target, STEERED) == answer
            assert not engine.requests

    run(check())


def test_fields_that_steer_engines_are_refused_wherever_they_go():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, _):
            for body, code in (
                (b'{"input":"x","kv_transfer_params":{}}', "invalid_request"),
                (b'\n {"input":"x","routed_dp_rank":null}', "invalid_request"),
                (b'{"input":"x","kv_transfer\\u005fparams":{}}', "invalid_request"),
                ('\ufeff{"bootstrap_room":1}'.encode(), "invalid_json"),
                ('{"bootstrap_room":1}'.encode("utf-16"), "invalid_json"),
                ('{"bootstrap_room":1}'.encode("utf-16-be"), "invalid_json"),
                (b'{"input":"\xff"}', "invalid_json"),
                (b'{"input":' + b"[" * 100_000, "body_too_complex"),
            ):
                assert await post_raw(front, EMBEDDINGS, body) == (400, code), body[:60]
            assert not engine.requests
            deeper = b'{"input":{"kv_transfer_params":1}}'
            assert await post_raw(front, EMBEDDINGS, deeper) == (200, None)
            assert engine.bodies == [deeper]

    run(check())
