"""Gateway and emulated engines, asked by the OpenAI client: no token lost, none twice, nothing left."""

import asyncio
import os
from contextlib import AsyncExitStack, asynccontextmanager

import openai
import pytest

from headway.cli.embedded import gateway_data
from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.hosts.emulator import Emulator, Fault
from headway.hosts.gateway import Gateway, GatewayConfig
from headway.model.cluster import ClusterSpec, NetworkSpec, PoolSpec
from headway.model.costs import DenseCosts

SPEED = 10.0
#: 10 ms a pass, 0.1 ms a token.
COSTS = DenseCosts(0.010, 0, 0.0001, 0.0001, 0.0, 0.0)


def cluster(*roles: Role) -> ClusterSpec:
    def pool(role: Role) -> PoolSpec:
        shape = {"ranks": 2, "token_cap": 256, "max_running": 64, "kv_blocks": 500, "block_tokens": 16}
        return PoolSpec(role=role, instances=2, costs=COSTS, host_gap_s=0.0, jitter=0.0, **shape)

    network = NetworkSpec(kv_latency_s=0.002, kv_bandwidth_bytes_s=1e9)
    return ClusterSpec(name="tiny", kv_bytes_per_token=1000, network=network, pools=tuple(map(pool, roles)))


ONE_POOL, TWO_POOLS = (Role.AGGREGATED,), (Role.PREFILL, Role.DECODE)
KINDS = {
    "vllm": ("vllm", "header", ONE_POOL),
    "vllm by port": ("vllm", "port", ONE_POOL),
    "vllm P/D": ("vllm", "header", TWO_POOLS),
    "sglang": ("sglang", "header", ONE_POOL),
    "sglang P/D": ("sglang", "header", TWO_POOLS),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@asynccontextmanager
async def together(kind, policy: str = "staggered"):
    """Emulator, gateway and client; checks that nothing is left when the test is done with them."""
    dialect, rank_by, roles = kind
    spec = cluster(*roles)
    async with emulated(spec, dialect, rank_by) as emulator:
        data = gateway_data(spec, emulator.endpoints, dialect=dialect, speed=SPEED)
        data |= {"server": {"port": 0}, "policy": {"cluster": policy}, "health": {"interval_s": 0.05}}
        async with Gateway(GatewayConfig.parse(data)) as gateway:
            async with openai.AsyncOpenAI(
                api_key="unused", base_url=gateway.url + "/v1", max_retries=0
            ) as client:
                yield client, gateway, emulator
            await _is_empty(gateway, emulator)


@asynccontextmanager
async def emulated(spec: ClusterSpec, dialect: str, rank_by: str):
    """Ranks by port need ports in a row: where one of a row is taken, the next row is tried."""
    rows = [0] if rank_by == "header" else range(20_000 + os.getpid() % 5000, 32_000, 97)
    async with AsyncExitStack() as stack:
        for first in rows:
            emulator = Emulator(spec, speed=SPEED, dialect=dialect, rank_by=rank_by, base_port=first)
            try:
                await stack.enter_async_context(emulator)
            except ConfigError:
                continue
            yield emulator
            return
        raise AssertionError("no row of free ports")


async def _is_empty(gateway: Gateway, emulator: Emulator) -> None:
    buffer = gateway.serving.buffer

    def left():
        return (
            gateway.driver.requests,
            buffer.requests,
            buffer.tokens,
            buffer.bytes,
            buffer.in_flight,
            sum(len(worker.legs) for worker in gateway.workers),
            sum(instance.requests for instance in emulator.instances),
        )

    async with asyncio.timeout(3.0):
        while any(left()):
            await asyncio.sleep(0.005)


def run(test) -> None:
    async def bounded():
        async with asyncio.timeout(8.0):
            await test

    asyncio.run(bounded())


def words(tokens: int) -> str:
    return " ".join(f"tok{i}" for i in range(tokens))


async def ask(
    client: openai.AsyncOpenAI, text: str, tokens: int, *, chat: bool, stream: bool
) -> tuple[str, str]:
    """Return the answer's text, and its mark of the prompt."""
    options = {"model": "tiny", "max_tokens": tokens, "stream": stream}
    if chat:
        answer = await client.chat.completions.create(messages=[{"role": "user", "content": text}], **options)
    else:
        answer = await client.completions.create(prompt=text, **options)
    if not stream:
        assert answer.usage.completion_tokens == tokens
        (choice,) = answer.choices
        return (choice.message.content if chat else choice.text), answer.system_fingerprint
    parts, marks = [], set()
    async for chunk in answer:
        marks.add(chunk.system_fingerprint)
        for choice in chunk.choices:
            parts.append((choice.delta.content if chat else choice.text) or "")
    (mark,) = marks
    return "".join(parts), mark


@kinds
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("chat", [False, True], ids=["completion", "chat"])
def test_the_openai_client_gets_its_answer(kind, chat: bool, stream: bool):
    async def test():
        async with together(kind) as (client, _, _):
            text, _ = await ask(client, "What is a token?", 7, chat=chat, stream=stream)
            assert text == words(7)

    run(test())


@kinds
def test_of_many_requests_at_once_each_gets_its_own_tokens_once(kind):
    async def test():
        async with together(kind) as (client, _, _):
            asked = [(f"{n:03d} " * (5 + 7 * n), 1 + n % 13) for n in range(40)]
            answers = await asyncio.gather(
                *(ask(client, text, n, chat=False, stream=bool(i % 2)) for i, (text, n) in enumerate(asked))
            )
            assert [text for text, _ in answers] == [words(n) for _, n in asked]
            assert len({mark for _, mark in answers}) == len(asked)

    run(test())


@kinds
def test_a_client_that_leaves_takes_its_request_along(kind):
    async def test():
        async with together(kind) as (client, _, _):
            stream = await client.completions.create(model="tiny", prompt="x", max_tokens=5000, stream=True)
            async for _ in stream:
                break
            await stream.close()

    run(test())


@kinds
def test_an_engine_that_fails_some_requests_loses_none_of_them(kind):
    async def test():
        async with together(kind, "round-robin") as (client, _, emulator):
            emulator.instances[0].fault = Fault("error_rate", rate=1.0, status=503)
            answers = await asyncio.gather(
                *(ask(client, f"{n} " * 20, 5, chat=False, stream=True) for n in range(12))
            )
            assert [text for text, _ in answers] == [words(5)] * 12
            emulator.instances[0].fault = None

    run(test())


@pytest.mark.parametrize("kind", [KINDS["vllm P/D"], KINDS["sglang P/D"]], ids=["vllm", "sglang"])
def test_samples_of_prompts_are_each_computed_once_where_prefill_and_decode_are_apart(kind):
    async def test():
        async with together(kind) as (client, _, _):
            options = {"model": "tiny", "prompt": ["a b c", "d e"], "n": 2, "max_tokens": 5}
            answer = await client.completions.create(**options)
            assert [(c.index, c.text) for c in answer.choices] == [(n, words(5)) for n in range(4)]
            assert answer.usage.completion_tokens == 20
            more = {"stream": True, "stream_options": {"include_usage": True}}
            texts, ids, usage = {}, set(), []
            async for chunk in await client.completions.create(**options, **more):
                ids.add(chunk.id)
                usage += [chunk.usage] if chunk.usage else []
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + choice.text
            assert texts == dict.fromkeys(range(4), words(5)) and len(ids) == 1
            assert [each.completion_tokens for each in usage] == [20]
            assert usage[0].prompt_tokens == answer.usage.prompt_tokens
            chat = [{"role": "user", "content": "x"}]
            answer = await client.chat.completions.create(model="tiny", messages=chat, n=3, max_tokens=4)
            assert [c.message.content for c in answer.choices] == [words(4)] * 3

    run(test())


def test_an_error_is_the_clients_own_exception():
    async def test():
        async with together(KINDS["vllm"]) as (client, _, _):
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.completions.create(model="huge", prompt="x")
            assert unknown.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError):
                await client.completions.create(model="tiny", prompt="x", max_tokens=0)

    run(test())


def test_models_and_embeddings():
    async def test():
        async with together(KINDS["vllm"]) as (client, _, _):
            assert [model.id async for model in client.models.list()] == ["tiny"]
            made = await client.embeddings.create(model="tiny", input=["a", "b"], encoding_format="float")
            assert len(made.data) == 2 and made.data[0].embedding != made.data[1].embedding

    run(test())
