"""Who may ask what: keys, tokens, binds, and what browsers may do for other sites."""

import asyncio
import hashlib
import json
from pathlib import Path

import aiohttp
import pytest
from standins import CHAT, StandIn, chat, error_of, gateway, run, until

from headway.core.errors import ConfigError
from headway.front.access import Access, Gate
from headway.front.errors import Refusal
from headway.front.keys import Client, ClientKeys, ClientKeySpec, read_keys_file, table_of
from headway.hosts.gateway import GatewayConfig
from headway.hosts.gateway.posture import posture_of, warnings

KEYS = {"auth": {"api_keys_env": "KEYS"}}
TOKEN = {"admin": {"token_env": "TOKEN"}}
EVERYWHERE = {"server": {"host": "0.0.0.0"}}
OPEN = {"worker_api": {"enabled": True, "open": True}}


@pytest.fixture(autouse=True)
def secrets(monkeypatch):
    monkeypatch.setenv("KEYS", "one, two")
    monkeypatch.setenv("TOKEN", "operator")
    monkeypatch.setenv("SCRAPER", "scraper")


# The posture

A, M, N = Access.ANYONE, Access.THIS_MACHINE, Access.NOBODY
K, T = Access.CLIENTS, Access.OPERATORS


@pytest.mark.parametrize(
    ("tables", "api", "metrics", "page", "worker_api"),
    [
        ({}, A, M, M, M),
        (KEYS, K, K, N, N),
        (TOKEN, A, M, T, T),
        (KEYS | TOKEN, K, T, T, T),
        (EVERYWHERE, A, A, N, N),
        (EVERYWHERE | KEYS, K, K, N, N),
        (EVERYWHERE | TOKEN, A, A, T, T),
        (EVERYWHERE | OPEN, A, A, N, A),
        (EVERYWHERE | KEYS | OPEN, K, K, N, K),
        (EVERYWHERE | TOKEN | OPEN, A, A, T, T),
        ({"metrics": {"token_env": "SCRAPER"}}, A, T, M, M),
        (EVERYWHERE | {"metrics": {"port": 9100}}, A, N, N, N),
        (EVERYWHERE | KEYS | {"metrics": {"port": 9100}}, K, N, N, N),
        (EVERYWHERE | TOKEN | {"metrics": {"port": 9100}}, A, T, T, T),
        ({"metrics": {"port": 9100}}, A, M, M, M),
    ],
)
def test_who_may_ask_what_on_the_public_bind(tables, api, metrics, page, worker_api):
    assert posture_of(GatewayConfig.parse(tables)) == (api, metrics, page, worker_api)


def test_the_reference_shows_the_same_table():
    text = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith(("| loopback", "| other"))]
    binds = {"loopback": {}, "other": EVERYWHERE}
    secrets = {"none": {}, "client keys": KEYS, "operator token": TOKEN, "both": KEYS | TOKEN}
    short = {A: "anyone", M: "this machine", K: "client key", T: "token", N: "nobody"}
    told = {}
    for row in rows:
        bind, secret, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        told[bind, secret] = cells
    assert told == {
        (bind, secret): [short[each] for each in posture_of(GatewayConfig.parse(b | s))]
        for bind, b in binds.items()
        for secret, s in secrets.items()
    }


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({}, []),
        (KEYS, []),
        (EVERYWHERE, ["send requests without a key", "read /metrics without a key"]),
        (EVERYWHERE | KEYS, []),
        (EVERYWHERE | KEYS | OPEN, ["every client with a key can add and remove engines"]),
        (
            EVERYWHERE | OPEN,
            ["send requests without a key", "read /metrics without a key", "can add and remove engines"],
        ),
        ({"metrics": {"host": "0.0.0.0", "port": 9100}}, ["0.0.0.0:9100 can read /metrics"]),
        ({"metrics": {"host": "0.0.0.0", "port": 9100, "token_env": "SCRAPER"}}, []),
        ({"cors": {"allowed_origins": ["*"]}}, ["pages of every site"]),
    ],
)
def test_each_thing_that_is_open_is_one_line_at_start(tables, words):
    lines = list(warnings(GatewayConfig.parse(tables)))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_the_start_logs_what_is_open(caplog):
    async def check():
        async with StandIn() as engine, gateway([engine], server={"host": "0.0.0.0"}):
            pass

    run(check())
    said = [record.getMessage() for record in caplog.records if "without a key" in record.getMessage()]
    assert len(said) == 2


# Gates


def refused_by(gate, **headers):
    try:
        gate.check({name.replace("_", "-"): value for name, value in headers.items()})
    except Refusal as refusal:
        return refusal.code
    return None


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "127.0.0.1:8080"}, None),
        ({"host": "[::1]:8080"}, None),
        ({"host": "localhost:8080"}, None),
        ({"host": "gateway:8080"}, None),
        ({"host": "gateway.llm.svc.cluster.local"}, None),
        ({"host": "127.0.0.1:8080", "origin": "http://127.0.0.1:8080"}, None),
        ({"host": "evil.example:8080"}, "other_site"),
        ({"host": "127.0.0.1.nip.io"}, "other_site"),
        ({"host": "evil.example.:8080", "origin": "http://evil.example.:8080"}, "other_site"),
        ({"host": "127.0.0.1:8080", "origin": "http://evil.example"}, "other_site"),
        ({"host": "127.0.0.1:8080", "origin": "null"}, "other_site"),
        ({"host": "localhost:8080", "sec_fetch_site": "same-site"}, "other_site"),
        ({"host": "localhost:8080", "sec_fetch_site": "cross-site"}, "other_site"),
        ({"host": "127.0.0.1:8080", "x_forwarded_for": "1.2.3.4"}, "other_site"),
        ({"host": "127.0.0.1:8080", "forwarded": "for=1.2.3.4"}, "other_site"),
    ],
)
def test_where_this_machine_needs_no_token_other_sites_and_proxies_are_refused(headers, code):
    assert refused_by(Gate(Access.THIS_MACHINE), **headers) == code


def test_an_open_function_takes_forwarded_requests_but_no_other_sites():
    gate = Gate(Access.ANYONE)
    assert refused_by(gate, host="10.0.0.9:30000", x_forwarded_for="1.2.3.4") is None
    assert refused_by(gate, host="evil.example", origin="http://evil.example") == "other_site"


def test_metrics_that_others_can_read_anyway_may_be_scraped_by_a_public_name():
    gate = Gate(Access.ANYONE, public_names=True)
    assert refused_by(gate, host="gateway.example:9100") is None


def test_a_token_is_needed_whatever_the_host():
    gate = Gate(Access.OPERATORS, tokens=table_of(["operator, other"]))
    assert refused_by(gate, host="gateway.example", authorization="Bearer other") is None
    assert refused_by(gate, host="gateway.example", x_api_key="operator") is None
    assert refused_by(gate, host="127.0.0.1") == "invalid_api_key"
    assert refused_by(gate, authorization="Basic operator") == "invalid_api_key"


def test_an_operator_token_that_is_blank_lets_nobody_in():
    assert refused_by(Gate(Access.OPERATORS, tokens=table_of([" , "])), authorization="Bearer ") is not None


# The gateway as a whole


def test_engines_cannot_be_added_without_a_key_where_others_can_connect():
    async def check():
        api = {"enabled": True}
        everywhere = {"host": "0.0.0.0"}
        async with StandIn() as engine, gateway([], server=everywhere, worker_api=api) as (front, _):
            url = front.url.replace("0.0.0.0", "127.0.0.1")
            async with (
                aiohttp.ClientSession(url) as client,
                client.post("/add_worker", params={"url": engine.url}) as answer,
            ):
                assert answer.status == 403
                message = json.loads(await answer.read())["error"]["message"]
                assert "[admin] token_env" in message and "worker_api" in message
            assert not list(front.workers)

    run(check())


def test_on_loopback_with_client_keys_operators_functions_need_a_token():
    async def check():
        api = {"enabled": True}
        key, token = {"Authorization": "Bearer one"}, {"Authorization": "Bearer operator"}
        async with StandIn() as engine, gateway([engine], worker_api=api, **KEYS) as (front, client):
            assert front.page_url is None
            for path in ("/list_workers", "/admin/live", "/"):
                async with client.get(path, headers=key) as answer:
                    assert answer.status in (403, 404), path
        async with StandIn() as engine, gateway([engine], worker_api=api, **KEYS, **TOKEN) as (_, client):
            for path in ("/list_workers", "/admin/live", "/metrics", "/server_info"):
                for headers, status in (({}, 401), (key, 401), (token, 200)):
                    async with client.get(path, headers=headers) as answer:
                        assert answer.status == status, (path, headers)

    run(check())


def test_metrics_want_a_clients_key_or_the_scrapers_token():
    async def check():
        async with StandIn() as engine, gateway([engine], **KEYS) as (_, client):
            for headers, status in (({}, 401), ({"x-api-key": "one"}, 200)):
                async with client.get("/metrics", headers=headers) as answer:
                    assert answer.status == status
        metrics = {"port": 0, "token_env": "SCRAPER"}
        async with StandIn() as engine, gateway([engine], metrics=metrics) as (front, client):
            for url in ("/metrics", f"{front.metrics_url}/metrics"):
                for headers, status in (({}, 401), ({"Authorization": "Bearer scraper"}, 200)):
                    async with client.get(url, headers=headers) as answer:
                        assert answer.status == status, url

    run(check())


def test_metrics_of_this_machine_are_not_read_through_dns_rebinding():
    async def check():
        async with StandIn() as engine, gateway([engine], metrics={"port": 0}) as (front, client):
            for url in ("/metrics", f"{front.metrics_url}/metrics"):
                async with client.get(url, headers={"Host": "evil.example"}) as answer:
                    assert answer.status == 403

    run(check())


def test_without_a_key_a_client_learns_nothing_about_paths():
    async def check():
        async with StandIn() as engine, gateway([engine], **KEYS) as (_, client):
            for path in ("/v1/models", "/v1/models/tiny", "/v1/embeddings", "/version", "/nowhere"):
                async with client.get(path) as answer:
                    assert answer.status == 401 and answer.headers["x-request-id"]
            for path in ("/health", "/ready", "/liveness", "/readiness"):
                async with client.get(path) as answer:
                    assert answer.status == 200

    run(check())


def test_a_clients_credentials_stay_at_the_gateway():
    async def check(auth, arrives):
        async with StandIn() as engine, gateway([engine], auth=auth) as (_, client):
            headers = {"Authorization": "Bearer one", "Cookie": "session=1", "x-api-key": "one"}
            for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/messages"):
                assert (await chat(client, CHAT | {"input": "x"}, path=path, headers=headers))[0] == 200
            for _, sent, _ in engine.requests:
                assert "Cookie" not in sent and "x-api-key" not in sent
                assert sent.get("Authorization") == arrives

    run(check({}, "Bearer one"))
    run(check({"api_keys_env": "KEYS"}, None))
    run(check({"engine_api_key_env": "TOKEN"}, "Bearer operator"))


def test_no_answer_of_an_engine_shows_its_address():
    limits = {"retries": 0, "no_engine_timeout_s": 0.05}

    async def check():
        async with StandIn() as engine, gateway([engine], limits=limits) as (_, client):
            address = f"127.0.0.1:{engine.port}"
            engine.status, engine.says = 500, f"connect to {address} failed"
            for path in ("/v1/chat/completions", "/v1/embeddings"):
                status, headers, body = await chat(client, CHAT | {"input": "x"}, path=path)
                assert status == 500 and address.encode() not in body and b"[address]" in body
            await engine.kill()
            for path in ("/v1/chat/completions", "/v1/embeddings"):
                status, headers, body = await chat(client, CHAT | {"input": "x"}, path=path)
                assert status in (502, 503) and b"engine-0" not in body and b"127.0.0.1" not in body
                assert address not in str(headers)

    run(check())


# Keys with names and limits

FILE = """
[[keys]]
name = "team-a"
key = "alpha"
concurrent_requests = 1
priority = 5
[[keys]]
name = "team-b"
sha256 = "{}"
rate_limit_rps = 1
"""


@pytest.fixture
def keys_file(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(FILE.format(hashlib.sha256(b"beta").hexdigest()))
    return file


def test_a_key_in_a_file_is_text_or_a_hash_and_has_a_name(keys_file):
    keys = ClientKeys("plain", keys_file, lambda: 0.0)
    assert keys.check({"authorization": "Bearer alpha"}).spec.name == "team-a"
    assert keys.check({"x-api-key": "beta"}).spec.name == "team-b"
    assert keys.check({"x-api-key": "plain"}).spec.name == "key-1"
    assert keys.check({"authorization": "Bearer wrong", "x-api-key": "alpha"}).spec.name == "team-a"
    hashed = hashlib.sha256(b"beta").hexdigest()
    for wrong in ("alpha ", "ALPHA", "gamma", hashed):
        if wrong.strip() != "alpha":
            with pytest.raises(Refusal, match="API key is needed"):
                keys.check({"authorization": f"Bearer {wrong}"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = 3", "keys"),
        ("[[keys]]\nname = 'a'", "needs one of key and sha256"),
        ("[[keys]]\nname = 'a'\nkey = 'sk-secret'\nsha256 = '" + "0" * 64 + "'", "needs one of"),
        ("[[keys]]\nname = 'a'\nsha256 = 'sk-secret'", "keys[0].sha256"),
        ("[[keys]]\nname = 'a'\nkey = 'sk-secret'\nrate_limit = 1", "did you mean 'rate_limit_rps'?"),
        ("[[keys]]\nname = 'a b'\nkey = 'sk-secret'", "keys[0].name"),
        ("[[keys", "not TOML"),
    ],
)
def test_a_wrong_keys_file_is_one_line_without_its_secrets(tmp_path, text, message):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys_file(file)
    said = str(caught.value)
    assert said.startswith(str(file)) and message in said and "\n" not in said
    assert "sk-secret" not in said


def test_names_and_keys_occur_once(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text("[[keys]]\nname = 'a'\nkey = 'x'\n[[keys]]\nname = 'a'\nkey = 'y'\n")
    with pytest.raises(ConfigError, match="two keys are called 'a'"):
        ClientKeys(None, file, lambda: 0.0)
    file.write_text("[[keys]]\nname = 'a'\nkey = 'x'\n[[keys]]\nname = 'b'\nkey = 'x'\n")
    with pytest.raises(ConfigError, match="b: the same key is there twice"):
        ClientKeys(None, file, lambda: 0.0)


def test_a_keys_rate_is_a_bucket_of_one_second():
    now = [0.0]
    client = Client(ClientKeySpec(name="a", key="x", rate_limit_rps=2), lambda: now[0])
    client.enter({})
    now[0] = 10.0  # however long nothing came, one second's worth has gathered
    for _ in range(2):
        client.enter({})
    with pytest.raises(Refusal, match="'a' may send 2 requests per second: rate_limit_rps") as caught:
        client.enter({})
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (
        429,
        "key_rate_limit",
        0.5,
    )
    now[0] = 10.5
    client.enter({})


@pytest.mark.parametrize(
    ("asked", "becomes"), [(None, "5"), ("9", "5"), ("5", "5"), ("-3", "-3"), ("high", "high")]
)
def test_a_clients_own_priority_may_only_lower_its_keys(asked, becomes):
    headers = {} if asked is None else {"x-priority": asked}
    Client(ClientKeySpec(name="a", key="x", priority=5), lambda: 0.0).enter(headers)
    assert headers["x-priority"] == becomes


def test_a_key_limits_what_its_client_has_under_way(keys_file):
    async def check():
        auth = {"keys_file": str(keys_file)}
        alpha, beta = {"Authorization": "Bearer alpha"}, {"x-api-key": "beta"}
        async with StandIn() as engine, gateway([engine], auth=auth) as (front, client):
            events = []
            front.driver._observers += (lambda now, event, actions: events.append(event),)
            engine.go.clear()
            first = asyncio.create_task(chat(client, headers=alpha | {"x-priority": "9"}))
            await until(lambda: engine.requests)
            status, headers, body = await chat(client, headers=alpha)
            assert (status, error_of(body)) == (429, "key_concurrent_requests")
            assert int(headers["Retry-After"]) >= 1 and b"team-a" in body
            engine.go.set()
            assert (await first)[0] == 200
            assert (await chat(client, headers=alpha))[0] == 200  # the first one's place is free again
            assert (await chat(client, headers=beta))[0] == 200
            status, _, body = await chat(client, headers=beta)
            assert (status, error_of(body)) == (429, "key_rate_limit")
            priorities = [event.request.priority for event in events if hasattr(event, "request")]
            assert priorities == [5, 5, 0]
            assert [sent["x-priority"] for _, sent, _ in engine.requests] == ["5", "5", "0"]
            text = front.metrics.text().decode()
            assert 'headway_client_requests_total{client="team-a",status="200"} 2.0' in text
            assert 'headway_client_requests_total{client="team-a",status="429"} 1.0' in text

    run(check())


def test_a_reload_reads_the_keys_again_and_a_wrong_file_changes_nothing(keys_file):
    async def check():
        auth = {"keys_file": str(keys_file)}
        async with StandIn() as engine, gateway([engine], auth=auth) as (front, client):
            keys_file.write_text("[[keys]]\nname = 'team-c'\nkey = 'gamma'\n")
            await front.reload(front.config)
            assert (await chat(client, headers={"x-api-key": "alpha"}))[0] == 401
            assert (await chat(client, headers={"x-api-key": "gamma"}))[0] == 200
            keys_file.write_text("[[keys]]\nname = 'team-c'\n")
            with pytest.raises(ConfigError):
                await front.reload(front.config)
            assert (await chat(client, headers={"x-api-key": "gamma"}))[0] == 200

    run(check())


def test_a_reload_keeps_what_a_client_has_under_way(keys_file):
    keys = ClientKeys(None, keys_file, lambda: 0.0)
    keys.check({"x-api-key": "alpha"}).enter({})
    keys.reload()
    with pytest.raises(Refusal, match="concurrent_requests"):
        keys.check({"x-api-key": "alpha"}).enter({})


# CORS

PAGE = "https://app.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}


def cors(**more):
    return {"cors": {"allowed_origins": [PAGE]} | more}


def test_a_preflight_is_answered_before_keys_are_checked():
    async def check():
        async with StandIn() as engine, gateway([engine], **cors(), **KEYS) as (_, client):
            for path in ("/v1/chat/completions", "/v1/embeddings", "/v1/models"):
                async with client.options(path, headers=PREFLIGHT) as answer:
                    assert answer.status == 204
                    assert answer.headers["Access-Control-Allow-Origin"] == PAGE
                    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
                    allowed = answer.headers["Access-Control-Allow-Headers"]
                    assert allowed == PREFLIGHT["Access-Control-Request-Headers"]
                    assert answer.headers["Access-Control-Max-Age"] == "600"
                    assert "Origin" in answer.headers["Vary"]
                    assert "Access-Control-Allow-Credentials" not in answer.headers
            async with client.options(
                "/v1/models", headers=PREFLIGHT | {"Origin": "https://x.example"}
            ) as no:
                assert no.status == 403 and "Access-Control-Allow-Origin" not in no.headers
            assert not engine.requests

    run(check())


def test_answers_streams_and_errors_carry_cors_headers():
    async def check():
        async with StandIn() as engine, gateway([engine], **cors(), **KEYS) as (_, client):
            page = {"Origin": PAGE}
            key = page | {"x-api-key": "one"}
            for status, body, headers, path in (
                (200, CHAT, key, "/v1/chat/completions"),
                (200, CHAT | {"stream": True}, key, "/v1/chat/completions"),
                (200, {"input": "x"}, key, "/v1/embeddings"),
                (401, CHAT, page, "/v1/chat/completions"),
                (400, b"{", key, "/v1/chat/completions"),
                (404, CHAT, key, "/nowhere"),
            ):
                got, answered, _ = await chat(client, body, path=path, headers=headers)
                assert (got, answered.getall("Access-Control-Allow-Origin")) == (status, [PAGE])
                assert (
                    "Origin" in answered["Vary"]
                    and "x-request-id" in answered["Access-Control-Expose-Headers"]
                )
            for headers in ({}, {"Origin": "https://x.example"}):
                got, answered, _ = await chat(client, headers={"x-api-key": "one"} | headers)
                assert got == 200 and answered["Vary"] == "Origin"
                assert "Access-Control-Allow-Origin" not in answered

    run(check())


def test_every_origin_can_be_allowed_but_no_operators_function():
    async def check():
        tables = cors(allowed_origins=["*"]) | {"worker_api": {"enabled": True}}
        async with StandIn() as engine, gateway([engine], **tables) as (_, client):
            assert (await chat(client, headers={"Origin": PAGE}))[1]["Access-Control-Allow-Origin"] == "*"
            async with client.get("/list_workers", headers={"Origin": PAGE}) as answer:
                assert answer.status == 403 and "Access-Control-Allow-Origin" not in answer.headers

    run(check())


def test_without_cors_there_are_no_headers_and_no_preflight():
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            headers = (await chat(client, headers={"Origin": PAGE}))[1]
            assert "Access-Control-Allow-Origin" not in headers and "Vary" not in headers
            async with client.options("/v1/models", headers=PREFLIGHT) as answer:
                assert "Access-Control-Allow-Origin" not in answer.headers

    run(check())


def test_an_origin_with_a_path_is_refused():
    with pytest.raises(ConfigError, match=r"cors\.allowed_origins"):
        GatewayConfig.parse({"cors": {"allowed_origins": ["https://app.example/x"]}})
