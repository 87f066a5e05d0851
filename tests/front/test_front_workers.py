"""Engines that are added, drained, removed, ejected and taken back while the gateway runs."""

import asyncio
import json

import aiohttp
import pytest
from standins import CHAT, StandIn, chat, error_of, gateway, run, running, until

from headway.core.errors import ConfigError
from headway.core.events import InstanceDown, InstanceDraining, InstanceUp, Snapshot
from headway.front import admin as admin_side
from headway.front.scrape import Load, read_metrics
from headway.hosts.gateway import GatewayConfig


def watch(front):
    """Collect what the policy hears of instances."""
    heard = []
    kinds = (InstanceUp, InstanceDraining, InstanceDown, Snapshot)
    front.driver._observers += (lambda now, event, acts: isinstance(event, kinds) and heard.append(event),)
    return heard


def test_an_added_engine_gets_work_and_a_removed_one_none():
    async def check():
        async with StandIn() as old, StandIn() as new, gateway([old], admin={"port": 0}) as (front, client):
            async with aiohttp.ClientSession(front.admin_url) as admin:
                async with admin.post("/workers", json={"name": "new", "url": new.url}) as answer:
                    assert (answer.status, (await answer.json())["state"]) == (201, "up")
                async with admin.delete("/workers/engine-0") as answer:
                    assert answer.status == 200
                async with admin.get("/workers") as answer:
                    assert [worker["name"] for worker in await answer.json()] == ["new"]
            assert (await chat(client))[0] == 200
            assert new.requests and not old.requests

    run(check())


def test_a_removal_lets_streams_end_and_moves_what_has_no_byte():
    async def check():
        async with (
            StandIn() as old,
            StandIn() as new,
            gateway([old, new], "least-requests") as (front, client),
        ):
            old.more.clear()
            streaming = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            await streaming.content.readany()
            old.go.clear()
            new.go.clear()
            at_new = asyncio.create_task(chat(client))
            await until(lambda: new.requests)
            waiting = asyncio.create_task(chat(client))
            await until(lambda: len(old.requests) == 2)
            removal = asyncio.create_task(front.workers.remove("engine-0", timeout_s=0.05))
            await until(lambda: old.aborted == 1, "the withdrawal")
            await removal
            new.go.set()
            assert [(await task)[0] for task in (at_new, waiting)] == [200, 200]
            old.more.set()
            assert (await streaming.read()).endswith(b"data: [DONE]\n\n")

    run(check())


def test_an_engine_that_fails_its_checks_is_down_and_comes_back_in_a_new_epoch():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            heard = watch(front)
            engine.healthy = False
            await until(lambda: InstanceDown("engine-0") in heard)
            engine.healthy = True
            await until(lambda: isinstance(heard[-1], InstanceUp))
            assert heard[-1].epoch == 1
            assert (await chat(client))[0] == 200

    run(check())


def test_a_flapping_engine_must_pass_more_checks_each_time():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, _):
            worker = front.workers.named("engine-0")
            needed = []
            for _ in range(3):
                engine.healthy = False
                await until(lambda: worker.state.value == "down")
                engine.healthy = True
                await until(lambda: worker.state.value == "up")
                needed.append(worker.health.passed)
            assert needed == [1, 2, 4]

    run(check())


def test_an_engine_that_refuses_connections_gets_nothing_more_at_once():
    async def check():
        async with StandIn() as bad, StandIn() as good:
            health = {"interval_s": 30.0}
            async with gateway([bad, good], health=health) as (front, client):
                heard = watch(front)
                await bad.kill()
                assert [(await chat(client))[0] for _ in range(4)] == [200] * 4
                assert heard[0] == InstanceDraining("engine-0")
                await until(lambda: InstanceDown("engine-0") in heard)

    run(check())


def test_a_draining_engine_that_fails_stays_out_when_it_is_well_again():
    async def check():
        async with (
            StandIn() as engine,
            gateway([engine], limits={"queue_timeout_s": 0.05}) as (front, client),
        ):
            worker = front.workers.drain("engine-0")
            engine.healthy = False
            await until(lambda: worker.state.value == "down")
            engine.healthy = True
            await until(lambda: worker.state.value == "up")
            assert (await chat(client))[0] == 503 and not engine.requests

    run(check())


def test_a_reload_changes_the_workers_to_those_of_the_file():
    async def check():
        async with StandIn() as one, StandIn() as two, gateway([one]) as (front, client):
            kept = front.workers.named("engine-0")
            both = GatewayConfig.parse(
                {"instances": [{"name": "engine-0", "url": one.url}, {"name": "b", "url": two.url}]}
            )
            await front.reload(both)
            assert front.workers.named("engine-0") is kept and front.workers.get("b")
            await front.reload(GatewayConfig.parse({"instances": [{"name": "b", "url": two.url}]}))
            assert (await chat(client))[0] == 200
            assert two.requests and not one.requests

    run(check())


def test_a_reload_to_other_pools_changes_nothing():
    async def check():
        async with StandIn() as engine, StandIn() as other, gateway([engine]) as (front, client):
            pair = [
                {"name": role[0], "url": each.url, "role": role}
                for role, each in (("prefill", engine), ("decode", other))
            ]
            with pytest.raises(ConfigError, match="the cluster is aggregated"):
                await front.reload(GatewayConfig.parse({"instances": pair}))
            assert [worker.name for worker in front.workers] == ["engine-0"]
            assert (await chat(client))[0] == 200

    run(check())


def test_an_engine_is_not_added_a_second_time_under_another_name():
    async def check():
        async with StandIn() as engine, gateway([engine], admin=ADMIN) as (front, _):
            twin = {"name": "twin", "url": engine.url + "/"}
            async with (
                aiohttp.ClientSession(front.admin_url) as admin,
                admin.post("/workers", json=twin) as answer,
            ):
                assert answer.status == 400
                assert f"{engine.url} is the address of 'engine-0' already" in await answer.text()
            assert [worker.name for worker in front.workers] == ["engine-0"]

    run(check())


def test_a_reload_may_give_an_engine_another_name():
    async def check():
        async with StandIn() as engine, StandIn() as other, gateway([engine, other]) as (front, client):
            renamed = [{"name": "new", "url": engine.url}, {"name": "engine-1", "url": other.url}]
            await front.reload(GatewayConfig.parse({"instances": renamed}))
            assert sorted(worker.name for worker in front.workers) == ["engine-1", "new"]
            swapped = [{"name": "new", "url": other.url}, {"name": "engine-1", "url": engine.url}]
            await front.reload(GatewayConfig.parse({"instances": swapped}))
            assert {worker.name: worker.spec.url for worker in front.workers} == {
                "new": other.url,
                "engine-1": engine.url,
            }
            assert (await chat(client))[0] == 200

    run(check())


def test_a_reload_adds_the_new_before_it_waits_for_the_old():
    async def check():
        async with StandIn() as old, StandIn() as new, gateway([old]) as (front, client):
            old.go.clear()
            under_way = asyncio.create_task(chat(client))
            await until(lambda: old.requests)
            config = GatewayConfig.parse({"instances": [{"name": "new", "url": new.url}]})
            reload = asyncio.create_task(front.reload(config))
            await until(lambda: front.workers.named("engine-0").draining)
            assert (await chat(client))[0] == 200 and new.requests
            old.go.set()
            assert (await under_way)[0] == 200
            await reload
            assert [worker.name for worker in front.workers] == ["new"]

    run(check())


def test_a_changed_engine_is_added_anew_also_when_two_reloads_overlap():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, _):
            changed = {"name": "engine-0", "url": engine.url, "chunk_tokens": 100}
            config = GatewayConfig.parse({"instances": [changed]})
            await asyncio.gather(front.reload(config), front.reload(config))
            assert front.workers.named("engine-0").spec == config.instances[0]

    run(check())


ADMIN = {"port": 0}


def test_an_engine_is_watched_though_whoever_added_it_left():
    async def check():
        async with StandIn() as old, StandIn() as new, gateway([old], admin=ADMIN) as (front, _):
            new.answers_checks.clear()
            spec = {"name": "new", "url": new.url}
            async with aiohttp.ClientSession(front.admin_url) as admin:
                adding = asyncio.create_task(admin.post("/workers", json=spec))
                await until(lambda: front.workers.get("new"))
                adding.cancel()
                await asyncio.gather(adding, return_exceptions=True)
            await until(lambda: not front._listeners[1].connections)
            new.answers_checks.set()
            await until(lambda: front.workers.named("new").takes_work())
            new.healthy = False
            await until(lambda: front.workers.named("new").state.value == "down")

    run(check())


def test_an_engine_is_removed_though_whoever_removed_it_left():
    async def check():
        async with StandIn() as old, StandIn() as new, gateway([old, new], admin=ADMIN) as (front, client):
            old.go.clear()
            under_way = asyncio.create_task(chat(client))
            await until(lambda: old.requests)
            async with aiohttp.ClientSession(front.admin_url) as admin:
                removing = asyncio.create_task(admin.delete("/workers/engine-0"))
                await until(lambda: front.workers.named("engine-0").draining)
                removing.cancel()
                await asyncio.gather(removing, return_exceptions=True)
            await until(lambda: not front._listeners[1].connections)
            old.go.set()
            assert (await under_way)[0] == 200
            await until(lambda: b"engine-0" not in front.metrics.text())
            assert [worker.name for worker in front.workers] == ["engine-1"]

    run(check())


def test_an_engine_that_cannot_be_added_leaves_nothing_behind(monkeypatch):
    async def check():
        async with StandIn() as old, StandIn() as new, gateway([old], admin=ADMIN) as (front, _):
            spec = {"name": "new", "url": new.url}
            async with aiohttp.ClientSession(front.admin_url) as admin:
                with monkeypatch.context() as patched:
                    patched.setattr(front.workers, "_check", None)
                    async with admin.post("/workers", json=spec) as answer:
                        assert answer.status == 500
                assert front.workers.get("new") is None
                async with admin.post("/workers", json=spec) as answer:
                    assert answer.status == 201

    run(check())


def test_an_engine_removed_during_its_first_check_does_not_come_up_afterwards():
    async def check():
        async with StandIn() as old, StandIn() as new, gateway([old]) as (front, _):
            heard = watch(front)
            new.answers_checks.clear()
            config = GatewayConfig.parse({"instances": [{"name": "new", "url": new.url}]})
            adding = asyncio.create_task(front.workers.add(config.instances[0]))
            await until(lambda: front.workers.get("new"))
            await front.workers.remove("new")
            new.answers_checks.set()
            assert (await adding).state.value == "down"
            assert heard == []

    run(check())


def test_other_sites_pages_cannot_steer_a_gateway_without_a_token(monkeypatch):
    monkeypatch.setenv("ADMIN", "secret")

    async def check():
        async with StandIn() as engine, gateway([engine], admin=ADMIN) as (front, _):
            own = front.admin_url.removeprefix("http://")
            port = own.partition(":")[2]
            calls = [
                ({"Origin": f"http://{own}"}, 200),
                ({"Host": f"localhost:{port}"}, 200),
                ({"Origin": "http://evil.example"}, 403),
                ({"Origin": "null"}, 403),
                ({"Origin": f"http://127.0.0.1:{port}0"}, 403),
                ({"Origin": "http://["}, 403),
                ({"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}, 403),
                ({"Host": f"evil.example:{port}"}, 403),
            ]
            async with aiohttp.ClientSession(front.admin_url) as admin:
                for headers, status in calls:
                    async with admin.post("/workers/engine-0/undrain", headers=headers) as answer:
                        assert answer.status == status, headers
                async with admin.get("/admin/live", headers={"Origin": "http://evil.example"}) as answer:
                    assert (answer.status, error_of(await answer.read())) == (403, "other_site")
        with_token = {"port": 0, "token_env": "ADMIN"}
        async with StandIn() as engine, gateway([engine], admin=with_token) as (front, _):
            headers = {"Authorization": "Bearer secret", "Origin": "http://ops.example", "Host": "ops"}
            async with aiohttp.ClientSession(front.admin_url, headers=headers) as admin:
                answer = await admin.get("/workers")  # behind a proxy of theirs
                assert len(await answer.json()) == 1

    run(check())


def test_a_worker_is_added_by_what_says_it_is_json():
    async def check():
        async with StandIn() as engine, StandIn() as other, gateway([engine], admin=ADMIN) as (front, _):
            spec = json.dumps({"name": "new", "url": other.url})
            async with aiohttp.ClientSession(front.admin_url) as admin:
                for kind, status in (("text/plain", 415), ("application/json; charset=utf-8", 201)):
                    async with admin.post("/workers", data=spec, headers={"Content-Type": kind}) as answer:
                        assert answer.status == status

    run(check())


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(admin_side, "BODY_S", 0.02)

    async def check():
        async with StandIn() as engine, gateway([engine], admin=ADMIN) as (front, _):
            reader, writer = await asyncio.open_connection(
                *front.admin_url.removeprefix("http://").split(":")
            )
            writer.write(
                b"POST /workers HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 9\r\n\r\n{"
            )
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
            writer.close()
            await writer.wait_closed()

    run(check())


def test_the_admin_side_wants_its_token_and_says_what_is_wrong(monkeypatch):
    monkeypatch.setenv("ADMIN", "secret")

    async def check():
        admin = {"port": 0, "token_env": "ADMIN"}
        async with StandIn() as engine, gateway([engine], admin=admin) as (front, client):
            async with client.get("/workers") as answer:
                assert answer.status == 404  # not on the public side
            token = {"Authorization": "Bearer secret"}
            async with aiohttp.ClientSession(front.admin_url) as session:
                async with session.get("/workers") as answer:
                    assert (answer.status, error_of(await answer.read())) == (401, "invalid_api_key")
                for data in (
                    {"name": "x"},
                    {"name": "x", "ulr": engine.url},
                    {"name": "engine-0", "url": engine.url},
                ):
                    async with session.post("/workers", json=data, headers=token) as answer:
                        assert (answer.status, error_of(await answer.read())) == (400, "bad_worker"), data
                async with session.delete("/workers/nobody", headers=token) as answer:
                    assert (answer.status, error_of(await answer.read())) == (404, "unknown_worker")
                async with session.get("/held", headers=token) as answer:
                    assert await answer.json() == []

    run(check())


METRICS = """# HELP vllm:num_requests_running running
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.5
"""


def test_a_poll_is_answered_by_what_the_engine_publishes():
    async def check():
        instance = {"kv_blocks": 1000}
        async with StandIn() as engine, gateway([engine], instance=instance) as (front, _):
            engine.metrics = METRICS
            heard = watch(front)
            front.workers.poll("engine-0")
            await until(lambda: heard)
            told = heard[0]
            assert (told.running, told.waiting, told.kv_blocks, told.queued_tokens) == (
                (3,),
                (2,),
                (500,),
                None,
            )

    run(check())


def test_ranks_that_contradict_the_configuration_are_logged_once(caplog):
    async def check():
        async with (
            StandIn() as engine,
            gateway([engine], inference={"scrape_interval_s": 0.01}) as (front, _),
        ):
            engine.metrics = METRICS + METRICS.replace('engine="0"', 'engine="1"')
            heard = watch(front)
            await until(lambda: len(heard) > 3)
            assert heard[-1].running == (6,)
        lines = [record for record in caplog.records if record.message == "engine's ranks"]
        assert [line.reason for line in lines] == [
            "its metrics are of ranks 0, 1, configured is ranks = 1: taken as one, their sum"
        ]

    run(check())


def test_ranks_that_contradict_the_configuration_are_logged_once_though_metrics_are_missing_between(caplog):
    async def check():
        async with (
            StandIn() as engine,
            gateway([engine], inference={"scrape_interval_s": 0.01}) as (front, _),
        ):
            heard = watch(front)
            as_one = METRICS + METRICS.replace('engine="0"', 'engine="1"')
            for metrics in (as_one, "", as_one, "", as_one):
                engine.metrics = metrics
                seen = len(heard)
                await until(lambda seen=seen: len(heard) > seen + 2)
        assert len([record for record in caplog.records if record.message == "engine's ranks"]) == 1

    run(check())


NONSENSE = """vllm:num_requests_running{engine="0"} NaN
vllm:num_requests_waiting{engine="0"} +Inf
vllm:kv_cache_usage_perc{engine="0"} -inf
"""


def test_numbers_that_are_none_count_as_not_told():
    assert read_metrics(NONSENSE, 1) == Load()
    assert read_metrics(METRICS + NONSENSE, 1) == read_metrics(METRICS, 1)


@pytest.mark.parametrize("number", ["NaN", "1e308"])
def test_nonsense_in_its_metrics_does_not_end_the_watch_over_an_engine(number, caplog):
    async def check():
        tables = {"instance": {"kv_blocks": 1000}, "inference": {"scrape_interval_s": 0.01}}
        async with StandIn() as engine, gateway([engine], **tables) as (front, _):
            worker = front.workers.named("engine-0")
            engine.metrics = METRICS.replace("0.5", number)
            for _ in range(2):
                scraped = engine.scraped
                await until(lambda before=scraped: engine.scraped > before + 1)
            engine.healthy = False
            await until(lambda: worker.state.value == "down")

    run(check())
    failed = [record for record in caplog.records if record.message == "a look at an engine failed"]
    assert [bool(record.exc_info) for record in failed] == ([True] if number == "1e308" else [])


def test_an_engine_that_is_not_there_yet_is_waited_for():
    async def check():
        async with StandIn() as engine:
            engine.healthy = False
            async with gateway([engine]) as (front, client):
                assert not front.workers.ready()
                task = asyncio.create_task(chat(client))
                await until(lambda: len(front.driver.held()) == 1)
                engine.healthy = True
                assert (await task)[0] == 200

    run(check())


def test_without_any_instance_it_starts_and_is_not_ready():
    async def check():
        async with running({"server": {"port": 0}}) as (front, client):
            async with client.get("/ready") as answer:
                assert answer.status == 503
            with pytest.raises(Exception, match="did you mean 'engine'"):
                async with StandIn() as engine:
                    await front.workers.add(
                        GatewayConfig.parse({"instances": [{"name": "engine", "url": engine.url}]}).instances[
                            0
                        ]
                    )
                    front.workers.named("engin")

    run(check())
