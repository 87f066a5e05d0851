"""An emulated engine over HTTP: answers, streams, ranks, metrics, events, cancellation."""

import asyncio
import json
import logging

import aiohttp
import openai
import pytest
from emulated import cluster, completion, events_of, pool, post, running, until

from headway.core.errors import ConfigError
from headway.core.events import InstanceUp, PassEnded
from headway.hosts.emulator import Emulator
from headway.hosts.emulator.answers import SseStream
from headway.wire import Subscriber


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_completion_is_as_long_as_asked_and_says_so():
    async def scenario():
        async with running() as (emulator, session):
            status, answer = await completion(session, emulator.endpoints[0].url, "abcdefgh", 3)
        assert status == 200
        assert answer["object"] == "text_completion"
        assert answer["choices"][0]["text"] == "tok0 tok1 tok2"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}

    run(scenario)


def test_a_chat_stream_has_role_tokens_reason_usage_and_an_end():
    async def scenario():
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}
        body["stream_options"] = {"include_usage": True}
        async with running() as (emulator, session):
            url = emulator.endpoints[0].url + "/v1/chat/completions"
            async with session.post(url, json=body) as response:
                assert response.content_type == "text/event-stream"
                *chunks, done = await events_of(response)
        assert done == "[DONE]"
        chunks = [json.loads(chunk) for chunk in chunks]
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["choices"][0]["delta"]["content"] for c in chunks[1:-1]] == [
            "tok0",
            " tok1",
            " tok2",
            " tok3",
        ]
        assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * 4 + ["length"]
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 4
        assert len({chunk["id"] for chunk in chunks}) == 1

    run(scenario)


def test_a_stream_of_one_token_is_complete():
    async def scenario():
        async with running() as (emulator, session):
            url = emulator.endpoints[0].url + "/v1/completions"
            async with session.post(url, json={"prompt": "x", "max_tokens": 1, "stream": True}) as response:
                first, done = await events_of(response)
        choice = json.loads(first)["choices"][0]
        assert (choice["text"], choice["finish_reason"], done) == ("tok0", "length", "[DONE]")

    run(scenario)


def test_old_http_gets_its_stream_without_chunks():
    async def scenario():
        async with running() as (emulator, _):
            port = int(emulator.endpoints[0].url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            body = b'{"prompt": "x", "max_tokens": 3, "stream": true}'
            writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
        _, _, events = answer.partition(b"\r\n\r\n")
        assert [event[:5] for event in events.split(b"\n\n")[:-1]] == [b"data:"] * 4

    run(scenario)


def test_the_openai_client_runs_against_it_unchanged():
    async def scenario():
        messages = [{"role": "user", "content": "hello"}]
        async with running(model="m") as (emulator, _):
            url = emulator.endpoints[0].url + "/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
                assert [model.id async for model in client.models.list()] == ["m"]
                chat = await client.chat.completions.create(model="m", messages=messages, max_tokens=2)
                assert chat.choices[0].message.content == "tok0 tok1"
                stream = await client.chat.completions.create(
                    model="m", messages=messages, max_tokens=3, stream=True
                )
                assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "tok0 tok1 tok2"
                text = await client.completions.create(model="m", prompt="x", max_tokens=1)
                assert text.choices[0].text == "tok0"
                vectors = await client.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
                assert len(vectors.data) == 2
                with pytest.raises(openai.NotFoundError, match="does not exist"):
                    await client.completions.create(model="other", prompt="x")
                with pytest.raises(openai.BadRequestError, match="maximum context length"):
                    await client.completions.create(model="m", prompt="x" * 40_000)

    run(scenario)


def test_bad_requests_are_refused_and_reach_no_engine():
    async def scenario():
        async with running() as (emulator, session):
            url = emulator.endpoints[0].url
            assert (await post(session, url, "/v1/completions", b"{"))[0] == 400
            assert (await completion(session, url, headers={"X-data-parallel-rank": "2"}))[0] == 400
            assert (await completion(session, url, headers={"X-data-parallel-rank": "x"}))[0] == 400
            status, answer = await post(session, url, "/v1/nonsense", {})
            assert (status, answer["error"]["type"]) == (404, "NotFoundError")
            async with session.get(url + "/v1/completions") as response:
                assert response.status == 405
                assert (await response.json())["error"]["code"] == 405
            async with session.get(url + "/metrics") as response:
                assert 'vllm:prompt_tokens_total{engine="0",model_name="tiny"} 0.0' in await response.text()

    run(scenario)


def test_metrics_count_by_rank_under_vllms_names():
    async def scenario():
        async with running() as (emulator, session):
            url = emulator.endpoints[0].url
            await completion(session, url, "abcdefgh", 5, headers={"X-data-parallel-rank": "1"})
            async with session.get(url + "/metrics") as response:
                text = await response.text()
        for line in (
            'vllm:prompt_tokens_total{engine="1",model_name="tiny"} 2.0',
            'vllm:generation_tokens_total{engine="1",model_name="tiny"} 5.0',
            'vllm:generation_tokens_total{engine="0",model_name="tiny"} 0.0',
            'vllm:request_success_total{engine="1",model_name="tiny"} 1.0',
            'vllm:time_to_first_token_seconds_count{engine="1",model_name="tiny"} 1.0',
            'vllm:iteration_tokens_total_count{engine="1",model_name="tiny"} 5.0',
            'vllm:num_requests_running{engine="1",model_name="tiny"} 0.0',
            'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.0',
            'vllm:num_preemptions_total{engine="0",model_name="tiny"} 0.0',
        ):
            assert line in text

    run(scenario)


def test_a_port_per_rank_serves_and_shows_only_that_rank():
    async def scenario():
        async with running(rank_by="port") as (emulator, session):
            _, second = emulator.endpoints[0].urls
            await completion(session, second, "abcdefgh", 2)
            async with session.get(second + "/metrics") as response:
                text = await response.text()
        assert 'vllm:generation_tokens_total{engine="1",model_name="tiny"} 2.0' in text
        assert 'engine="0"' not in text

    run(scenario)


def test_sglang_shows_its_loads():
    async def scenario():
        async with running(dialect="sglang") as (emulator, session):
            url = emulator.endpoints[0].url
            async with session.get(url + "/v1/loads") as response:
                loads = (await response.json())["loads"]
            assert [load["dp_rank"] for load in loads] == [0, 1]
            assert loads[0]["num_waiting_reqs"] == 0
            async with session.get(url + "/metrics") as response:
                assert "sglang:num_running_reqs{" in await response.text()
            assert (await completion(session, url, routed_dp_rank=5))[0] == 400

    run(scenario)


def test_a_client_that_goes_takes_its_request_along():
    async def scenario():
        async with running() as (emulator, session):
            instance = emulator.instances[0]
            for stream in (True, False):
                asking = asyncio.create_task(
                    completion(session, instance.endpoint.url, tokens=5000, stream=stream)
                )
                await until(lambda: instance.requests == 1)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                await until(lambda: instance.requests == 0)

    run(scenario)


@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_goes_as_its_stream_begins_or_ends_is_no_error(monkeypatch, caplog, begun):
    late = "rest" if begun else "__init__"
    known = getattr(SseStream, late)

    def just_gone(self, *args, **kwargs):
        made = known(self, *args, **kwargs)
        self._transport.abort()  # seen by who writes before anybody is told
        return made

    async def scenario():
        async with running() as (emulator, session):
            monkeypatch.setattr(SseStream, late, just_gone)
            instance = emulator.instances[0]
            with pytest.raises(aiohttp.ClientError):
                await completion(session, instance.endpoint.url, stream=True)
            await until(lambda: instance.requests == 0)

    run(scenario)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_pass_ends_are_published_and_acknowledge_dispatches():
    async def scenario():
        heard = []
        async with running() as (emulator, session):
            endpoint = emulator.endpoints[0]
            async with Subscriber(endpoint.events, endpoint.snapshots, heard.append):
                await until(lambda: len(heard) >= 2)
                assert isinstance(heard[0], InstanceUp)
                assert heard[0].ranks == 2
                await completion(session, endpoint.url, tokens=2, headers={"x-headway-dispatch": "1"})
                await completion(session, endpoint.url, tokens=2, headers={"x-headway-dispatch": "2"})
                await until(lambda: heard[-1].acknowledged == 2)
        passes = [event for event in heard if isinstance(event, PassEnded)]
        assert [passed.acknowledged for passed in passes] == [1, 1, 2, 2]
        assert passes[0].ran_tokens in ((2, 0), (0, 2))
        assert passes[0].duration_s == pytest.approx(0.00102)  # 10.2 ms at tenfold speed

    run(scenario)


def test_requests_that_are_refused_are_acknowledged_too():
    async def scenario():
        heard = []
        async with running() as (emulator, session):
            endpoint = emulator.endpoints[0]
            await post(session, endpoint.url, "/v1/completions", b"{", **{"x-headway-dispatch": "1"})
            async with Subscriber(endpoint.events, endpoint.snapshots, heard.append):
                await until(lambda: len(heard) >= 2)
        assert heard[1].acknowledged == 1

    run(scenario)


def test_a_leader_that_was_followed_is_refused_and_counts_no_more():
    """What shows the newer token may be a health check; a newer term's numbers are a count of their own."""

    async def test():
        async with running() as (emulator, session):
            endpoint = emulator.endpoints[0]

            async def ask(token, number):
                headers = {"x-headway-fence": token, "x-headway-dispatch": number}
                url = endpoint.url + "/v1/completions"
                async with session.post(
                    url, data=b'{"prompt": "x", "max_tokens": 1}', headers=headers
                ) as answer:
                    return answer.status, answer.headers.get("x-headway-fence")

            assert await ask("7", "3") == (200, None)
            async with session.get(endpoint.url + "/health", headers={"x-headway-fence": "9"}) as answer:
                assert answer.status == 200
            assert await ask("7", "4") == (409, "9")
            async with session.get(endpoint.url + "/health", headers={"x-headway-fence": "7"}) as answer:
                assert answer.status == 200
            assert await ask("9", "20004") == (200, None)
            inbox = emulator.instance(endpoint.instance)._driver.instance.inbox
            assert inbox.acknowledged == 20_004
            async with session.post(endpoint.url + "/v1/completions", data=b'{"prompt": "x"}') as answer:
                assert answer.status == 200  # without a token it is nobody's to refuse

    asyncio.run(test())


def test_speed_scales_time():
    async def timed(speed):
        loop = asyncio.get_running_loop()
        async with running(speed=speed) as (emulator, session):
            started_s = loop.time()
            await completion(session, emulator.endpoints[0].url, tokens=20)
            return loop.time() - started_s

    async def scenario():
        real_s = await timed(1.0)
        assert real_s >= 0.2  # 20 passes of 10 ms
        assert await timed(10.0) < real_s / 2

    run(scenario)


def test_many_streams_at_once_lose_and_repeat_nothing():
    async def scenario():
        async with running(cluster(pool(max_running=256, kv_blocks=5000, token_cap=4096))) as (
            emulator,
            session,
        ):
            url = emulator.endpoints[0].url + "/v1/completions"

            async def one(number):
                body = {"prompt": f"request {number}", "max_tokens": 20, "stream": True}
                async with session.post(url, json=body) as response:
                    *chunks, _ = await events_of(response)
                chunks = [json.loads(chunk) for chunk in chunks]
                fingerprints = {chunk["system_fingerprint"] for chunk in chunks}
                return "".join([chunk["choices"][0]["text"] for chunk in chunks]), fingerprints

            answers = await asyncio.gather(*[one(number) for number in range(200)])
            await until(lambda: emulator.instances[0].requests == 0)
        expected = " ".join([f"tok{i}" for i in range(20)])
        assert {text for text, _ in answers} == {expected}
        assert len({next(iter(prints)) for _, prints in answers if len(prints) == 1}) == 200

    run(scenario)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dialect": "vlm"}, "did you mean 'vllm'"),
        ({"rank_by": "prot"}, "did you mean 'port'"),
        ({"only": ["engine-7"]}, "did you mean 'engine-0'"),
        ({"speed": 0.0}, "speed must be a positive number"),
        ({"batch": "vllm-v2"}, "did you mean 'vllm-v1'"),
    ],
)
def test_options_that_are_wrong_are_named_before_anything_starts(options, says):
    with pytest.raises(ConfigError, match=says):
        Emulator(cluster(), **options)


def test_a_port_that_is_taken_is_named():
    async def scenario():
        async with running() as (emulator, _):
            port = int(emulator.endpoints[0].url.rpartition(":")[2])
            with pytest.raises(
                ConfigError, match=f"^cannot listen on 127.0.0.1:{port}: address already in use$"
            ):
                async with Emulator(cluster(), base_port=port):
                    pass

    run(scenario)
