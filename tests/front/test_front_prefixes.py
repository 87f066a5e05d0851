"""Which prompts begin alike, and that the policies that care are told."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standins import StandIn, chat, gateway, run

from headway.core.events import Arrived
from headway.front.prefixes import BLOCK_BYTES, BLOCK_IDS, MOST_BLOCKS
from headway.front.requests import read_call

LONG = "once upon a time " * 400  # 6,800 bytes


def hashes(body, path="/v1/chat/completions"):
    return read_call(path, json.dumps(body).encode()).prefix


def talk(*turns, **more):
    return {"model": "m", "messages": [{"role": r, "content": c} for r, c in turns], **more}


def text(prompt, model="m"):
    return hashes({"model": model, "prompt": prompt}, "/v1/completions")


def shared(one, other):
    """How many blocks two prompts have in common; none that are equal follow one that is not."""
    equal = [a == b for a, b in zip(one, other, strict=False)]
    assert equal == sorted(equal, reverse=True)
    return sum(equal)


@given(st.binary(max_size=6 * BLOCK_BYTES), st.integers(0, 6 * BLOCK_BYTES), st.binary(max_size=BLOCK_BYTES))
def test_prompts_share_the_full_blocks_that_begin_alike(data, at, other):
    one = data.decode("latin-1").encode("ascii", "replace").decode()
    two = one[:at] + other.decode("latin-1").encode("ascii", "replace").decode()
    alike = next(
        (n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
    # The role of a text completion is empty, and ends with one byte.
    assert shared(text(one), text(two)) == (alike + 1) // BLOCK_BYTES


def test_the_next_turn_of_a_talk_begins_as_the_last():
    last = talk(("system", LONG), ("user", "hello"))
    following = talk(("system", LONG), ("user", "hello"), ("assistant", LONG), ("user", "go on"))
    assert len(hashes(last)) == 6
    assert shared(hashes(last), hashes(following)) == 6


@pytest.mark.parametrize(
    "other",
    [
        talk(("user", LONG)),
        talk(("system", LONG)) | {"model": "another"},
        talk(("system", LONG), tools=[{"type": "function", "function": {"name": "f"}}]),
        talk(("system", "x" + LONG)),
    ],
)
def test_another_model_role_tool_or_beginning_shares_nothing(other):
    assert shared(hashes(talk(("system", LONG))), hashes(other)) == 0


def test_a_role_ends_where_the_next_begins():
    assert shared(hashes(talk(("user", LONG), ("user", LONG))), hashes(talk(("user", LONG + LONG)))) == 6


def test_what_was_called_counts_too():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": LONG}}
    calls = [{"role": "assistant", "content": None, "tool_calls": [call | {"id": name}]} for name in "ab"]
    one, two = [hashes({"model": "m", "messages": [each]}) for each in calls]
    assert len(one) == 6 and shared(one, two) == 0


def test_behind_an_image_nothing_is_alike_for_sure():
    image = {"type": "image_url", "image_url": {"url": "data:,x"}}
    parts = [{"type": "text", "text": LONG}, image, {"type": "text", "text": LONG}]
    assert len(hashes({"model": "m", "messages": [{"role": "user", "content": parts}]})) == 6


def test_token_ids_are_told_by_the_token():
    ids = list(range(3 * BLOCK_IDS + 5))
    assert len(text(ids)) == 3
    assert shared(text(ids), text(ids[: 2 * BLOCK_IDS] + ids)) == 2


def test_several_prompts_are_not_one():
    assert text([LONG, LONG]) == () == text([[1] * 999, [2] * 999])


def test_of_a_huge_prompt_the_beginning_is_enough():
    assert len(text("x" * (2 * MOST_BLOCKS * BLOCK_BYTES))) == MOST_BLOCKS
    assert len(text([7] * (2 * MOST_BLOCKS * BLOCK_IDS))) == MOST_BLOCKS


def test_a_block_has_its_share_of_the_prompts_tokens():
    call = read_call("/v1/completions", json.dumps({"prompt": "x" * 4 * BLOCK_BYTES}).encode())
    assert call.block_tokens(1000) == 250
    assert read_call("/v1/completions", b'{"prompt":"x"}').prefix == ()


@pytest.mark.parametrize(("policy", "told"), [("staggered", True), ("least-tokens", False)])
def test_only_a_policy_that_looks_at_prefixes_is_told(policy, told):
    async def check():
        async with StandIn() as engine, gateway([engine], policy) as (front, client):
            seen = []
            front.driver._observers += (lambda now, event, actions: seen.append(event),)
            await chat(client, talk(("system", LONG)) | {"model": "tiny"})
            (request,) = [event.request for event in seen if isinstance(event, Arrived)]
            assert bool(request.prefix) == told and bool(request.prefix_block_tokens) == told

    run(check())


def test_a_talk_goes_back_to_the_rank_that_has_its_beginning():
    async def check():
        async with StandIn() as engine:
            shape = {"ranks": 4, "chunk_tokens": 8192}
            async with gateway([engine], "staggered", instance=shape) as (_, client):
                bodies = [
                    talk(("system", f"{n} {LONG}"), ("user", "a")) | {"model": "tiny"} for n in range(4)
                ]
                for body in bodies:  # spread over the ranks, for they come in one pass
                    body["max_tokens"] = 1
                engine.go.clear()
                first = [asyncio.create_task(chat(client, body)) for body in bodies]
                while len(engine.requests) < 4:
                    await asyncio.sleep(0.002)
                engine.go.set()
                await asyncio.gather(*first)
                for body in reversed(bodies):
                    body["messages"].append({"role": "user", "content": "b"})
                    await chat(client, body)
            ranks = {}
            for _, headers, body in engine.requests:
                ranks.setdefault(body["messages"][0]["content"], []).append(headers["X-data-parallel-rank"])
            assert all(before == after for before, after in ranks.values())
            assert len({before for before, _ in ranks.values()}) > 1

    run(check())
