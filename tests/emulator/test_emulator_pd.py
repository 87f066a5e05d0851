"""Prefill and decode apart, in vLLM's way (one after the other) and SGLang's (both at once)."""

import asyncio
import json

import pytest
from emulated import completion, disaggregated, events_of, running, until

from headway.core.events import PassEnded
from headway.wire import Subscriber

KEEP = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
PROMPT = "x" * 400  # 100 tokens


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_vllm_prefill_hands_over_what_decode_pulls():
    async def scenario():
        heard = []
        async with running(disaggregated()) as (emulator, session):
            prefill, decode = emulator.endpoints
            _, answer = await completion(session, prefill.url, PROMPT, 1, kv_transfer_params=KEEP)
            params = answer["kv_transfer_params"]
            assert params["do_remote_prefill"] is True
            assert params["remote_port"] == int(prefill.url.rpartition(":")[2])
            assert len(params["remote_block_ids"]) == 7
            async with Subscriber(decode.events, decode.snapshots, heard.append):
                await until(lambda: len(heard) >= 2)
                status, answer = await completion(session, decode.url, PROMPT, 5, kv_transfer_params=params)
            assert (status, answer["choices"][0]["text"]) == (200, "tok0 tok1 tok2 tok3 tok4")
            assert (await completion(session, decode.url, PROMPT, 5, kv_transfer_params=params))[0] == 500
        passes = [event for event in heard if isinstance(event, PassEnded)]
        assert [sum(passed.ran_tokens) for passed in passes] == [0] * len(passes)  # nothing is computed again

    run(scenario)


def test_the_decode_leg_streams_the_first_token_with_the_kv():
    async def scenario():
        async with running(disaggregated()) as (emulator, session):
            prefill, decode = emulator.endpoints
            for tokens in (1, 2, 6):
                _, answer = await completion(session, prefill.url, PROMPT, 1, kv_transfer_params=KEEP)
                body = {"prompt": PROMPT, "max_tokens": tokens, "stream": True}
                body["kv_transfer_params"] = answer["kv_transfer_params"]
                async with session.post(decode.url + "/v1/completions", json=body) as response:
                    *chunks, _ = await events_of(response)
                texts = [json.loads(chunk)["choices"][0]["text"] for chunk in chunks]
                assert texts == ["tok0", *[f" tok{i}" for i in range(1, tokens)]]

    run(scenario)


def test_a_transfer_takes_time():
    async def scenario():
        async with running(disaggregated(), speed=0.5) as (emulator, session):
            prefill, decode = emulator.endpoints
            _, answer = await completion(session, prefill.url, PROMPT, 1, kv_transfer_params=KEEP)
            started_s = asyncio.get_running_loop().time()
            params = answer["kv_transfer_params"]
            await completion(session, decode.url, PROMPT, 1, kv_transfer_params=params)
            assert asyncio.get_running_loop().time() - started_s >= 0.0399  # 20 ms at half speed

    run(scenario)


def test_a_decode_engine_computes_a_prompt_it_was_not_handed():
    async def scenario():
        async with running(disaggregated()) as (emulator, session):
            status, answer = await completion(session, emulator.endpoints[1].url, PROMPT, 3)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 3)

    run(scenario)


def room(emulator, number=2**62):
    return {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": emulator.endpoints[0].bootstrap_port,
        "bootstrap_room": number,
    }


def test_sglang_legs_meet_in_their_room():
    async def scenario():
        async with running(disaggregated(), dialect="sglang") as (emulator, session):
            prefill, decode = emulator.endpoints
            meeting = room(emulator)
            decoding = asyncio.create_task(completion(session, decode.url, PROMPT, 4, **meeting))
            prefilling = asyncio.create_task(completion(session, prefill.url, PROMPT, 4, **meeting))
            status, answer = await decoding
            assert (status, answer["choices"][0]["text"]) == (200, "tok0 tok1 tok2 tok3")
            assert (await prefilling)[1]["usage"]["completion_tokens"] == 1
            assert len(emulator.rooms) == 0
            meeting["bootstrap_port"] = None  # the only prefill instance there is
            answers = await asyncio.gather(
                *[completion(session, leg.url, PROMPT, 4, **meeting) for leg in emulator.endpoints]
            )
            assert [status for status, _ in answers] == [200, 200]

    run(scenario)


@pytest.mark.parametrize("leg", [0, 1])
def test_a_leg_without_its_partner_fails_after_the_timeout(leg):
    async def scenario():
        async with running(disaggregated(), dialect="sglang", bootstrap_timeout_s=0.05) as (
            emulator,
            session,
        ):
            url = emulator.endpoints[leg].url
            status, answer = await completion(session, url, PROMPT, 4, **room(emulator))
            assert status == 500
            assert "never came within 0.05 s" in answer["error"]["message"]

    run(scenario)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_leg_that_is_aborted_takes_the_other_along(gone):
    async def scenario():
        options = {"dialect": "sglang", "pair_abort_s": 0.05, "speed": 0.05}
        async with running(disaggregated(), **options) as (emulator, session):
            urls = [endpoint.url for endpoint in emulator.endpoints]
            legs = [
                asyncio.create_task(completion(session, url, PROMPT, 4, **room(emulator))) for url in urls
            ]
            await until(lambda: emulator.instance("prefill-0").requests == 1)
            legs[gone].cancel()
            status, answer = await legs[1 - gone]
            assert status == 500
            assert "the other leg was aborted" in answer["error"]["message"]
            await until(lambda: not len(emulator.rooms))
            assert [instance.requests for instance in emulator.instances] == [0, 0]

    run(scenario)
