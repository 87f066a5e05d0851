"""Which path is what: every endpoint of vLLM and SGLang has a row, and each kind its rule."""

import asyncio
import gzip
import json
import posixpath
import re
from pathlib import Path
from urllib.parse import unquote

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import ANSWER, DONE, EVENT, StandIn, chat, error_of, gateway, run, running, until
from test_gateway_disaggregated import config

from headway.core.events import Role
from headway.front.errors import Refusal
from headway.front.requests import plain_path
from headway.hosts.gateway.endpoints import ENDPOINTS, Kind, find, roles_for

OPERATORS = {"enabled": True}


def of_kind(kind):
    return [each for each in ENDPOINTS if each.kind is kind]


async def ask(client, method, path, **more):
    async with client.request(method, path, **more) as answer:
        return answer.status, answer.headers, await answer.read()


def test_a_path_is_listed_once_and_found_as_it_is_spelt():
    paths = [each.path for each in ENDPOINTS]
    assert len(paths) == len(set(paths))
    for each in ENDPOINTS:
        assert find(each.path) is each
        assert all(method.isupper() for method in each.methods) and each.methods
        assert bool(each.why) == (each.kind is Kind.REFUSED), each.path


@pytest.mark.parametrize("spell", ["{}/", "/{}", "{}//"])
def test_another_spelling_of_any_listed_path_is_refused(spell):
    for each in ENDPOINTS:
        with pytest.raises(Refusal) as refused:
            find(spell.format(each.path))
        assert refused.value.status == 404 and each.path in str(refused.value)


def test_nothing_but_what_is_listed_exists_outside_of_v1():
    for path in ("/", "/docs", "/v2", "/v2/models", "/v1", "/admin/live", "/generate_stream"):
        assert find(path) is None
    assert find("/v1/something/new").kind is Kind.COMPUTED


def test_generation_never_goes_to_an_engine_that_cannot_do_it():
    assert roles_for(Kind.GENERATED) == {Role.AGGREGATED}
    assert Role.DECODE not in roles_for(Kind.COMPUTED)


def test_generations_that_the_policy_does_not_place_are_refused_where_prefill_and_decode_are_apart():
    async def check():
        async with StandIn() as prefill, StandIn() as decode:
            async with running(config([prefill], [decode])) as (_, client):
                for each in of_kind(Kind.GENERATED):
                    status, _, body = await chat(client, {"text": "x"}, path=each.path)
                    assert (status, error_of(body)) == (501, "needs_aggregated_engine"), each.path
                for each in of_kind(Kind.COMPUTED):
                    assert (await chat(client, {"input": "x"}, path=each.path))[0] == 200
            assert not decode.requests and len(prefill.requests) == len(of_kind(Kind.COMPUTED))

    run(check())


def test_what_one_engine_can_answer_is_passed_on_with_its_query():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            kinds = (Kind.GENERATED, Kind.COMPUTED, Kind.READ)
            rows = [each for each in ENDPOINTS if each.kind in kinds]
            for each in rows:
                body = {"json": {"input": "x"}} if "POST" in each.methods else {}
                status, _, answer = await ask(client, each.methods[0], each.path + "?a=b", **body)
                assert (status, json.loads(answer)) == (200, ANSWER), each.path
            assert [path for path, _, _ in engine.requests] == [each.path for each in rows]
            await ask(client, "GET", "/%76ersion")
            assert engine.requests[-1][0] == "/version"

    run(check())


def test_a_wrong_method_is_405_and_says_which_is_right():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            for path, allowed in (
                ("/tokenize", "POST"),
                ("/generate", "POST, PUT"),
                ("/v1/chat/completions", "POST"),
                ("/flush_cache", "POST"),
                ("/v1/models", "GET"),
                ("/v1/models/tiny", "GET"),
            ):
                status, headers, body = await ask(client, "DELETE", path)
                assert (status, error_of(body)) == (405, "method_not_allowed"), path
                assert headers["Allow"] == allowed
            assert not engine.requests

    run(check())


def test_what_concerns_one_engine_is_refused_with_the_reason():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            for path in ("/collective_rpc", "/open_session", "/inference/v1/generate"):
                status, _, body = await chat(client, {}, path=path)
                assert (status, error_of(body)) == (501, "not_served"), path
            for method, path in (("GET", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel")):
                status, _, body = await ask(client, method, path)
                assert (status, error_of(body)) == (501, "not_served")
                assert "kept by the engine" in json.loads(body)["error"]["message"]
            assert not engine.requests

    run(check())


def test_the_gateway_answers_ping_when_it_can_serve():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            for method, path in (("GET", "/ping"), ("POST", "/ping"), ("GET", "/health_generate")):
                assert (await ask(client, method, path))[0] == 200
            engine.healthy = False
            await until(lambda: not front.workers.ready())
            assert (await ask(client, "GET", "/ping"))[0] == 503

    run(check())


def test_one_model_can_be_looked_up():
    async def check():
        async with StandIn(models=("org/tiny",)) as engine, gateway([engine]) as (_, client):
            status, _, body = await ask(client, "GET", "/v1/models/org/tiny")
            assert (status, json.loads(body)["id"], json.loads(body)["max_model_len"]) == (
                200,
                "org/tiny",
                1000,
            )
            status, _, body = await ask(client, "GET", "/v1/models/huge")
            assert (status, error_of(body)) == (404, "model_not_found")

    run(check())


def test_loads_of_all_engines_are_joined_in_the_format_of_one():
    async def check():
        async with StandIn() as one, StandIn() as other, gateway([one, other]) as (_, client):
            one.answers["/load"], other.answers["/load"] = {"server_load": 2}, {"server_load": 5}
            assert json.loads((await ask(client, "GET", "/load"))[2]) == {"server_load": 7}
            report = {
                "version": "0.5.23",
                "num_accelerators": 2,
                "loads": [{"dp_rank": 0, "num_reqs": 1}] * 2,
            }
            one.answers["/v1/loads"] = report
            other.answers["/v1/loads"] = report | {"loads": [{"dp_rank": 0, "num_reqs": 9}]}
            joined = json.loads((await ask(client, "GET", "/v1/loads?dp_rank=0"))[2])
            assert [(each["dp_rank"], each["num_reqs"]) for each in joined["loads"]] == [
                (0, 1),
                (1, 1),
                (2, 9),
            ]
            assert (joined["version"], joined["num_accelerators"]) == ("0.5.23", 4)

    run(check())


def test_an_engine_without_a_load_does_not_hide_the_others():
    async def check():
        async with StandIn() as one, StandIn() as other, gateway([one, other]) as (_, client):
            one.answers["/load"], other.status = {"server_load": 2}, 404
            assert json.loads((await ask(client, "GET", "/load"))[2]) == {"server_load": 2}
            one.status = 404
            status, _, body = await ask(client, "GET", "/load")
            assert (status, error_of(body)) == (404, "no_load")
            one.status, one.answers["/load"] = 200, {"server_load": "many"}
            status, _, body = await ask(client, "GET", "/load")
            assert (status, error_of(body)) == (502, "engine_error")

    run(check())


def test_operations_are_for_operators_and_go_to_every_engine():
    async def check():
        async with (
            StandIn() as one,
            StandIn() as other,
            gateway([one, other], worker_api=OPERATORS) as (_, client),
        ):
            adapter = {"lora_name": "a", "lora_path": "/a"}
            status, _, body = await chat(client, adapter, path="/v1/load_lora_adapter?x=1")
            assert status == 200, body
            answer = json.loads(body)
            assert answer["success"] and [each["name"] for each in answer["engines"]] == [
                "engine-0",
                "engine-1",
            ]
            assert [engine.requests[0][2] for engine in (one, other)] == [adapter, adapter]
            other.status = 400
            status, _, body = await chat(client, adapter, path="/v1/load_lora_adapter")
            assert status == 400 and not json.loads(body)["success"]
            one.status = 500
            assert (await chat(client, adapter, path="/v1/load_lora_adapter"))[0] == 502
            headers = {"Origin": "http://elsewhere.example"}
            status, _, body = await chat(client, {}, path="/flush_cache", headers=headers)
            assert (status, error_of(body)) == (403, "other_site")

    run(check())


def test_clients_cannot_operate_engines():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            for each in of_kind(Kind.OPERATED):
                status, _, body = await ask(client, each.methods[0], each.path)
                assert (status, error_of(body)) == (403, "operators_only"), each.path
            assert not engine.requests

    run(check())


def test_an_operation_whose_body_does_not_come_is_given_up():
    async def check():
        limits = {"body_timeout_s": 0.05}
        async with (
            StandIn() as engine,
            gateway([engine], admin={"port": 0}, limits=limits) as (front, _),
        ):
            host, _, port = front.admin_url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /flush_cache HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            answer = await reader.readuntil(b"}}")
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert error_of(answer.partition(b"\r\n\r\n")[2]) == "body_timeout"
            assert not engine.requests
            writer.close()

    run(check())


def test_the_admin_side_operates_engines_and_lists_those_that_are_down():
    async def check():
        health = {"interval_s": 0.02, "eject_after": 1}
        async with (
            StandIn() as up,
            StandIn() as down,
            gateway([up, down], admin={"port": 0}, health=health) as (front, _),
        ):
            down.healthy = False
            await until(lambda: not front.workers.named("engine-1").takes_work())
            async with aiohttp.ClientSession(front.admin_url) as operator:
                status, _, body = await ask(operator, "POST", "/flush_cache")
            entries = {each["name"]: each for each in json.loads(body)["engines"]}
            assert status == 502 and entries["engine-0"]["status"] == 200
            assert entries["engine-1"] == {
                "name": "engine-1",
                "status": None,
                "answer": "not asked: it is down",
            }
            assert len(up.requests) == 1 and not down.requests

    run(check())


def test_an_operation_counts_as_under_way_until_every_engine_has_answered():
    async def check():
        async with StandIn() as engine, gateway([engine], worker_api=OPERATORS) as (front, client):
            engine.go.clear()
            task = asyncio.create_task(chat(client, {}, path="/flush_cache"))
            await until(lambda: engine.requests)
            assert front.serving.buffer.in_flight == 1
            engine.go.set()
            assert (await task)[0] == 200

    run(check())


def test_what_is_passed_on_goes_to_an_engine_that_has_the_model():
    async def check():
        async with (
            StandIn(models=("small",)) as small,
            StandIn(models=("large",)) as large,
            gateway([small, large]) as (_, client),
        ):
            for _ in range(3):
                await chat(client, {"model": "large", "input": "x"}, path="/v1/embeddings")
            form = aiohttp.FormData({"model": "large"})
            form.add_field("file", b"\0" * 100_000, filename="a.wav")
            await ask(client, "POST", "/v1/audio/transcriptions", data=form)
            assert (len(small.requests), len(large.requests)) == (0, 4)

    run(check())


def test_retry_after_passes_and_the_engines_address_does_not():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):

            async def full(request):
                headers = {"Retry-After": "7", "Location": f"{engine.url}/v1/embeddings"}
                return web.Response(status=503, text="{}", headers=headers)

            engine._generate = full
            status, headers, _ = await chat(client, {"input": "x"}, path="/v1/embeddings")
            assert (status, headers["Retry-After"]) == (503, "7") and headers["Location"] == "/v1/embeddings"

    run(check())


@pytest.mark.parametrize("stream", [False, True])
def test_headers_of_a_scheduled_answer_pass_but_for_those_of_the_connection(stream):
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):

            async def answer(request):
                headers = {
                    "X-Kept": "1",
                    "Retry-After": "3",
                    "X-Engine": engine.url,
                    "X-Hop": "1",
                    "Connection": "x-hop",
                    "Set-Cookie": "a=1",
                    "Cache-Control": "no-store",
                }
                if not stream:
                    headers["Content-Encoding"] = "gzip"
                    return web.Response(body=gzip.compress(json.dumps(ANSWER).encode()), headers=headers)
                return web.Response(body=EVENT + DONE, headers=headers, content_type="text/event-stream")

            engine._generate = answer
            status, headers, body = await chat(client, stream=stream)
            assert (status, headers["X-Kept"], headers["Retry-After"]) == (200, "1", "3")
            assert headers.getall("Cache-Control") == ["no-store"]
            assert not {"X-Engine", "X-Hop", "Set-Cookie"} & set(headers)
            assert body == EVENT + DONE if stream else json.loads(body) == ANSWER

    run(check())


def test_a_clients_credentials_do_not_reach_engines():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            given = {"Cookie": "session=1", "x-api-key": "secret"}
            await chat(client, {"input": "x"}, path="/v1/embeddings", headers=given)
            seen = {name.lower() for name in engine.requests[0][1]}
            assert not {"cookie", "x-api-key"} & seen

    run(check())


def test_the_page_of_the_docs_lists_every_path():
    page = (Path(__file__).parents[2] / "docs" / "endpoints.md").read_text()
    words = set(re.findall(r"/[\w./-]*\w", page))
    assert not [each.path for each in ENDPOINTS if each.path not in words]


def test_an_unknown_model_is_refused_and_default_means_the_one_that_is_served():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            status, _, body = await chat(client, {"model": "huge", "input": "x"}, path="/v1/embeddings")
            assert (status, error_of(body)) == (404, "model_not_found") and not engine.requests
            assert (await chat(client, {"model": "default", "input": "x"}, path="/v1/embeddings"))[0] == 200
            assert engine.requests[0][2] == {"model": "tiny", "input": "x"}

    run(check())


def _read_as(path):
    """Return the paths that an engine, or a proxy before it, may take one for."""
    found = {path}
    for _ in range(3):
        found |= {unquote(each) for each in found}
    found |= {posixpath.normpath(each) for each in found} | {each.partition(";")[0] for each in found}
    found |= {each.replace("\\", "/") for each in found}
    return {plain_path(each) for each in found}


pieces = st.sampled_from(
    [
        "/",
        "//",
        ".",
        "..",
        "%2f",
        "%2e",
        "%25",
        "\\",
        ";",
        "?",
        "v1",
        "V1",
        "generate",
        "%67enerate",
        "chat",
        "completions",
        "flush_cache",
        "messages",
        "responses",
        "embeddings",
        "x",
        "%63",
        "é",
        "\x00",
    ]
)


@given(st.lists(pieces, max_size=9).map("".join), st.sampled_from(["/", "/v1/", ""]))
@settings(max_examples=2000, deadline=None)
def test_no_spelling_of_a_path_slips_past_the_table(rest, beginning):
    path = beginning + rest
    try:
        found = find(path)
    except Refusal:
        return
    if found is not None and found not in ENDPOINTS:
        listed = {each.path for each in ENDPOINTS}
        assert found.kind in (Kind.COMPUTED, Kind.GATEWAY, Kind.REFUSED)
        if found.kind is Kind.COMPUTED:  # passed on as it came
            assert not _read_as(path) & listed, path
