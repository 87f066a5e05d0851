"""Prefill and decode apart: vLLM's way (one after the other) and SGLang's (both at once), and DP ranks."""

import asyncio
import json

import pytest
from standins import CHAT, DONE, EVENT, USAGE, StandIn, chat, gateway, pools, run, running, until

from headway.core.cluster.paired import Paired

PARAMS = {"remote_engine_id": "e-1", "remote_block_ids": [1, 2], "remote_host": "h", "remote_port": 5}


def config(prefill, decode, dialect="vllm", policy="least-requests", **more):
    def named(role, engines):
        extra = {"bootstrap_port": 8998} if dialect == "sglang" and role == "prefill" else {}
        return [
            {"name": f"{role}-{n}", "url": e.url, "role": role, "dialect": dialect} | extra
            for n, e in enumerate(engines)
        ]

    return {
        "server": {"port": 0},
        "instances": named("prefill", prefill) + named("decode", decode),
        "policy": {"cluster": policy},
        "health": {"interval_s": 0.02},
    } | more


def test_vllm_prefill_then_decode_with_the_kv_handed_over():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            prefill.extra = {"kv_transfer_params": PARAMS}
            async with running(config([prefill], [decode], policy="staggered")) as (_, client):
                body = CHAT | {
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "max_tokens": 50,
                    "seed": 3,
                }
                status, _, answer = await chat(client, body)
                assert (status, answer) == (200, EVENT + EVENT + USAGE + DONE), answer
            (_, first_headers, first), (_, second_headers, second) = prefill.requests[0], decode.requests[0]
            assert (first["max_tokens"], first["stream"], first["seed"]) == (1, False, 3)
            assert first["stream_options"] is None and first["messages"] == CHAT["messages"]
            assert first["kv_transfer_params"]["do_remote_decode"] is True
            assert second == body | {"kv_transfer_params": PARAMS}
            assert first_headers["x-request-id"] == second_headers["x-request-id"]
            assert first_headers["x-headway-dispatch"] == second_headers["x-headway-dispatch"] == "1"

    run(check())


def test_decode_is_placed_when_the_prefill_is_done_not_before():
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode])) as (front, client),
        ):
            prefill.go.clear()
            task = asyncio.create_task(chat(client))
            await until(lambda: prefill.requests)
            in_prefill, in_decode = pools(front)
            assert in_prefill.ledger.placements and not in_decode.ledger.placements
            prefill.go.set()
            assert (await task)[0] == 200

    run(check())


def test_a_failed_decode_starts_again_from_the_prompt():
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as bad,
            StandIn() as good,
            running(config([prefill], [bad, good])) as (_, client),
        ):
            bad.status = 500
            assert (await chat(client))[0] == 200
            assert (len(prefill.requests), len(bad.requests), len(good.requests)) == (2, 1, 1)

    run(check())


def test_kv_that_waited_too_long_for_a_decode_engine_is_computed_again():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            data = config([prefill], [decode], limits={"kv_lease_s": 0.02})
            async with running(data) as (front, client):
                prefill.extra = {"kv_transfer_params": PARAMS}
                front.workers.drain("decode-0")
                task = asyncio.create_task(chat(client))
                await until(lambda: len(front.driver.held()) == 1 and prefill.requests)
                held_s = asyncio.get_running_loop().time()
                await until(lambda: asyncio.get_running_loop().time() > held_s + 0.03)
                assert not decode.requests
                prefill.extra = {"kv_transfer_params": PARAMS | {"remote_block_ids": [3]}}
                front.workers.undrain("decode-0")
                assert (await task)[0] == 200
            ((_, _, body),) = decode.requests
            assert body["kv_transfer_params"]["remote_block_ids"] == [3]
            assert len(prefill.requests) == 2

    run(check())


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_a_client_that_goes_away_in_its_prefill_is_gone_everywhere(dialect):
    async def check():
        async with (
            StandIn() as prefill,
            StandIn() as decode,
            running(config([prefill], [decode], dialect)) as (front, client),
        ):
            prefill.go.clear()
            decode.go.clear()
            task = asyncio.create_task(chat(client))
            await until(lambda: prefill.requests and (dialect == "vllm" or decode.requests))
            task.cancel()
            await until(lambda: prefill.aborted == 1)
            await until(lambda: not front.driver.requests)
            assert decode.under_way == 0

    run(check())


def test_sglang_gets_both_legs_at_once_joined_by_a_room():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            async with running(config([prefill], [decode], "sglang", "staggered")) as (front, client):
                assert isinstance(front.driver._policy.groups[0].policy, Paired)
                prefill.go.clear()
                decode.go.clear()
                task = asyncio.create_task(chat(client, stream=True))
                await until(lambda: prefill.requests and decode.requests)
                prefill.go.set()
                decode.go.set()
                status, _, answer = await task
                assert (status, answer) == (200, EVENT + EVENT + USAGE + DONE), answer
            first, second = prefill.requests[0][2], decode.requests[0][2]
            assert first == second
            assert (first["bootstrap_host"], first["bootstrap_port"]) == ("127.0.0.1", 8998)
            assert 0 <= first["bootstrap_room"] < 1 << 63

    run(check())


@pytest.mark.parametrize("failing", ["prefill", "decode"])
def test_sglangs_legs_die_together_and_go_elsewhere(failing):
    async def check():
        async with (
            StandIn() as p0,
            StandIn() as p1,
            StandIn() as d0,
            StandIn() as d1,
            running(config([p0, p1], [d0, d1], "sglang")) as (_, client),
        ):
            bad, partner = (p0, d0) if failing == "prefill" else (d0, p0)
            bad.status = 500
            partner.go.clear()
            assert (await chat(client))[0] == 200
            assert len(bad.requests) == 1
            await until(lambda: partner.under_way == 0, "the partner's end")
            assert partner.aborted == 1

    run(check())


def test_ranks_by_header_by_port_and_in_sglangs_body():
    async def by_header():
        async with StandIn() as engine, gateway([engine], instance={"ranks": 2}) as (_, client):
            await chat(client)
            assert (await chat(client, headers={"X-data-parallel-rank": "1"}))[0] == 400
            await chat(client)
            assert [headers["X-data-parallel-rank"] for _, headers, _ in engine.requests] == ["0", "1"]

    async def in_body():
        instance = {"ranks": 2, "dialect": "sglang"}
        async with StandIn() as engine, gateway([engine], instance=instance) as (_, client):
            await chat(client)
            await chat(client)
            assert [(b["data_parallel_rank"], b["routed_dp_rank"]) for _, _, b in engine.requests] == [
                (0, 0),
                (1, 1),
            ]

    async def by_port():
        async with StandIn() as low, StandIn() as high:
            if high.port != low.port + 1:
                await high._site.stop()
                try:
                    await high._listen(low.port + 1)
                except OSError:
                    pytest.skip("the next port is taken")
            async with gateway([low], instance={"ranks": 2, "rank_by": "port"}) as (_, client):
                await chat(client)
                await chat(client)
                assert (len(low.requests), len(high.requests)) == (1, 1)
                assert "X-data-parallel-rank" not in low.requests[0][1]

    run(by_header())
    run(in_body())
    run(by_port())


def test_a_decode_rank_is_told_where_its_prefill_is():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            data = config([prefill], [decode], "sglang", "round-robin")
            data["instances"] = [each | {"ranks": 4} for each in data["instances"]]
            async with running(data) as (_, client):
                for _ in range(3):
                    await chat(client)
            for number in range(3):
                first, second = prefill.requests[number][2], decode.requests[number][2]
                assert first["data_parallel_rank"] == second["disagg_prefill_dp_rank"] == number
                assert first["bootstrap_room"] % 4 == number

    run(check())


def test_an_error_of_the_prefill_is_the_clients_answer():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            limits = {"retries": 0}
            async with running(config([prefill], [decode], limits=limits)) as (_, client):
                prefill.status = 500
                status, _, body = await chat(client)
                assert (status, json.loads(body)) == (500, {"error": {"message": "no"}})
                assert not decode.requests

    run(check())


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
def test_of_two_silent_legs_the_engine_that_answers_others_is_not_to_blame(dialect):
    async def check():
        limits = {"answer_timeout_s": 0.3, "retries": 0}
        async with StandIn() as prefill, StandIn() as hung, StandIn() as good:
            data = config([prefill], [hung, good], dialect, "round-robin", limits=limits)
            async with running(data) as (front, client):
                hung.go.clear()
                if dialect == "sglang":  # its prefill waits for its decode
                    waits, prefill.go = prefill.go, hung.go
                stuck = asyncio.create_task(chat(client))
                await until(lambda: hung.requests and prefill.requests)
                if dialect == "sglang":
                    prefill.go = waits
                assert (await chat(client))[0] == 200
                assert good.requests and len(hung.requests) == 1
                assert (await stuck)[0] == 504
                errors = {worker.name: worker.health.failures for worker in front.workers}
                assert errors == {"prefill-0": 0, "decode-0": 1, "decode-1": 0}

    run(check())
