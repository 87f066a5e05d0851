"""One vLLM server with two ranks behind the gateway, by header: ranks on their own, and ranks in lockstep."""

import asyncio

import pytest
from doors import SCHEDULERS, STOCK, door, example, metric, numbers, place, run, talking_to, until
from models import tiny_llama, tiny_moe
from servers import Engine, serving

from headway.core.events import PassEnded
from headway.front.scrape import read_metrics

MODELS = {"independent": tiny_llama, "lockstep": tiny_moe}


class Served:
    def __init__(self, scheduler, kind, place, server):
        self.scheduler, self.kind, self.place, self.server = scheduler, kind, place, server
        self.instance = place.at(server)
        self.model = server.engine.model.name


@pytest.fixture(scope="module", params=SCHEDULERS)
def scheduler(request):
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def served(scheduler, request):
    engine = Engine(MODELS[request.param](), ranks=2)
    its_place = place(scheduler, engine, "engine-0", lockstep=request.param == "lockstep")
    with serving(its_place.engine) as (server,):
        yield Served(scheduler, request.param, its_place, server)


def test_the_header_chooses_the_rank(served):
    async def test():
        before = await metric(served.server, "vllm:request_success_total")
        async with door([served.instance], served.model, policy="round-robin") as front:
            answers = await asyncio.gather(*(front.client.complete(numbers(n, 50), 4) for n in range(8)))
            assert [len(answer.ids) for answer in answers] == [4] * 8
        after = await metric(served.server, "vllm:request_success_total")
        assert {rank: after[rank] - before.get(rank, 0.0) for rank in after} == {"0": 4.0, "1": 4.0}

    run(test())


def test_answers_are_token_for_token_those_of_the_engine(served):
    async def test():
        prompts = [numbers(50 + n, 30 + 20 * n) for n in range(6)]
        async with talking_to(served.server.url, served.model) as engine:
            direct = [(await engine.complete(prompt, 8)).ids for prompt in prompts]
        async with door([served.instance], served.model) as front:
            answers = await asyncio.gather(*(front.client.complete(prompt, 8) for prompt in prompts))
            assert [answer.ids for answer in answers] == direct

    run(test())


def test_the_example_serves(served):
    async def test():
        opened = example("ranks.toml", [served.place], [served.server])
        opened["instances"][0]["lockstep"] = served.kind == "lockstep"
        async with door(model=served.model, **opened) as front:
            answers = await asyncio.gather(*(front.client.complete(numbers(n, 50), 4) for n in range(8)))
            assert [len(answer.ids) for answer in answers] == [4] * 8
            assert not served.instance.get("events") or front.seen(PassEnded, "vllm")

    run(test())


def test_the_load_of_every_rank_is_on_the_metrics_page(served):
    async def test():
        async with talking_to(served.server.url, served.model) as engine:
            async with engine.session.get("/metrics") as response:
                load = read_metrics(await response.text(), 2)
            assert (load.running, load.waiting) == ((0, 0), (0, 0)) and len(load.kv_usage) == 2

    run(test())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_rank_that_is_not_there_is_an_error_the_client_sees(served, stream):
    """The configuration says more ranks than there are: nothing can be served well, and nothing hangs."""

    async def test():
        instance = {name: v for name, v in served.instance.items() if name not in ("events", "snapshots")}
        async with door([instance | {"ranks": 3}], served.model, policy="round-robin") as front:
            asked = (front.client.complete(numbers(n, 50), 1, stream=stream) for n in range(3))
            answers = await asyncio.gather(*asked)
            (refused,) = (answer for answer in answers if answer.error)
            assert "data_parallel_rank" in refused.error["message"]
            assert refused.status == 400

    run(test())


def test_the_policy_hears_of_every_prompt_token_by_rank(served):
    async def test():
        async with door([served.instance], served.model, policy="round-robin") as front:
            prompts = [numbers(100 + n, 60 + 10 * n) for n in range(4)]
            await asyncio.gather(*(front.client.complete(prompt, 3) for prompt in prompts))

            def computed():
                total = [0, 0]
                for ended in front.seen(PassEnded):  # independent ranks report each for itself
                    for rank, tokens in enumerate(ended.ran_tokens, ended.first_rank):
                        total[rank] += tokens
                return total

            await until(lambda: sum(computed()) >= 300)
            assert sorted(computed()) == [140, 160]

    run(test())


def test_a_long_prompt_on_one_rank_stalls_the_other_in_lockstep_alone(served):
    if served.scheduler != STOCK:
        pytest.skip("a prompt that is cut into several passes stalls the others less")

    async def test():
        async with talking_to(served.server.url, served.model) as engine:
            tokens = 0

            async def decode():
                nonlocal tokens
                body = {"model": served.model, "prompt": numbers(1, 32), "max_tokens": 60, "ignore_eos": True}
                body |= {"stream": True, "return_token_ids": True}
                headers = {"X-data-parallel-rank": "1"}
                async with engine.session.post("/v1/completions", json=body, headers=headers) as response:
                    async for line in response.content:
                        tokens += line.startswith(b'data: {"')

            async def prefill():
                body = {"model": served.model, "prompt": numbers(2, 1500), "max_tokens": 1}
                headers = {"X-data-parallel-rank": "0"}
                async with engine.session.post("/v1/completions", json=body, headers=headers) as response:
                    await response.read()

            decoding = asyncio.create_task(decode())
            await until(lambda: tokens >= 5)
            before = tokens
            await prefill()
            meanwhile = tokens - before
            await decoding
            # In lockstep: what ran when the prompt came, the pass with the prompt, and what the wire adds.
            assert meanwhile <= 5 if served.kind == "lockstep" else meanwhile > 5

    run(test())


def test_passes_of_ranks_in_lockstep_are_one_event(served):
    if served.scheduler == STOCK or served.kind != "lockstep":
        pytest.skip("vLLM's own scheduler publishes nothing, independent ranks have passes of their own")

    async def test():
        async with door([served.instance], served.model, policy="round-robin") as front:
            await asyncio.gather(*(front.client.complete(numbers(300 + n, 700), 4) for n in range(2)))
            await until(lambda: sum(map(sum, (e.ran_tokens for e in front.seen(PassEnded)))) >= 1400)
            assert {len(ended.ran_tokens) for ended in front.seen(PassEnded)} == {2}

    run(test())
