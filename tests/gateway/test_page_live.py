"""What the page is told, and who is told: without a browser."""

import asyncio
import json

import aiohttp
import pytest
from standins import StandIn, chat, error_of, gateway, run, until

from headway.core.actions import Dispatch, Reject
from headway.core.events import (
    Arrived,
    Cancelled,
    Failed,
    Finished,
    InstanceDown,
    InstanceUp,
    PassEnded,
    PrefillDone,
    Role,
    Snapshot,
)
from headway.core.request import Request, Slo
from headway.hosts.gateway import GatewayConfig
from headway.hosts.gateway.observer import MOST_DECISIONS, MOST_PASSES, Observer
from headway.hosts.gateway.page import MOST_VIEWERS, page_is_public

UP = InstanceUp("engine-0", Role.AGGREGATED, 2, 100)


def request(name, at_s=0.0):
    return Request(name, at_s, 50, Slo(1.0, 0.1), 0, None)


async def tellings(answer, many=1):
    """The JSON objects of a stream of server-sent events."""
    told = []
    async for line in answer.content:
        if line.startswith(b"data: "):
            told.append(json.loads(line[6:]))
            if len(told) == many:
                return told
    raise AssertionError("the stream ended")


async def look(client, headers=None):
    async with client.get("/admin/live", headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["Content-Type"] == "text/event-stream"
        return (await tellings(answer))[0]


class TestObserver:
    def test_a_request_is_remembered_until_it_is_over(self):
        seen = Observer()
        for name, end in (
            ("a", Finished("a", 3)),
            ("b", Cancelled("b")),
            ("c", Failed("c", "x", retry=False)),
        ):
            seen.observe(1.0, Arrived(request(name)), [])
            seen.observe(1.1, PrefillDone(name), [])
            assert list(seen.requests) == [name]
            seen.observe(1.2, end, [])
            assert not seen.requests
        seen.observe(2.0, Arrived(request("d")), [])
        seen.observe(2.1, Failed("d", "engine", retry=True), [])
        assert list(seen.requests) == ["d"]
        seen.observe(3.0, Arrived(request("e")), [Reject("d", "held-too-long", 1.0)])
        assert list(seen.requests) == ["e"]

    def test_passes_and_decisions_are_bounded(self):
        seen = Observer()
        for number in range(MOST_PASSES + 10):
            seen.observe(number * 0.01, PassEnded("engine-0", 0, number, 0, 0.01, (1, 0)), [])
            seen.observe(number * 0.01, Arrived(request("r")), [Dispatch("r", "engine-0", 0, number)])
        assert len(seen.passes) == MOST_PASSES and len(seen.decisions) == MOST_DECISIONS
        assert seen.passes[-1].number == seen.decisions[-1].number == MOST_PASSES + 10

    def test_the_last_report_of_each_group_of_ranks_stands_until_the_instance_is_down(self):
        seen = Observer()
        seen.observe(0.0, UP, [])
        seen.observe(0.1, PassEnded("engine-0", 0, 1, 0, 0.1, (7,), running=(1,), first_rank=0), [])
        seen.observe(0.2, Snapshot("engine-0", 0, 2, 0, True, running=(4,), first_rank=1), [])
        assert [seen.loads["engine-0", rank].running for rank in (0, 1)] == [(1,), (4,)]
        seen.observe(0.3, InstanceDown("engine-0"), [])
        assert not seen.loads and seen.shapes == {"engine-0": UP}
        seen.keep([])
        assert not seen.shapes


def test_what_is_told_is_whole_once_and_news_afterwards():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            assert (await chat(client, stream=True))[0] == 200
            await until(lambda: not front.driver.requests and front._seen.passes)
            front.driver.feed(PassEnded("engine-0", 0, 9, 0, 0.25, (64,), queued_tokens=(3,)))
            async with client.get("/admin/live") as answer:
                (first,) = await tellings(answer)
                await chat(client, stream=True)
                (later,) = await tellings(answer)
            assert first["schema"] == "headway.live/1" and first["policy"] == "round-robin"
            assert (first["passes"][-1]["ran_tokens"], first["passes"][-1]["duration_s"]) == ([64], 0.25)
            assert [d["do"] for d in first["decisions"]] == ["Dispatch"]
            assert [d["do"] for d in later["decisions"]] == ["Dispatch"]
            assert first["passes"][-1] not in later["passes"]
            assert first["totals"] == {
                "arrived": 1,
                "served": 1,
                "refused": 0,
                "client_errors": 0,
                "failed": 0,
                "gone": 0,
            }
            (worker,) = first["workers"]
            assert (worker["state"], worker["takes_work"], worker["load"][0]["queued_tokens"]) == (
                "up",
                True,
                [3],
            )

    run(check())


def test_latencies_are_percentiles_against_the_targets():
    async def check():
        async with StandIn() as engine, gateway([engine], slo={"ttft_s": 9.0, "tpot_s": 1.0}) as (_, client):
            for headers in ({}, {}, {"x-slo-ttft-ms": "0.001"}, {}):
                await chat(client, stream=True, headers=headers)
            await chat(client)  # does not stream: its first byte tells nothing
            told = (await look(client))["latency"]
            assert told["ttft"]["requests"] == 4 and told["ttft"]["met"] == 0.75
            assert 0.0 < told["ttft"]["p50_s"] <= told["ttft"]["p90_s"] <= told["ttft"]["p99_s"] < 1.0
            assert (told["ttft"]["target_s"], told["tpot"]["target_s"]) == (9.0, 1.0)
            assert told["tpot"]["met"] == 1.0

    run(check())


def test_every_held_request_is_explained():
    async def check():
        async with StandIn() as engine, gateway([engine], slo={"ttft_s": 5.0}) as (front, client):
            front.workers.drain("engine-0")
            tasks = [asyncio.create_task(chat(client)) for _ in range(3)]
            await until(lambda: len(front.driver.held()) == 3)
            held = (await look(client))["held"]
            assert (held["requests"], held["in_policy"], held["reasons"]) == (
                3,
                3,
                {"no engine takes work": 3},
            )
            first = held["oldest"][0]
            assert first["prompt_tokens"] >= 1 and 0.0 <= first["held_s"] < 5.0
            assert first["held_s"] + first["left_s"] == pytest.approx(5.0, abs=0.05)
            assert "hello" not in json.dumps(held)  # nobody's prompt
            front.workers.undrain("engine-0")
            assert [(await task)[0] for task in tasks] == [200] * 3

    run(check())


def test_a_worker_that_is_gone_says_why():
    async def check():
        async with (
            StandIn() as engine,
            gateway([engine], health={"interval_s": 0.02, "eject_after": 1}) as (
                front,
                client,
            ),
        ):
            engine.healthy = False
            await until(lambda: front.workers.get("engine-0").state.value == "down")
            (worker,) = (await look(client))["workers"]
            assert (worker["state"], worker["takes_work"]) == ("down", False)
            assert "500" in worker["why"]

    run(check())


def test_the_files_may_load_nothing_from_elsewhere():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            for path, kind in (
                ("/", "text/html"),
                ("/app.js", "text/javascript"),
                ("/style.css", "text/css"),
            ):
                async with client.get(path) as answer:
                    assert answer.status == 200 and answer.headers["Content-Type"].startswith(kind)
                    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
                    text = (await answer.text()).replace("http://www.w3.org/2000/svg", "")
                    assert "http://" not in text and "https://" not in text and "//cdn" not in text

    run(check())


def test_the_data_is_behind_the_token_and_the_page_asks_for_it(monkeypatch):
    monkeypatch.setenv("OPERATORS", "secret")

    async def check():
        async with (
            StandIn() as engine,
            gateway([engine], admin={"port": 0, "token_env": "OPERATORS"}) as (
                front,
                public,
            ),
        ):
            assert front.page_url == f"{front.admin_url}/"
            assert (await chat(public, path="/"))[0] == 404  # it stands on the admin bind only
            async with aiohttp.ClientSession(front.admin_url) as client:
                async with client.get("/") as answer:
                    assert answer.status == 200 and 'data-token="needed"' in await answer.text()
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    async with client.get("/admin/live", headers=headers) as answer:
                        assert (answer.status, error_of(await answer.read())) == (401, "invalid_api_key")
                assert (await look(client, {"Authorization": "Bearer secret"}))["ready"]

    run(check())


def test_too_many_viewers_are_turned_away_and_those_who_leave_are_forgotten():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            open_pages = [await client.get("/admin/live") for _ in range(MOST_VIEWERS)]
            async with client.get("/admin/live") as answer:
                assert (answer.status, error_of(await answer.read())) == (503, "too_many_viewers")
            for page in open_pages:
                page.close()
            await until(lambda: front._page._viewers == 0)
            assert (await look(client))["ready"]

    run(check())


def test_open_pages_do_not_keep_a_gateway_from_stopping():
    async def check():
        async with (
            StandIn() as engine,
            gateway([engine]) as (front, client),
            client.get("/admin/live") as answer,
        ):
            await tellings(answer)
            assert await front.drain(1.0)
            await front.stop()
            with pytest.raises(AssertionError, match="ended"):
                await tellings(answer, 1000)

    run(check())


@pytest.mark.parametrize(
    "tables, public",
    [
        ({}, True),
        ({"server": {"host": "localhost"}}, True),
        ({"server": {"host": "::1"}}, True),
        ({"server": {"host": "0.0.0.0"}}, False),
        ({"server": {"host": "0.0.0.0"}, "admin": {"token_env": "OPERATORS"}}, True),
        ({"admin": {"port": 0}}, False),
    ],
)
def test_the_public_bind_shows_the_page_only_where_nobody_sees_it_who_may_not(tables, public):
    assert page_is_public(GatewayConfig.parse(tables)) is public


@pytest.mark.parametrize(
    ("engine_says", "counted_as"),
    [(400, "client_errors"), (404, "client_errors"), (422, "client_errors"), (500, "failed")],
)
def test_a_client_s_error_is_no_failure(engine_says, counted_as):
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"retries": 0}) as (front, client):
            engine.status = engine_says
            assert (await chat(client))[0] >= 400
            await until(lambda: not front.driver.requests)
            ended = {name: count for name, count in front._seen.totals.items() if count}
            assert ended == {"arrived": 1, counted_as: 1}

    run(check())
