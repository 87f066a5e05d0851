"""Two independent vLLM servers behind the gateway, with a real model: ranks by port, or two instances."""

import asyncio
import json

import pytest
from doors import SCHEDULERS, STOCK, door, example, metric, numbers, place, run, talking_to, until
from models import smollm2
from servers import Engine, free_ports, serving

from headway.core.events import InstanceDown, PassEnded

MODEL = "smollm2"
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "Name three colours.",
    "Why is the sky blue?",
    "Translate 'good morning' to Spanish.",
]


class Pair:
    """Two servers at neighbouring ports."""

    def __init__(self, scheduler, places, servers):
        self.scheduler, self.places, self.servers = scheduler, places, servers

    @property
    def two_instances(self):
        return [place.at(server) for place, server in zip(self.places, self.servers, strict=True)]

    @property
    def two_ranks(self):
        """One instance whose ranks are told by their port. It has one address for events: none is given."""
        first = self.places[0].at(self.servers[0], name="pair", ranks=2, rank_by="port")
        return [{name: value for name, value in first.items() if name not in ("events", "snapshots")}]


@pytest.fixture(scope="module", params=SCHEDULERS)
def pair(request):
    ports = free_ports(2)
    engines = [Engine(smollm2(), dummy=False, max_model_len=1024, port=port) for port in ports]
    places = [place(request.param, engine, f"engine-{n}") for n, engine in enumerate(engines)]
    with serving(*(each.engine for each in places)) as servers:
        yield Pair(request.param, places, servers)


@pytest.fixture(scope="module")
def stock_answers():
    """What vLLM's own scheduler answered, by question: filled by the first of the pairs."""
    return {}


shapes = pytest.mark.parametrize("shape", ["two_instances", "two_ranks"])


def test_the_model_knows_the_capital_of_france(pair):
    async def test():
        async with talking_to(pair.servers[0].url, MODEL) as engine:
            answer = await engine.chat(QUESTIONS[0], stream=False)
            assert answer.text == "The capital of France is Paris."

    run(test())


#: A first token that is late whatever is done, and a time per token that a long prompt would break.
TARGETS = {"slo_ttft_ms": 1, "slo_tpot_ms": 500}
#: Tokens of that prompt: it takes seconds to compute.
LONG = 900


async def send_a_long_prompt(server):
    """Have a server compute a long prompt while it decodes."""

    async def decodes():
        return sum((await metric(server, "vllm:num_requests_running")).values()) > 0

    async with talking_to(server.url, MODEL) as engine:
        await until(decodes)
        await engine.complete(numbers(700, LONG), 1)


async def steered(pair):
    return sum([sum((await metric(server, "headway_steered_total")).values()) for server in pair.servers])


@shapes
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_answers_are_token_for_token_those_of_the_engine(pair, shape, stream, stock_answers):
    async def test():
        if not stock_answers:
            assert pair.scheduler == STOCK, "run this with the stock scheduler's tests"
            async with talking_to(pair.servers[0].url, MODEL) as engine:
                stock_answers.update({text: (await engine.chat(text)).ids for text in QUESTIONS})
        for server in pair.servers:  # no target binds before some steps were timed
            async with talking_to(server.url, MODEL) as engine:
                await engine.complete(numbers(500, 20), 24)
        before = await steered(pair)
        async with door(getattr(pair, shape), MODEL) as front:
            asked = [front.client.chat(text, stream=stream, vllm_xargs=TARGETS) for text in QUESTIONS]
            beside = [asyncio.create_task(send_a_long_prompt(server)) for server in pair.servers]
            answers = await asyncio.gather(*asked)
            await asyncio.gather(*beside)
            assert [answer.ids for answer in answers] == [stock_answers[text] for text in QUESTIONS]
            assert [len(answer.ids) for answer in answers] == [a.usage["completion_tokens"] for a in answers]

        async def was_steered():
            return await steered(pair) > before

        if pair.scheduler != STOCK:
            await until(was_steered)

    run(test())


def test_nonsense_targets_are_refused_and_others_served(pair):
    if pair.scheduler == STOCK:
        pytest.skip("vLLM's own server knows no targets")

    async def test():
        server = pair.servers[0]
        body = {"model": MODEL, "prompt": numbers(600, 20), "max_tokens": 4, "ignore_eos": True}

        async def ask(headers=None, **fields):
            async with engine.session.post(
                "/v1/completions", json=body | fields, headers=headers
            ) as response:
                return response.status, await response.json()

        async with talking_to(server.url, MODEL) as engine:
            for value in (-1, "soon", 1e6):
                for said in (
                    {"vllm_xargs": {"slo_ttft_ms": value}},
                    {"slo_ttft_ms": value},
                    {"headers": {"x-slo-ttft-ms": str(value)}},
                ):
                    status, answer = await ask(**said)
                    assert status == 400, said
                    message = answer["error"]["message"].replace("-", "_")
                    assert "slo_ttft_ms must be " in message, (said, message)
            status, answer = await ask({"x-slo-ttft-ms": "5000"}, slo_tpot_ms=500)
            assert status == 200 and answer["usage"]["completion_tokens"] == 4

        async def counted():
            return (await metric(server, "headway_step_seconds_count")).get("0", 0.0) > 0.0

        await until(counted)
        assert await metric(server, "headway_failures_total") == {"0": 0.0}
        assert await metric(server, "headway_slo_ignored_total") == {"0": 0.0}

    run(test())


def test_the_example_serves(pair):
    async def test():
        async with door(model=MODEL, **example("pair.toml", pair.places, pair.servers)) as front:
            answers = await asyncio.gather(*(front.client.complete(numbers(n, 20), 4) for n in range(6)))
            assert [len(answer.ids) for answer in answers] == [4] * 6

    run(test())


@shapes
def test_both_servers_get_their_share(pair, shape):
    async def test():
        before = [await metric(server, "vllm:request_success_total") for server in pair.servers]
        async with door(getattr(pair, shape), MODEL, policy="round-robin") as front:
            await asyncio.gather(*(front.client.complete(numbers(n, 20), 2) for n in range(6)))
        after = [await metric(server, "vllm:request_success_total") for server in pair.servers]
        assert [now["0"] - then["0"] for now, then in zip(after, before, strict=True)] == [3.0, 3.0]

    run(test())


@shapes
def test_the_policy_hears_of_every_prompt_token(pair, shape):
    async def test():
        async with door(getattr(pair, shape), MODEL) as front:
            prompts = [numbers(100 + n, 40) for n in range(6)]
            await asyncio.gather(*(front.client.complete(prompt, 2) for prompt in prompts))

            def computed():
                return sum(sum(ended.ran_tokens) for ended in front.seen(PassEnded))

            await until(lambda: computed() >= 240)
            assert computed() == 240

    run(test())


def test_an_engine_with_events_tells_its_passes_itself(pair):
    if pair.scheduler == STOCK:
        pytest.skip("vLLM's own scheduler publishes nothing")

    async def test():
        async with door(pair.two_instances, MODEL, policy="round-robin") as front:
            await asyncio.gather(*(front.client.complete(numbers(200 + n, 40), 8) for n in range(2)))
            for name in ("engine-0", "engine-1"):
                # each step is told, not only what a first byte shows
                await until(lambda name=name: len(front.seen(PassEnded, name)) >= 8)
                passes = front.seen(PassEnded, name)
                assert all(ended.duration_s > 0.0 for ended in passes)
                assert max(ended.acknowledged for ended in passes) == 1

    run(test())


def test_a_schema_is_kept_through_the_gateway(pair):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }

    async def test():
        wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
        async with door(pair.two_instances, MODEL) as front:
            answer = await front.client.chat("Name a city in France as JSON.", 60, response_format=wanted)
            assert list(json.loads(answer.text)) == ["city"]

    run(test())


def test_a_client_that_leaves_ends_the_computation(pair):
    async def test():
        async def running():
            return [(await metric(server, "vllm:num_requests_running"))["0"] for server in pair.servers]

        async with door(pair.two_instances, MODEL) as front:
            asking = asyncio.create_task(front.client.complete(numbers(1, 20), 1000))

            async def runs():
                return sum(await running()) == 1.0

            async def is_idle():
                return sum(await running()) == 0.0

            await until(runs)
            asking.cancel()
            await until(is_idle)

    run(test())


def test_too_long_a_prompt_is_refused_at_the_door_and_nonsense_by_the_engine(pair):
    async def test():
        async with door(pair.two_instances, MODEL) as front:
            answer = await front.client.complete(numbers(1, 1025), 1)
            assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
            answer = await front.client.complete(numbers(1, 1024), 1)  # no room for an output
            assert (answer.status, answer.error["param"]) == (400, "max_tokens")
            answer = await front.client.chat("Hi", temperature=-1.0)
            assert answer.status == 400 and "temperature" in answer.error["message"]

    run(test())


def test_a_killed_server_loses_no_request_that_has_no_byte_yet(pair):
    """The last test of a pair: one server is dead after it."""

    async def test():
        async with door(pair.two_instances, MODEL, policy="round-robin") as front:
            # 4 × 900 tokens on each take long enough that the last ones have no first byte when it dies.
            asking = [asyncio.create_task(front.client.complete(numbers(300 + n, 900), 2)) for n in range(8)]
            await until(lambda: any(task.done() for task in asking))
            await asyncio.to_thread(pair.servers[1].kill)
            answers = await asyncio.gather(*asking)
            cut = [a for a in answers if len(a.ids) != 2]
            assert all(a.ids and a.error for a in cut), (
                "only what had begun to stream may be cut, and says so"
            )
            await until(lambda: front.seen(InstanceDown, "engine-1"))
            answers = await asyncio.gather(
                *(front.client.complete(numbers(400 + n, 20), 2) for n in range(4))
            )
            assert [len(a.ids) for a in answers] == [2] * 4

    run(test())
