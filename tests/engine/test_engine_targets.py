"""Targets of one client's stream on a real server, and what they do to the others.

Time is counted in tokens of that stream, one a step, so that the machine's pace does not matter: requests are
sent by it, and how long they wait is measured by it.
"""

import asyncio
import json

import pytest
from doors import metric, numbers, run, talking_to
from models import tiny_llama
from servers import Engine, serving

OTHERS, EVERY_TOKENS = 24, 5
PROMPT_TOKENS, OUTPUT_TOKENS = 400, 8


@pytest.fixture(scope="module", params=["fair", "triage"])
def server(request):
    engine = Engine(
        tiny_llama(),
        scheduler="headway.hosts.vllm.FairScheduler",
        additional_config={"headway": {"policy": request.param, "ttft_s": 60.0, "tpot_s": 5.0}},
        # Without it the prefix cache would serve the second run's prompts.
        arguments=["--no-enable-prefix-caching"],
    )
    with serving(engine) as (one,):
        yield one


class Stream:
    """A long answer that counts its tokens."""

    def __init__(self, client, **targets):
        self.tokens = 0
        self._came = asyncio.Condition()
        self._task = asyncio.create_task(self._read(client, targets))

    async def reaches(self, tokens):
        async with self._came:
            await self._came.wait_for(lambda: self.tokens >= tokens or self._task.done())
        assert not self._task.done(), "the stream ended before the others did"

    async def end(self):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self, client, targets):
        body = {"model": client.model, "prompt": numbers(1, 20), "max_tokens": 4000, "ignore_eos": True}
        body |= {"stream": True, "vllm_xargs": targets}
        async with client.session.post("/v1/completions", json=body) as response:
            assert response.status == 200
            async for line in response.content:
                if line.startswith(b"data: {"):
                    async with self._came:
                        self.tokens += 1
                        self._came.notify_all()


async def tokens_until_the_first(client, stream, seed):
    """Return how many tokens the stream gets before this request gets its first."""
    sent = stream.tokens
    body = {"model": client.model, "prompt": numbers(seed, PROMPT_TOKENS), "max_tokens": OUTPUT_TOKENS}
    body |= {"ignore_eos": True, "stream": True}
    waited = None
    async with client.session.post("/v1/completions", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            if line.startswith(b"data: {"):
                assert "error" not in json.loads(line[6:])
                waited = stream.tokens - sent if waited is None else waited
    return waited


async def waits_beside(server, seed, **targets):
    """Return how long each of the others waits beside a stream with these targets."""
    async with talking_to(server.url, "tiny-llama") as client:
        stream = Stream(client, **targets)
        others = []
        for number in range(OTHERS):
            await stream.reaches(EVERY_TOKENS * (number + 1))
            others.append(asyncio.create_task(tokens_until_the_first(client, stream, seed + number)))
        waits = await asyncio.gather(*others)
        await stream.end()
        return waits


def test_a_tpot_target_out_of_reach_makes_nobody_else_wait(server):
    async def test():
        await waits_beside(server, 100, slo_ttft_ms=1)  # step times are learned
        usual = await waits_beside(server, 200, slo_ttft_ms=1)
        hostile = await waits_beside(server, 300, slo_ttft_ms=1, slo_tpot_ms=1e-6)
        assert (await metric(server, "headway_failures_total"))["0"] == 0
        assert (await metric(server, "headway_slo_ignored_total"))["0"] == 0
        # Believed, the target leaves no step time for prompts but each ninth: 859 tokens against 55 then.
        assert sum(hostile) <= 2 * sum(usual) + 6 * OTHERS, (usual, hostile)

    run(test())
