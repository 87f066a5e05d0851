"""Engines come and go by URL, in `vllm-router`'s words."""

import asyncio
import json

import aiohttp
from standins import StandIn, chat, error_of, gateway, run, running, until

from headway.hosts.gateway.worker_api import instance_name

API = {"enabled": True}
UNKNOWABLE = ({"url": "http://a..b:80"}, {"url": f"http://{'a' * 64}:80"})  # no name server can be asked


async def call(client: aiohttp.ClientSession, method: str, path: str, **query: str) -> tuple[int, str]:
    async with client.request(method, path, params=query) as answer:
        return answer.status, await answer.text()


async def listed(client: aiohttp.ClientSession) -> list[str]:
    async with client.get("/list_workers") as answer:
        return (await answer.json())["urls"]


def test_a_worker_is_added_serves_and_is_removed():
    async def test():
        async with (
            StandIn() as first,
            StandIn() as second,
            gateway([first], worker_api=API) as (_, client),
        ):
            url = second.url
            assert await listed(client) == [first.url]
            added = await call(client, "POST", "/add_worker", url=url + "/")
            assert added == (200, f"Successfully added worker: {url}")
            assert await listed(client) == [first.url, url]
            for _ in range(2):
                assert (await chat(client))[0] == 200
            assert len(second.requests) == 1
            removed = await call(client, "POST", "/remove_worker", url=url)
            assert removed == (200, f"Successfully removed worker: {url}")
            assert await listed(client) == [first.url]
            again = await call(client, "POST", "/remove_worker", url=url)
            assert again == (200, f"There is no worker at {url}: nothing was removed.")

    run(test())


def test_a_worker_is_known_by_its_address_however_its_url_is_written():
    async def test():
        data = {"server": {"port": 0}, "worker_api": API, "instances": []}
        for name, url in (("a", "http://127.0.0.1/a"), ("b", "http://localhost:9")):
            data["instances"].append({"name": name, "role": "aggregated", "url": url})
        async with running(data) as (_, client):
            for url in ("http://127.0.0.1:80/a/", "http://LOCALHOST:9"):
                status, text = await call(client, "POST", "/add_worker", url=url)
                assert status == 400 and "already" in json.loads(text)["error"]["message"]
            for url in ("http://127.0.0.1:99999", "http://[::1"):
                assert (await call(client, "POST", "/remove_worker", url=url))[0] == 400
            assert len(await listed(client)) == 2
            assert (await call(client, "POST", "/remove_worker", url="http://127.0.0.1:80/a/"))[0] == 200
            assert await listed(client) == ["http://localhost:9"]
            assert (await call(client, "POST", "/remove_worker", url="http://LOCALHOST:9"))[0] == 200
            assert await listed(client) == []

    run(test())


def test_what_cannot_be_added_is_said_and_changes_nothing():
    async def test():
        async with StandIn() as engine, gateway([engine], worker_api=API) as (_, client):
            for query in ({}, {"url": engine.url}, {"url": "10.0.0.1:8000"}, {"url": "ftp://x"}, *UNKNOWABLE):
                status, text = await call(client, "POST", "/add_worker", **query)
                assert status == 400 and error_of(text)
            assert await listed(client) == [engine.url]

    run(test())


def test_the_ranks_of_an_engine_are_listed_one_by_one():
    async def test():
        async with (
            StandIn() as engine,
            gateway([engine], instance={"ranks": 2}, worker_api=API) as (_, client),
        ):
            assert await listed(client) == [f"{engine.url}@0", f"{engine.url}@1"]
            assert (await call(client, "POST", "/remove_worker", url=f"{engine.url}@1"))[0] == 200
            assert await listed(client) == []

    run(test())


def test_a_decode_engine_is_added_by_its_role():
    async def test():
        async with StandIn() as engine:
            data = {"server": {"port": 0}, "disaggregated": True, "worker_api": API}
            async with running(data) as (front, client):
                assert (await call(client, "POST", "/add_worker", url=engine.url))[0] == 400
                assert (await call(client, "POST", "/add_worker", url=engine.url, role="decode"))[0] == 200
                assert [worker.spec.role.value for worker in front.workers] == ["decode"]

    run(test())


def test_it_is_off_unless_configured_and_a_clients_key_does_not_open_it(monkeypatch):
    monkeypatch.setenv("KEYS", "sesame")
    key = {"Authorization": "Bearer sesame"}

    async def test():
        async with StandIn() as engine:
            async with gateway([engine]) as (_, client):
                assert (await call(client, "GET", "/list_workers"))[0] == 404
            async with (
                gateway([engine], worker_api=API, auth={"api_keys_env": "KEYS"}) as (_, client),
                client.get("/list_workers", headers=key) as answer,
            ):
                assert (answer.status, error_of(await answer.read())) == (403, "operator_token_needed")

    run(test())


def test_metrics_have_a_bind_of_their_own_with_nothing_else_on_it():
    async def test():
        async with StandIn() as engine, gateway([engine], metrics={"port": 0}) as (front, client):
            assert front.metrics_url != front.url
            for path, status in (("/metrics", 200), ("/health", 200), ("/v1/models", 404)):
                async with client.get(front.metrics_url + path) as answer:
                    assert answer.status == status

    run(test())


def test_other_sites_pages_cannot_add_a_worker():
    async def test():
        async with StandIn() as engine, gateway([], worker_api=API) as (front, client):
            for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
                query = {"url": engine.url}
                async with client.post("/add_worker", params=query, headers=headers) as answer:
                    assert (answer.status, error_of(await answer.read())) == (403, "other_site")
            assert not list(front.workers)

    run(test())


def test_names_are_made_of_urls():
    assert instance_name("http://[::1]:8000") == "::1-:8000"
    assert instance_name("http://user:secret@host:1/engines/a/") == "host:1-engines-a"


def test_workers_and_loads_are_listed_with_the_fields_other_routers_show():
    async def test():
        async with StandIn() as up, StandIn() as down, gateway([up, down], worker_api=API) as (front, client):
            down.healthy = False
            await until(lambda: not front.workers.named("engine-1").takes_work())
            up.go.clear()
            task = asyncio.create_task(chat(client))
            await until(lambda: up.requests)
            described = json.loads((await call(client, "GET", "/workers"))[1])
            assert (described["total"], described["stats"]["regular_count"]) == (2, 2)
            first = {"url": up.url, "model_id": "tiny", "worker_type": "regular"}
            assert described["workers"][0] == first | {"is_healthy": True, "load": 1}
            assert described["workers"][1]["is_healthy"] is False
            loads = json.loads((await call(client, "GET", "/get_loads"))[1])
            assert loads["workers"] == [{"worker": up.url, "load": 1}, {"worker": down.url, "load": 0}]
            up.go.set()
            assert (await task)[0] == 200

    run(test())
