"""Several sequences in one request where prefill and decode are apart: a request each, one answer."""

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from standins import CHAT, DONE, EVENT, StandIn, chat, error_of, gateway, run, running, until
from test_gateway_disaggregated import PARAMS, config

COMPLETIONS = "/v1/completions"
both = pytest.mark.parametrize("dialect", ["vllm", "sglang"])


def events(body):
    return [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]


def asked(engine, *names):
    return [tuple(body.get(name) for name in names) for _, _, body in engine.requests]


@both
def test_samples_become_requests_of_their_own_and_one_answer(dialect):
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            prefill.extra = {"kv_transfer_params": PARAMS} if dialect == "vllm" else {}
            async with running(config([prefill], [decode], dialect)) as (_, client):
                status, _, body = await chat(client, n=3)
            answer = json.loads(body)
            assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
            assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}
            assert len(prefill.requests) == len(decode.requests) == 3
            assert asked(decode, "n", "messages") == [(None, CHAT["messages"])] * 3
            if dialect == "vllm":
                assert asked(decode, "kv_transfer_params") == [(PARAMS,)] * 3
            else:
                assert len(set(asked(decode, "bootstrap_room"))) == 3

    run(check())


def test_a_number_of_samples_may_be_written_as_a_text():
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode])) as (_, client),
        ):
            status, _, body = await chat(client, n="3")
            assert status == 200 and len(json.loads(body)["choices"]) == 3

    run(check())


@both
def test_prompts_are_answered_in_their_order(dialect):
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            answered = decode._generate

            async def echo(request):
                prompt = json.loads(await request.read())["prompt"]
                decode.extra = {"choices": [{"index": 0, "text": prompt}]}
                return await answered(request)

            decode._generate = echo
            async with running(config([prefill], [decode], dialect)) as (_, client):
                body = {"model": "tiny", "prompt": ["a", "b", "c"], "n": 2}
                status, _, answer = await chat(client, body, path=COMPLETIONS)
            choices = json.loads(answer)["choices"]
            assert status == 200 and [choice["text"] for choice in choices] == list("aabbcc")
            assert [choice["index"] for choice in choices] == [0, 1, 2, 3, 4, 5]
            assert json.loads(answer)["usage"]["prompt_tokens"] == 21

    run(check())


def test_lists_of_token_ids_are_prompts_and_seeds_differ_as_in_an_engine():
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode])) as (_, client),
        ):
            body = {"model": "tiny", "prompt": [[1, 2], [3]], "n": 2, "seed": 5}
            assert (await chat(client, body, path=COMPLETIONS))[0] == 200
            got = sorted((prompt, seed) for prompt, seed in asked(decode, "prompt", "seed"))
            assert got == [([1, 2], 5), ([1, 2], 6), ([3], 5), ([3], 6)]

    run(check())


def test_one_prompt_of_token_ids_or_in_a_list_stays_one_request():
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode])) as (_, client),
        ):
            for prompt in ([1, 2, 3], ["a"], [[1, 2]]):
                assert (await chat(client, {"model": "tiny", "prompt": prompt}, path=COMPLETIONS))[0] == 200
            assert asked(decode, "prompt") == [([1, 2, 3],), (["a"],), ([[1, 2]],)]

    run(check())


@both
def test_streams_are_merged_with_one_end_and_one_usage(dialect):
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
            last = b"data: " + json.dumps({"id": "x", "choices": [], "usage": usage}).encode() + b"\n\n"
            decode.chunks = [EVENT, EVENT, last, DONE]
            async with running(config([prefill], [decode], dialect)) as (_, client):
                status, headers, body = await chat(client, n=2, stream=True)
            assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
            *chunks, final = events(body)
            assert sorted(choice["index"] for chunk in chunks for choice in chunk["choices"]) == [0, 0, 1, 1]
            assert body.count(b"[DONE]") == 1 and body.endswith(DONE)
            assert final["choices"] == []
            assert final["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}

    run(check())


def test_long_answers_are_joined_too():
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode])) as (_, client),
        ):
            decode.extra = {"choices": [{"index": 0, "text": "x" * 200_000}]}
            body = {"model": "tiny", "prompt": "x", "n": 3}
            status, _, answer = await chat(client, body, path=COMPLETIONS)
            choices = json.loads(answer)["choices"]
            assert status == 200 and [len(choice["text"]) for choice in choices] == [200_000] * 3

    run(check())


def test_more_sequences_than_the_bound_are_refused():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            data = config([prefill], [decode], limits={"max_sequences": 4})
            async with running(data) as (_, client):
                assert (await chat(client, n=4))[0] == 200
                status, _, body = await chat(client, n=5)
                assert (status, error_of(body)) == (400, "invalid_request")
                many = {"model": "tiny", "prompt": ["x"] * 3, "n": 2}
                assert (await chat(client, many, path=COMPLETIONS))[0] == 400
            assert len(prefill.requests) == 4

    run(check())


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("/v1/chat/completions", CHAT | {"n": 5}, "n"),
        (COMPLETIONS, {"prompt": "x", "n": 5}, "n"),
        (COMPLETIONS, {"prompt": "x", "n": 2, "best_of": "5"}, "best_of"),
        (COMPLETIONS, {"prompt": ["x"] * 2, "n": 3}, "n"),
        (COMPLETIONS, {"prompt": [1, 2, 3, 4, 5, 6], "n": 5}, "n"),
        (COMPLETIONS, {"prompt": "x", "n": 2, "best_of": 5}, "best_of"),
        (COMPLETIONS, {"prompt": ["x"] * 5}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], [2], [3], [4], [5]], "n": 2}, "prompt"),
    ],
)
def test_too_many_sequences_are_refused_with_the_field_that_asks_for_them(path, asked, param):
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            data = config([prefill], [decode], limits={"max_sequences": 4})
            async with running(data) as (_, client):
                status, _, body = await chat(client, {"model": "tiny"} | asked, path=path)
            error = json.loads(body)["error"]
            assert (status, error["param"]) == (400, param), error

    run(check())


@pytest.mark.parametrize("more", [{"best_of": 3}, {"use_beam_search": True}, {"best_of": 3, "n": 3}])
def test_what_one_engine_would_rank_is_refused(more):
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode])) as (_, client),
        ):
            body = {"model": "tiny", "prompt": "x", "n": 2} | more
            status, _, answer = await chat(client, body, path=COMPLETIONS)
            assert status == (200 if more.get("n") else 400), answer
            if status == 400:
                assert json.loads(answer)["error"]["param"] in more

    run(check())


def test_bodies_whose_sequences_would_be_too_large_are_refused():
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode])) as (_, client),
        ):
            body = {"model": "tiny", "prompt": ["x" * 200_000, "y" * 200_000]}
            assert (await chat(client, body, path=COMPLETIONS))[0] == 200
            body = {"model": "tiny", "prompt": ["x"] * 60, "user": "y" * 200_000}
            status, _, answer = await chat(client, body, path=COMPLETIONS)
            assert status == 400 and "send fewer" in json.loads(answer)["error"]["message"]

    run(check())


def test_an_engine_that_refuses_one_sequence_refuses_the_request():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            answered = decode._generate
            decode.go.clear()

            async def refuse_b(request):
                if json.loads(await request.read())["prompt"] == "b":
                    return web.json_response({"error": {"message": "no"}}, status=400)
                return await answered(request)

            decode._generate = refuse_b
            async with running(config([prefill], [decode])) as (_, client):
                body = {"model": "tiny", "prompt": ["a", "b", "c"]}
                status, _, answer = await chat(client, body, path=COMPLETIONS)
                assert (status, json.loads(answer)) == (400, {"error": {"message": "no"}})
                await until(lambda: decode.under_way == 0, "the end of the other sequences")

    run(check())


def test_a_sequence_that_breaks_ends_the_whole_stream():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            decode.more.clear()
            async with running(config([prefill], [decode])) as (_, client):
                answer = await client.post("/v1/chat/completions", json=CHAT | {"n": 2, "stream": True})
                await until(lambda: decode.under_way == 2)
                decode.break_after = 1
                decode.more.set()
                with pytest.raises(aiohttp.ClientPayloadError):
                    await answer.read()
                answer.close()
                await until(lambda: decode.under_way == 0)

    run(check())


def test_a_sequence_whose_engine_fails_is_computed_elsewhere():
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as bad,
            StandIn() as good,
            running(config([prefill], [bad, good])) as (_, client),
        ):
            bad.status = 500
            status, _, body = await chat(client, n=3)
            assert status == 200 and len(json.loads(body)["choices"]) == 3
            assert len(good.requests) == 3

    run(check())


@both
def test_a_client_that_leaves_takes_all_its_sequences_along(dialect):
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode], dialect)) as (front, client),
        ):
            prefill.go.clear()
            decode.go.clear()
            task = asyncio.create_task(chat(client, n=3))
            await until(lambda: len(prefill.requests) == 3)
            task.cancel()
            await until(lambda: not front.driver.requests)
            await until(lambda: prefill.under_way == decode.under_way == 0)

    run(check())


def test_aggregated_engines_get_several_sequences_as_they_came():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            body = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "best_of": 3}
            assert (await chat(client, body, path=COMPLETIONS))[0] == 200
            assert [sent for _, _, sent in engine.requests] == [body]

    run(check())
