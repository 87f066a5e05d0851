"""Several models behind one gateway: each request reaches an engine that has its model."""

import asyncio
import json
import time
from collections import Counter

import pytest
from standins import StandIn, chat, gateway, run, until

import headway.front.workers as workers
from headway.hosts.gateway.passthrough import _form_model

BASE = {"id": "base", "object": "model", "owned_by": "vllm", "root": "/m/base", "max_model_len": 1000}
SQL = {"id": "sql", "object": "model", "owned_by": "vllm", "root": "/l/sql", "parent": "base"}


def asked_of(engine):
    return Counter(body["model"] for _, _, body in engine.requests)


@pytest.mark.parametrize("policy", ["least-requests", "round-robin", "staggered", "triage", "pab"])
def test_requests_go_to_the_engine_that_has_their_model(policy):
    async def check():
        async with (
            StandIn(models=["a"]) as one,
            StandIn(models=["b"]) as two,
            gateway([one, two], policy) as (_, client),
        ):
            for _ in range(5):
                for model in "ab":
                    assert (await chat(client, model=model))[0] == 200
            assert (asked_of(one), asked_of(two)) == ({"a": 5}, {"b": 5})

    run(check())


def test_an_unknown_model_is_refused_and_does_not_reach_an_engine():
    async def check():
        async with StandIn(models=["a"]) as one, gateway([one]) as (_, client):
            status, _, body = await chat(client, model="b")
            assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")
            assert one.requests == []

    run(check())


def test_passed_on_an_unknown_model_reaches_an_engine():
    async def check():
        async with (
            StandIn(models=["a"]) as one,
            gateway([one], server={"unknown_models": "pass-on"}) as (_, client),
        ):
            assert (await chat(client, model="b"))[0] == 200
            assert asked_of(one) == {"b": 1}

    run(check())


def test_an_adapter_loaded_at_run_time_is_served_at_once_by_the_engine_that_loaded_it():
    async def check():
        async with (
            StandIn(models=[BASE]) as one,
            StandIn(models=[BASE]) as two,
            gateway([one, two]) as (front, client),
        ):
            two.models = [BASE, SQL]
            for _ in range(4):
                assert (await chat(client, model="sql"))[0] == 200
            assert (asked_of(one), asked_of(two)) == ({}, {"sql": 4})
            assert len(front.driver._policy.groups) == 1

    run(check())


def test_an_adapter_is_found_by_the_regular_questions_too(monkeypatch):
    monkeypatch.setattr(workers, "REFRESH_S", 0.05)

    async def check():
        async with StandIn(models=[BASE]) as one, gateway([one]) as (front, client):
            one.models = [BASE, SQL]
            await until(lambda: "sql" in front.workers.models())
            assert (await chat(client, model="sql"))[0] == 200

    run(check())


def test_the_lists_of_all_engines_are_merged():
    async def check():
        async with (
            StandIn(models=[BASE, SQL]) as one,
            StandIn(models=["b"]) as two,
            gateway([one, two]) as (_, client),
        ):
            async with client.get("/v1/models") as answer:
                told = {model["id"]: model for model in (await answer.json())["data"]}
            assert told["base"] == BASE | {"created": 0}
            assert told["sql"] == SQL | {"created": 0}
            assert set(told) == {"base", "sql", "b"}

    run(check())


def test_default_reaches_the_engine_under_its_model_s_name():
    async def check():
        async with (
            StandIn(models=["a"]) as one,
            StandIn(models=["b"]) as two,
            gateway([one, two]) as (_, client),
        ):
            for _ in range(3):
                assert (await chat(client, model="default"))[0] == 200
            assert (asked_of(one), asked_of(two)) == ({"a": 3}, {})

    run(check())


def test_an_engine_that_changed_its_base_model_is_a_new_one_to_the_policy(monkeypatch):
    monkeypatch.setattr(workers, "REFRESH_S", 0.05)

    async def check():
        async with (
            StandIn(models=["a"]) as one,
            StandIn(models=["b"]) as two,
            gateway([one, two]) as (front, client),
        ):
            two.models = ["a"]
            await until(lambda: "b" not in front.workers.models())
            for _ in range(4):
                assert (await chat(client, model="a"))[0] == 200
            assert asked_of(two)["a"] == 2

    run(check())


def test_a_request_waits_for_the_only_engine_of_its_model_to_come_back():
    async def check():
        async with (
            StandIn(models=["a"]) as one,
            StandIn(models=["b"]) as two,
            gateway([one, two]) as (front, client),
        ):
            two.healthy = False
            await until(lambda: front.workers.get("engine-1").state == "down")
            waiting = asyncio.create_task(chat(client, model="b"))
            await until(lambda: front.driver.held())
            assert (await chat(client, model="a"))[0] == 200
            two.healthy = True
            assert (await waiting)[0] == 200
            assert asked_of(two) == {"b": 1}

    run(check())


def test_a_request_gives_up_when_no_engine_of_its_model_is_up_for_long():
    """Though engines of another model are up: it waits as where no engine is up at all."""

    async def check():
        async with (
            StandIn(models=["a"]) as one,
            StandIn(models=["b"]) as two,
            gateway([one, two], limits={"no_engine_timeout_s": 0.05}) as (front, client),
        ):
            two.healthy = False
            await until(lambda: front.workers.get("engine-1").state == "down")
            status, _, body = await chat(client, model="b")
            assert (status, json.loads(body)["error"]["code"]) == (503, "no_engine")
            assert (await chat(client, model="a"))[0] == 200

    run(check())


def test_a_list_that_differs_in_its_date_only_changes_nothing(monkeypatch):
    """vLLM says that its models were created when it was asked."""
    monkeypatch.setattr(workers, "REFRESH_S", 0.01)

    async def check():
        async with StandIn(models=["a"]) as one, gateway([one]) as (front, _):
            summary = front.workers.catalog._all()
            asked = one.asked_for_models
            one.models = [{"id": "a", "created": 1_800_000_000, "max_model_len": 1000}]
            await until(lambda: one.asked_for_models > asked + 2)
            assert front.workers.catalog._all() is summary

    run(check())


FORM = {"content-type": 'multipart/form-data; boundary="b-1"'}
PART = b'--b-1\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


@pytest.mark.parametrize(
    "body, model",
    [
        (PART % (b"model", b"large") + b"--b-1--", "large"),
        (PART % (b"file", b"x" * 200_000) + PART % (b"model", b"large") + b"--b-1--", "large"),
        (PART % (b"model", b"large") + PART % (b"file", b"x" * 200_000) + b"--b-1--", "large"),
        (PART.replace(b'name="%b"', b"%b; name=model") % (b"x=y", b"large") + b"--b-1--", "large"),
        (PART % (b'file"; filename="model', b"no") + b"--b-1--", None),
        (PART % (b"model", b"two\r\nlines") + b"--b-1--", None),
        (PART[:-2] % (b"model", b"cut"), None),
        (PART % (b"model", b"x" * 600) + b"--b-1--", None),
        (b'{"model": "large"}', None),
    ],
)
def test_a_form_names_its_model(body, model):
    assert _form_model(FORM, body) == model


def cpu_s(body):
    """Return the CPU time of looking for the model in a form's body: the least of a few."""

    def once():
        began_s = time.process_time()
        _form_model(FORM, body)
        return time.process_time() - began_s

    return min(once() for _ in range(5))


@pytest.mark.parametrize(
    "line", [b'name="model"', b'name="model"\r\n', b'; name="model";', b"; name=", b"--b-1\r\n", b"\r\n\r\n"]
)
def test_the_time_to_find_a_forms_model_grows_no_faster_than_its_bytes(line):
    small, large = line * (4096 // len(line)), line * (65_536 // len(line))
    assert cpu_s(large) < 100 * max(cpu_s(small), 1e-5)  # 16 times the bytes; where it is squared, 256 times
