"""Anthropic's client and OpenAI's Responses through the gateway, before an engine that answers as vLLM did.

`recorded/vllm_0_32.json` holds what a real vLLM 0.32 answered to the same requests.
"""

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import anthropic
import openai
import pytest
from aiohttp import web
from standins import StandIn, run, running, until
from test_gateway_disaggregated import PARAMS, config

RECORDED = json.loads((Path(__file__).parent / "recorded" / "vllm_0_32.json").read_text())
MESSAGES = [{"role": "user", "content": "hi"}]
ASKED = {"model": "tiny-llama", "max_tokens": 4, "messages": MESSAGES}
NAMES = {"/v1/messages": "messages", "/v1/responses": "responses", "/v1/messages/count_tokens": "count"}


class Recorded(StandIn):
    """Answers what a real engine answered: `plays` names another record than the path's."""

    def __init__(self):
        super().__init__(models=("tiny-llama",))
        self.plays = None
        self.cut_after = None  # bytes of a stream after which the connection breaks

    async def _generate(self, request):
        body = json.loads(await request.read())
        self.requests.append((request.path, request.headers.copy(), body))
        name = NAMES[request.path] + ("_stream" if body.get("stream") else "")
        record = RECORDED[self.plays or name]
        if "stream" not in record["content_type"] and "event" not in record["content_type"]:
            answer = json.loads(record["body"]) | self.extra
            return web.json_response(answer, status=record["status"])
        response = web.StreamResponse(headers={"Content-Type": record["content_type"]})
        await response.prepare(request)
        await response.write(record["body"].encode()[: self.cut_after])
        if self.cut_after is not None:
            await self.more.wait()
            request.transport.abort()
        return response


def text_of(name):
    """Return the text that a recorded stream of messages or a response holds."""
    data = [json.loads(line[6:]) for line in RECORDED[name]["body"].split("\n") if line.startswith("data: {")]
    deltas = (each.get("delta") for each in data)
    return "".join(d if isinstance(d, str) else d.get("text", "") for d in deltas if d)


@asynccontextmanager
async def served(**tables):
    """Run an aggregated gateway before one engine; give it, the engine and both clients."""
    async with Recorded() as engine:
        data = {
            "server": {"port": 0},
            "instances": [{"name": "engine-0", "url": engine.url}],
            "policy": {"cluster": "round-robin"},
            "health": {"interval_s": 0.02},
        }
        async with running(data | tables) as (front, _), clients(front) as (claude, gpt):
            yield front, engine, claude, gpt


@asynccontextmanager
async def clients(front, key="unused"):
    async with (
        anthropic.AsyncAnthropic(api_key=key, base_url=front.url, max_retries=0) as claude,
        openai.AsyncOpenAI(api_key=key, base_url=front.url + "/v1", max_retries=0) as gpt,
    ):
        yield claude, gpt


def test_anthropics_client_gets_a_message():
    async def check():
        async with served() as (_, engine, claude, _):
            message = await claude.messages.create(**ASKED)
            recorded = json.loads(RECORDED["messages"]["body"])
            assert message.content[0].text == recorded["content"][0]["text"]
            assert (message.usage.input_tokens, message.usage.output_tokens) == (9, 4)
            assert engine.requests[0][2] == ASKED

    run(check())


def test_anthropics_client_streams_a_message():
    async def check():
        async with served() as (_, _, claude, _):
            async with claude.messages.stream(**ASKED) as stream:
                parts = [part async for part in stream.text_stream]
                message = await stream.get_final_message()
            assert "".join(parts) == message.content[0].text == text_of("messages_stream") != ""
            assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 4)

    run(check())


def test_anthropics_client_counts_tokens():
    async def check():
        async with served() as (_, _, claude, _):
            counted = await claude.messages.count_tokens(model="tiny-llama", messages=MESSAGES)
            assert counted.input_tokens == 9

    run(check())


def test_errors_have_anthropics_format_whoever_they_come_from():
    async def check():
        async with served() as (front, engine, claude, _):
            with pytest.raises(anthropic.NotFoundError) as unknown:
                await claude.messages.create(**ASKED | {"model": "huge"})
            error = unknown.value.body["error"]
            assert unknown.value.body["type"] == "error" and error["type"] == "not_found_error"
            assert "'huge'" in error["message"]
            engine.plays = "messages_long"
            with pytest.raises(anthropic.BadRequestError) as long:
                await claude.messages.create(**ASKED)
            assert "maximum context length" in long.value.body["error"]["message"]
            front.public.draining = True
            with pytest.raises(anthropic.InternalServerError) as drains:
                await claude.messages.create(**ASKED)
            assert drains.value.body["error"]["type"] == "overloaded_error"

    run(check())


def test_a_message_that_breaks_off_is_an_error_event_of_anthropics():
    async def check():
        async with served() as (_, engine, claude, _):
            engine.cut_after = RECORDED["messages_stream"]["body"].index("event: content_block_stop")
            engine.more.clear()
            with pytest.raises(anthropic.APIStatusError) as broken:
                async with claude.messages.stream(**ASKED) as stream:
                    async for _ in stream.text_stream:
                        engine.more.set()
            assert broken.value.body["error"]["type"] == "api_error"

    run(check())


def test_a_key_is_taken_as_each_client_sends_it(monkeypatch):
    monkeypatch.setenv("CLIENT_KEYS", "right")

    async def check():
        async with served(auth={"api_keys_env": "CLIENT_KEYS"}) as (front, engine, claude, gpt):
            with pytest.raises(anthropic.AuthenticationError) as refused:
                await claude.messages.create(**ASKED)
            assert refused.value.body["error"]["type"] == "authentication_error"
            with pytest.raises(openai.AuthenticationError):
                await gpt.responses.create(model="tiny-llama", input="hi")
            async with clients(front, "right") as (claude, gpt):
                await claude.messages.create(**ASKED)
                await gpt.responses.create(model="tiny-llama", input="hi")
            for _, headers, _ in engine.requests:
                assert not {"x-api-key", "authorization"} & {name.lower() for name in headers}

    run(check())


def test_openais_client_gets_a_response():
    async def check():
        async with served() as (_, engine, _, gpt):
            response = await gpt.responses.create(model="tiny-llama", input="hi", max_output_tokens=4)
            recorded = json.loads(RECORDED["responses"]["body"])
            assert response.output_text == recorded["output"][0]["content"][0]["text"]
            assert response.usage.output_tokens == 4
            assert engine.requests[0][2] == {"model": "tiny-llama", "input": "hi", "max_output_tokens": 4}

    run(check())


def test_openais_client_streams_a_response():
    async def check():
        async with served() as (_, _, _, gpt):
            stream = await gpt.responses.create(model="tiny-llama", input="hi", stream=True)
            events = [event async for event in stream]
            deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
            assert "".join(deltas) == text_of("responses_stream") != ""
            assert [event.sequence_number for event in events] == list(range(len(events)))

    run(check())


def test_a_response_that_builds_on_another_is_refused():
    async def check():
        async with served() as (_, engine, _, gpt):
            for more in ({"previous_response_id": "resp_1"}, {"background": True}):
                with pytest.raises(openai.BadRequestError) as refused:
                    await gpt.responses.create(model="tiny-llama", input="hi", **more)
                assert refused.value.param == next(iter(more))
            with pytest.raises(openai.APIStatusError) as unknown:
                await gpt.responses.retrieve("resp_1")
            assert unknown.value.status_code == 501 and not engine.requests

    run(check())


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_both_apis_work_where_prefill_and_decode_are_apart(dialect, path):
    async def check():
        async with Recorded() as prefill, Recorded() as decode:
            prefill.extra = {"kv_transfer_params": PARAMS}
            data = config([prefill], [decode], dialect)
            async with running(data) as (front, _), clients(front) as (claude, gpt):
                if path == "/v1/messages":
                    async with claude.messages.stream(**ASKED) as stream:
                        text = await stream.get_final_text()
                    assert text == text_of("messages_stream")
                else:
                    answer = await gpt.responses.create(model="tiny-llama", input="hi", max_output_tokens=4)
                    assert answer.usage.output_tokens == 4
                await until(lambda: not front.driver.requests)
            ((first_path, _, first),) = prefill.requests
            ((second_path, _, second),) = decode.requests
            assert first_path == second_path == path
            if dialect == "sglang":
                assert first == second and "bootstrap_room" in first
                return
            limit = "max_tokens" if path == "/v1/messages" else "max_output_tokens"
            assert (first[limit], first["stream"]) == (1, False)
            assert first["kv_transfer_params"]["do_remote_decode"] is True
            assert (second[limit], second["kv_transfer_params"]) == (4, PARAMS)
            assert first.get("store") is (None if path == "/v1/messages" else False)

    run(check())


def test_usage_of_both_apis_is_counted():
    async def check():
        done = []
        async with Recorded() as engine:
            data = {
                "server": {"port": 0},
                "instances": [{"name": "engine-0", "url": engine.url}],
                "policy": {"cluster": "round-robin"},
            }
            async with running(data, on_done=[lambda flight, status: done.append(flight)]) as (front, _):
                async with clients(front) as (claude, gpt):
                    await claude.messages.create(**ASKED)
                    async with claude.messages.stream(**ASKED) as stream:
                        await stream.get_final_message()
                    await gpt.responses.create(model="tiny-llama", input="hi")
                    async for _ in await gpt.responses.create(model="tiny-llama", input="hi", stream=True):
                        pass
                await asyncio.sleep(0)
            assert [(each.prompt_tokens, each.output_tokens) for each in done] == [(9, 4)] * 4

    run(check())
