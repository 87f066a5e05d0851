"""Who and what comes in: limits, keys, bad requests. Nothing malformed reaches an engine."""

import asyncio
import json
import ssl

import aiohttp
import pytest
from standins import CHAT, StandIn, chat, error_of, gateway, run, running, until

from headway.core.errors import ConfigError
from headway.front.errors import overloaded
from headway.hosts.gateway import Gateway, GatewayConfig

BAD_BODIES = [
    (b"{", "invalid_json"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "invalid_json"),
    (b"[]", "invalid_request"),
    (b'"text"', "invalid_request"),
    (b"{}", "invalid_request"),
    (b'{"messages": []}', "invalid_request"),
    (b'{"messages": "hi"}', "invalid_request"),
    (b'{"messages": [{"content": "hi"}]}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": 3}]}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "stream": "maybe"}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "stream": 2}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1e400}', "invalid_request"),
    (
        b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": ' + b"9" * 5000 + b"}",
        "invalid_request",
    ),
    (b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 0}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1.5}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "data_parallel_rank": 99}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": "hi"}], "kv_transfer_params": {}}', "invalid_request"),
    (b'{"messages": ' + b"[" * 100_000, "invalid_request"),
    (b'{"messages": [{"role": "user", "content": ' + b"[" * 100_000, "body_too_complex"),
]
BAD_HEADERS = [
    {"x-slo-ttft-ms": "soon"},
    {"x-slo-ttft-ms": "nan"},
    {"x-slo-ttft-ms": "-5"},
    {"x-slo-tpot-ms": "inf"},
    {"x-llm-d-slo-ttft-ms": "1" * 500},
    {"x-priority": "high"},
    {"x-priority": "9999999"},
    {"X-Data-Parallel-Rank": "99"},
]


def test_what_is_malformed_is_refused_and_never_sent_on():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            for body, code in BAD_BODIES:
                status, _, answer = await chat(client, body)
                assert (status, error_of(answer)) == (400, code), body[:60]
            for headers in BAD_HEADERS:
                status, _, answer = await chat(client, headers=headers)
                assert (status, error_of(answer)) == (400, "invalid_request"), headers
            for prompt in ([], [1, "a"], [-1], 3, [True]):
                status, _, answer = await chat(client, {"prompt": prompt}, path="/v1/completions")
                assert (status, error_of(answer)) == (400, "invalid_request"), prompt
            assert not engine.requests

    run(check())


@pytest.mark.parametrize("prompt", ["hello", ["a", "b"], [1, 2, 3], [[1, 2], [3]]])
def test_completions_take_every_form_of_prompt(prompt):
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            assert (await chat(client, {"prompt": prompt}, path="/v1/completions"))[0] == 200

    run(check())


def test_targets_and_priority_reach_the_policy():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            seen = []
            front.driver._observers += (lambda now, event, actions: seen.append(event),)
            headers = {"x-llm-d-slo-ttft-ms": "250", "x-slo-tpot-ms": "20", "x-priority": "-3"}
            await chat(
                client, {"prompt": [1, 2, 3], "max_tokens": 9}, headers=headers, path="/v1/completions"
            )
            request = next(event.request for event in seen if hasattr(event, "request"))
            assert (request.slo.ttft_s, request.slo.tpot_s, request.priority) == (0.25, 0.02, -3)
            assert (request.prompt_tokens, request.max_output_tokens) == (3, 9)

    run(check())


def test_unknown_models_and_paths_and_prompts_longer_than_the_model():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            status, _, body = await chat(client, model="huge")
            assert (status, error_of(body)) == (404, "model_not_found")
            status, _, body = await chat(client, path="/v2/chat")
            assert (status, error_of(body)) == (404, "unknown_path")
            status, _, body = await chat(
                client, {"model": "tiny", "prompt": [1] * 1001}, path="/v1/completions"
            )
            assert (status, error_of(body)) == (400, "context_length_exceeded")
            async with client.get("/v1/chat/completions") as answer:
                assert (answer.status, answer.headers["Allow"]) == (405, "POST")
            assert not engine.requests
            async with client.get("/v1/models") as answer:
                assert [model["id"] for model in (await answer.json())["data"]] == ["tiny"]

    run(check())


def test_a_body_over_the_limit_told_or_found_out():
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"max_body_bytes": 1000}) as (_, client):
            status, _, body = await chat(client, b"x" * 1001)
            assert (status, error_of(body)) == (413, "body_too_large")

            async def pieces():
                for _ in range(3):
                    yield b"x" * 500

            async with client.post("/v1/completions", data=pieces()) as answer:
                assert (answer.status, error_of(await answer.read())) == (413, "body_too_large")
            assert not engine.requests

    run(check())


async def raw(front, data):
    """Send bytes and read to the end of the connection."""
    host, _, port = front.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


def test_slow_headers_slow_bodies_and_what_is_no_http():
    async def check():
        limits = {"header_timeout_s": 0.1, "body_timeout_s": 0.1}
        async with StandIn() as engine, gateway([engine], limits=limits) as (front, _):
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
            slow = await raw(front, head + b"X-Slow: a")
            assert (
                slow.startswith(b"HTTP/1.1 408") and error_of(slow.split(b"\r\n\r\n")[1]) == "header_timeout"
            )
            body = await raw(front, head + b"Connection: close\r\nContent-Length: 50\r\n\r\n{")
            assert body.startswith(b"HTTP/1.1 408") and error_of(body.split(b"\r\n\r\n")[1]) == "body_timeout"
            for nonsense, status, code in (
                (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400", "bad_http"),
                (head + b"X: " + b"y" * 20_000 + b"\r\n\r\n", b"431", "headers_too_large"),
                (head + b"X: y\r\n" * 101 + b"\r\n", b"431", "headers_too_large"),
                (head + b"".join(b"X: %4000d\r\n" % n for n in range(20)), b"431", "headers_too_large"),
                (b"GET /" + b"x" * 70_000, b"431", "headers_too_large"),
                (b"CONNECT elsewhere:443 HTTP/1.1\r\n\r\n", b"400", "bad_http"),
            ):
                answer = await raw(front, nonsense)
                assert answer.split()[1] == status and error_of(answer.split(b"\r\n\r\n")[1]) == code
            assert not engine.requests

    run(check())


def test_a_connection_kept_alive_is_not_taken_for_slow_headers():
    async def check():
        async with (
            StandIn() as engine,
            gateway([engine], limits={"header_timeout_s": 0.05}) as (front, client),
        ):
            engine.go.clear()
            task = asyncio.create_task(chat(client))
            await until(lambda: engine.requests)
            await asyncio.wait([task], timeout=0.1)  # longer than headers may take
            engine.go.set()
            assert (await task)[0] == 200
            await asyncio.wait([asyncio.create_task(asyncio.Event().wait())], timeout=0.1)
            connections = list(front._listeners[0].connections)
            assert len(connections) == 1 and not connections[0].lost
            assert (await chat(client))[0] == 200

    run(check())


def test_the_buffer_is_bounded_in_requests_tokens_and_bytes():
    async def check(limits, code, body):
        async with StandIn() as engine, gateway([engine], limits=limits) as (front, client):
            front.workers.drain("engine-0")
            held = asyncio.create_task(chat(client, body, path="/v1/completions"))
            await until(lambda: len(front.driver.held()) == 1)
            status, headers, answer = await chat(client, body, path="/v1/completions")
            assert (status, error_of(answer)) == (429, code)
            assert int(headers["Retry-After"]) >= 1
            front.workers.undrain("engine-0")
            assert (await held)[0] == 200

    body = {"prompt": [1] * 100}
    run(check({"buffer_requests": 1}, "buffer_requests", body))
    run(check({"buffer_tokens": 150}, "buffer_tokens", body))
    run(check({"buffer_bytes": 400}, "buffer_bytes", body))
    run(check({"concurrent_requests": 1}, "too_many_requests", body))
    run(check({"rate_limit_rps": 0.01}, "rate_limit", body))


def test_a_wait_without_an_engine_ends():
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"queue_timeout_s": 0.1}) as (front, client):
            front.workers.drain("engine-0")
            status, headers, body = await chat(client)
            assert (status, error_of(body), headers["Retry-After"]) == (503, "no_engine", "1")
            assert not engine.requests

    run(check())


def test_the_policys_refusal_is_a_429_that_says_why():
    async def check():
        policy = "staggered:max_backlog_passes=1"
        small = {"chunk_tokens": 100}
        async with StandIn() as engine, gateway([engine], policy, instance=small) as (_, client):
            engine.go.clear()
            tasks = [
                asyncio.create_task(chat(client, {"prompt": [1] * 90}, path="/v1/completions"))
                for _ in range(8)
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            status, headers, body = done.pop().result()
            assert (status, error_of(body)) == (429, "backlog-full") and int(headers["Retry-After"]) >= 1
            engine.go.set()
            assert {(await task)[0] for task in tasks} == {200, 429}

    run(check())


def test_a_prompt_no_rank_can_hold_is_the_clients_fault():
    async def check():
        small = {"kv_blocks": 10, "block_tokens": 16}
        async with StandIn(models=()) as engine, gateway([engine], instance=small) as (_, client):
            status, _, body = await chat(client, {"prompt": [1] * 500}, path="/v1/completions")
            assert (status, error_of(body)) == (400, "context_length_exceeded")
            assert not engine.requests

    run(check())


def test_api_keys(monkeypatch):
    monkeypatch.setenv("KEYS", "one, two")
    monkeypatch.setenv("ENGINE_KEY", "inner")

    async def check():
        auth = {"api_keys_env": "KEYS", "engine_api_key_env": "ENGINE_KEY"}
        async with StandIn() as engine, gateway([engine], auth=auth) as (_, client):
            for headers in (
                {},
                {"Authorization": "Bearer three"},
                {"Authorization": "Basic one"},
                {"Authorization": "Bearer "},
            ):
                status, answered, body = await chat(client, headers=headers)
                assert (status, error_of(body)) == (401, "invalid_api_key")
                assert answered["WWW-Authenticate"] == "Bearer"
            assert not engine.requests
            assert (await chat(client, headers={"Authorization": "Bearer two"}))[0] == 200
            assert engine.requests[0][1]["Authorization"] == "Bearer inner"
            async with client.get("/health") as answer:
                assert answer.status == 200

    run(check())


def test_a_key_variable_that_is_not_set_ends_the_start(monkeypatch):
    monkeypatch.delenv("KEYS", raising=False)
    config = GatewayConfig.parse({"auth": {"api_keys_env": "KEYS"}})
    with pytest.raises(ConfigError, match=r"auth\.api_keys_env: the environment variable KEYS is not set"):
        Gateway(config)


def test_health_ready_and_metrics():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            await chat(client, stream=True)
            async with client.get("/ready") as answer:
                assert (answer.status, (await answer.json())["workers"]) == (200, {"up": 1})
            await until(lambda: not front.driver.requests)
            async with client.get("/metrics") as answer:
                text = await answer.text()
            assert 'headway_requests_total{status="200"} 1.0' in text
            assert "headway_ttft_seconds_count 1.0" in text
            assert 'headway_worker_up{role="aggregated",worker="engine-0"} 1.0' in text
            front.workers.drain("engine-0")
            async with client.get("/ready") as answer:
                assert answer.status == 503

    run(check())


def test_drain_finishes_streams_and_takes_nothing_new():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.more.clear()
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            await answer.content.readany()
            draining = asyncio.create_task(front.drain())
            await until(lambda: front.public.draining)
            with pytest.raises(aiohttp.ClientConnectorError):
                async with aiohttp.ClientSession() as other:
                    await chat(other, path=f"{front.url}/v1/chat/completions")
            engine.more.set()
            assert (await answer.read()).endswith(b"data: [DONE]\n\n")
            assert await draining

    run(check())


def test_a_drain_is_bounded():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (front, client):
            engine.more.clear()
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
            await answer.content.readany()
            assert not await front.drain(timeout_s=0.05)
            answer.close()

    run(check())


def test_errors_are_openais_shape_and_retry_after_is_whole_seconds():
    refusal = overloaded("busy", "Busy.", 1.2)
    assert json.loads(refusal.body()) == {
        "error": {"message": "Busy.", "type": "rate_limit_error", "param": None, "code": "busy"}
    }
    assert refusal.headers()["Retry-After"] == "2"


def test_tls(tmp_path):
    cryptography = pytest.importorskip("cryptography")
    assert cryptography
    certificate, key = self_signed(tmp_path)

    async def check():
        async with StandIn() as engine:
            data = {
                "server": {"port": 0},
                "instances": [{"name": "a", "url": engine.url}],
                "policy": {"cluster": "round-robin"},
                "tls": {"certificate": str(certificate), "key": str(key)},
            }
            async with running(data) as (front, _):
                assert front.url.startswith("https://")
                trust = ssl.create_default_context(cafile=str(certificate))
                trust.check_hostname = False
                async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as client:
                    status, _, _ = await chat(client, path=f"{front.url}/v1/chat/completions")
                    assert status == 200

    run(check())


def self_signed(folder):
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths
