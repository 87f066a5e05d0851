"""Several models behind one picker: each request is sent to an endpoint that has its model."""

import asyncio
import json

import pytest
from parts import Envoy, Stage

from headway.front.model_catalog import ModelCard

ENDPOINTS = {"a": "10.0.0.0:8000", "b": "10.0.0.1:8000"}


def two_models(**tables):
    """One engine has model a, the other one b."""
    stage = Stage(policy="least-requests", **tables)
    for worker, name in zip(stage.workers, "ab", strict=True):
        worker.models = {name: ModelCard(id=name, max_model_len=1000)}
        stage.driver.feed(worker.up_event())
    stage.workers.catalog.changed()
    return stage


def ask(stage, model, **headers):
    async def check():
        envoy = Envoy(stage)
        envoy.headers(**headers)
        envoy.body(json.dumps({"model": model, "messages": [{"role": "user", "content": "x"}]}).encode())
        await envoy.turn()
        return envoy

    return check()


@pytest.mark.parametrize("model", ["a", "b"])
def test_a_request_is_sent_to_the_endpoint_of_its_model(model):
    async def check():
        stage = two_models()
        for _ in range(3):
            assert (await ask(stage, model)).destination[0] == ENDPOINTS[model]

    asyncio.run(check())


def test_fallbacks_have_the_model_too():
    async def check():
        assert (await ask(two_models(picker={"fallbacks": 3}), "b")).destination[0] == ENDPOINTS["b"]

    asyncio.run(check())


def test_a_hint_that_names_endpoints_is_kept_within_those_that_have_the_model():
    async def check():
        stage = two_models()
        both = ",".join(ENDPOINTS.values()) + ",10.0.0.9:8000"
        assert (await ask(stage, "b", subset=both)).destination[0] == ENDPOINTS["b"]
        assert (await ask(stage, "b", subset=ENDPOINTS["a"])).refusal[0] == 503

    asyncio.run(check())


def test_an_unknown_model_has_the_engines_asked_and_is_refused():
    async def check():
        stage = two_models()
        assert (await ask(stage, "c")).refusal[0] == 404
        assert stage.workers.asked_again == 1

    asyncio.run(check())
