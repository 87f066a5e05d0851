"""Prefill on one vLLM server and decode on another, KV handed over on disk: vLLM's ExampleConnector.

It keys KV by the prompt and hands no parameters over. It stores a prompt's KV with the first chunk, so a
prompt must fit into one step; and whole blocks of all but the last token, so it must be longer than a block.
Prefix caching is off: where a server's own cache reaches further than the store, the connector reports a
negative number of tokens and the engine dies (0.32).
"""

import asyncio
import json

import pytest
from doors import SCHEDULERS, Place, door, example, metric, numbers, place, run, talking_to
from models import smollm2
from servers import Engine, serving

MODEL = "smollm2"
BLOCK = 32
QUESTIONS = [
    "What is the capital of France?",
    "Which river flows through the capital of France?",
    "In which part of the world is France, and which language do people speak there?",
]


class Handover:
    def __init__(self, places, servers):
        self.places, self.servers = places, servers
        self.prefill, self.decode = servers
        self.instances = [each.at(server) for each, server in zip(places, servers, strict=True)]


@pytest.fixture(scope="module", params=SCHEDULERS)
def handover(request, tmp_path_factory):
    store = {"shared_storage_path": str(tmp_path_factory.mktemp("kv"))}
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": store}
    arguments = ["--kv-transfer-config", json.dumps(transfer), "--block-size", str(BLOCK)]
    arguments += ["--no-enable-prefix-caching"]
    engine = Engine(smollm2(), dummy=False, max_model_len=1024, arguments=arguments)
    places = [place(request.param, engine, role) for role in ("prefill", "decode")]
    places = [
        Place(each.engine, each.table | {"role": each.table["name"], "block_tokens": BLOCK})
        for each in places
    ]
    with serving(*(each.engine for each in places)) as servers:
        yield Handover(places, servers)


async def fetched(server):
    """Return how many tokens' KV a server got from elsewhere."""
    return sum((await metric(server, "vllm:external_prefix_cache_hits_total")).values())


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_the_decode_engine_goes_on_where_the_prefill_engine_ended(handover, stream):
    async def test():
        async with door(handover.instances, MODEL) as front:
            before = await fetched(handover.decode)
            answers = await asyncio.gather(
                *(front.client.chat(text, 16, stream=stream) for text in QUESTIONS)
            )
            assert await fetched(handover.decode) - before >= len(QUESTIONS) * BLOCK
        async with talking_to(handover.prefill.url, MODEL) as engine:
            direct = [(await engine.chat(text, 16)).ids for text in QUESTIONS]
        assert [answer.ids for answer in answers] == direct
        assert answers[0].text == "The capital of France is Paris."

    run(test())


def test_the_example_serves(handover):
    async def test():
        opened = example("prefill-decode.toml", handover.places, handover.servers)
        async with door(model=MODEL, **opened) as front:
            answers = await asyncio.gather(*(front.client.chat(text, 8) for text in QUESTIONS))
            assert [len(answer.ids) for answer in answers] == [8, 8, 8] and answers[0].text[
                :11
            ] == "The capital"

    run(test())


def test_each_engine_does_its_part_and_no_more(handover):
    async def test():
        names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
        servers = (handover.prefill, handover.decode)
        before = [(await metric(server, name))["0"] for server in servers for name in names]
        async with door(handover.instances, MODEL) as front:
            await asyncio.gather(*(front.client.complete(numbers(n, 100), 10) for n in range(4)))
        after = [(await metric(server, name))["0"] for server in servers for name in names]
        # Prompts count on both; the prefill engine makes one token each, the decode engine all ten.
        assert [now - then for now, then in zip(after, before, strict=True)] == [400.0, 4.0, 400.0, 40.0]

    run(test())


def test_a_prompt_shorter_than_a_block_is_computed_again(handover):
    async def test():
        async with door(handover.instances, MODEL) as front:
            answer = await front.client.complete(numbers(9, 20), 5)
            assert len(answer.ids) == 5

    run(test())
