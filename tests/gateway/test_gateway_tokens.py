"""TTFT, retries, the idle bound and the outcome of a stream rest on tokens, not on bytes."""

import asyncio
import json

import aiohttp
import pytest
from standins import DONE, EVENT, USAGE, StandIn, chat, error_of, gateway, run, until

PING = b": keep-alive\n\n"
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
MIDWAY = b'data: {"error":{"message":"EngineCore died","code":500}}\n\n'


def over(front):
    """Keep what is known of each request when it is over."""
    done = []
    front._on_done.append(lambda flight, status: done.append((flight, status)))
    return done


@pytest.mark.parametrize("before", [PING, ROLE, PING + ROLE, b"event: x\n" + ROLE])
def test_what_comes_before_the_first_token_is_held_and_tells_the_policy_nothing(before):
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            seen, done = [], over(front)
            front.driver._observers += (lambda now, event, actions: seen.append(type(event).__name__),)
            engine.chunks = [before, EVENT, EVENT, DONE]
            engine.more.clear()
            asking = asyncio.create_task(chat(client, stream=True))
            await until(lambda: engine.under_way == 1)
            (flight,) = front.serving._flights
            await until(lambda: bool(flight.owing))
            await asyncio.sleep(0.05)
            assert "PrefillDone" not in seen and not flight.sink.started
            released_s = front._loop.time()
            engine.more.set()
            status, _, body = await asking
            assert (status, body.replace(PING, b"")) == (
                200,
                (before + EVENT + EVENT + DONE).replace(PING, b""),
            )
            assert "PrefillDone" in seen
            assert done[0][0].first_byte_s >= released_s and done[0][0].output_tokens == 2

    run(check())


def test_an_engine_that_dies_after_a_comment_is_retried_elsewhere():
    async def check():
        async with StandIn() as bad, StandIn() as good, gateway([bad, good]) as (_, client):
            bad.chunks, bad.break_after = [PING, ROLE, EVENT], 2
            for _ in range(2):
                status, _, body = await chat(client, stream=True)
                assert (status, body) == (200, EVENT + EVENT + USAGE + DONE)
            assert bad.requests

    run(check())


def test_an_error_after_a_comment_is_an_error_answer():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            engine.chunks = [PING, b'data: {"error":{"message":"too long","code":400}}\r\n\r\n', DONE]
            status, _, body = await chat(client, stream=True)
            assert status == 400 and json.loads(body)["error"]["message"] == "too long"

    run(check())


@pytest.mark.parametrize("before", [[EVENT], [ROLE, EVENT], [PING]])
def test_an_engine_that_sends_comments_and_no_token_is_cut_as_idle(before):
    async def check():
        limits = {"idle_timeout_s": 0.05, "retries": 0}
        async with StandIn() as engine, gateway([engine], limits=limits) as (_, client):
            engine.chunks = before + [PING] * 1_000_000
            engine.more = Paced(0.01)
            try:
                status, _, body = await chat(client, stream=True)
            except aiohttp.ClientPayloadError:  # it had begun
                assert EVENT in before
            else:
                assert before == [PING] and (status, error_of(body)) == (504, "engine_timeout")
            await until(lambda: engine.aborted == 1, "the engine's abort")

    run(check())


class Paced:
    """Lets a stream go on every so many seconds."""

    def __init__(self, every_s):
        self.every_s = every_s

    async def wait(self):
        await asyncio.sleep(self.every_s)


def test_an_error_event_in_a_stream_is_no_success():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            done = over(front)
            engine.chunks, engine.more = [ROLE, EVENT, MIDWAY, DONE], Paced(0.02)
            status, _, body = await chat(client, stream=True)
            assert (status, body) == (200, ROLE + EVENT + MIDWAY + DONE)  # as the engine sent it
            await until(lambda: done)
            ((flight, outcome),) = done
            assert (outcome, flight.code) == (500, "engine_error")
            numbers = front.metrics.text()
            assert b'headway_requests_total{status="500"} 1.0' in numbers
            assert b"headway_ttft_seconds_count 0.0" in numbers

    run(check())


def test_events_with_several_tokens_weigh_what_the_engines_usage_says():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            done = over(front)
            usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":24}}\n\n'
            for chunks in ([EVENT] * 6 + [usage, DONE], [EVENT] * 6 + [DONE]):
                engine.chunks = chunks
                await chat(client, stream=True)
            await until(lambda: len(done) == 2)
            assert [flight.output_tokens for flight, _ in done] == [24, 24]

    run(check())


def test_an_output_without_any_text_ends_well():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            done = over(front)
            end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
            engine.chunks = [ROLE, end, DONE]
            status, _, body = await chat(client, stream=True)
            assert (status, body) == (200, ROLE + end + DONE)
            await until(lambda: done)
            assert (done[0][1], done[0][0].output_tokens) == (200, 0)

    run(check())


@pytest.mark.parametrize("chunks", [[], [PING], [PING, PING]])
def test_a_stream_without_anything_is_the_engines_failure(chunks):
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"retries": 0}) as (_, client):
            engine.chunks = chunks
            status, _, body = await chat(client, stream=True)
            assert (status, error_of(body)) == (502, "engine_error")

    run(check())
