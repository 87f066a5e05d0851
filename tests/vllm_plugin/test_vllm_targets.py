"""Targets and dispatch numbers at vLLM's door: what is passed on, and what is refused."""

import asyncio
import json

import pytest

from headway.core.errors import ConfigError
from headway.core.request import Slo
from headway.hosts.vllm.amend import amend, from_headers
from headway.hosts.vllm.middleware import Middleware
from headway.hosts.vllm.slo import slo_of


def xargs(body, headers=None):
    return json.loads(amend(json.dumps(body).encode(), from_headers(headers or {}))).get("vllm_xargs")


def test_a_body_that_says_nothing_of_ours_is_not_touched():
    body = b'{ "prompt" : [1, 2, 3] }'
    assert amend(body, {}) is body


def test_the_nearest_word_counts():
    headers = {"x-slo-ttft-ms": "100", "x-slo-tpot-ms": "10"}
    assert xargs({}, headers) == {"slo_ttft_ms": 100, "slo_tpot_ms": 10}
    assert xargs({"slo_ttft_ms": 200}, headers) == {"slo_ttft_ms": 200, "slo_tpot_ms": 10}
    said = {"slo_ttft_ms": 200, "vllm_xargs": {"slo_ttft_ms": 300, "other": 1}}
    assert xargs(said, headers) == {"slo_ttft_ms": 300, "slo_tpot_ms": 10, "other": 1}


def test_a_dispatch_number_is_put_in_front_without_parsing():
    found = from_headers({"x-headway-dispatch": "7"})
    assert amend(b'{"prompt": [1,   2]}', found) == (
        b'{"vllm_xargs":{"headway_dispatch": 7},"prompt": [1,   2]}'
    )
    assert json.loads(amend(b" {} ", found)) == {"vllm_xargs": {"headway_dispatch": 7}}
    assert xargs({"vllm_xargs": {"a": 1}}, {"x-headway-dispatch": "7"}) == {"a": 1, "headway_dispatch": 7}


def test_a_client_cannot_forge_a_dispatch_number():
    headers = {"x-headway-dispatch": "7"}
    assert xargs({"vllm_xargs": {"headway_dispatch": 9}}, headers) == {"headway_dispatch": 7}
    assert from_headers({"x-headway-dispatch": "-1"}) == {}
    assert from_headers({"x-headway-dispatch": "9" * 30}) == {}


@pytest.mark.parametrize("value", [-1, 0, "soon", "500", True, 1e6, [1], float("inf")])
def test_nonsense_is_refused(value):
    for body in ({"slo_ttft_ms": value}, {"vllm_xargs": {"slo_tpot_ms": value}}):
        with pytest.raises(ConfigError, match=r"^slo_t[tp][fo]t_ms must be "):
            xargs(body)


def test_nonsense_in_a_header_is_refused():
    with pytest.raises(ConfigError, match="x-slo-ttft-ms must be a number of milliseconds, got 'soon'"):
        from_headers({"x-slo-ttft-ms": "soon"})
    with pytest.raises(ConfigError, match="at most 600000"):
        xargs({}, {"x-slo-ttft-ms": "nan"})


@pytest.mark.parametrize(
    "body", [b"", b'"slo_', b"[1]", b'{"slo_ttft_ms": 1', b'{"vllm_xargs": 3, "slo_a": 1}']
)
def test_what_is_no_request_is_vllms_to_refuse(body):
    assert amend(body, {}) == body
    amend(body, {"headway_dispatch": 1})


def test_half_a_character_passes():
    body = b'{"prompt": "\\ud83d", "slo_ttft_ms": 500}'
    passed = json.loads(amend(body, {}))
    assert passed == {"prompt": "\ud83d", "vllm_xargs": {"slo_ttft_ms": 500}}


def test_a_body_nested_too_deep_is_vllms_to_refuse():
    for depth in (*range(900, 1010), 100_000):
        body = b'{"slo_ttft_ms": 500, "a": %s%s}' % (b"[" * depth, b"]" * depth)
        passed = amend(body, {})
        assert passed == body or b'"vllm_xargs":{"slo_ttft_ms":500}' in passed
    assert passed == body


@pytest.mark.parametrize(
    "body",
    [
        rb'{"\u0076llm_xargs": {"slo_ttft_ms": -5}}',
        rb'{"vllm_xargs": {"slo_\u0074tft_ms": -5}}',
        rb'{"\u0076llm\u005fxargs": {"\u0073lo_ttft_ms": -5}}',
        rb'{"\u0073lo_ttft_ms": -5}',
        b'{"vllm_xargs": {"slo_ttft_ms": 5}, "vllm_xargs": {"slo_ttft_ms": -5}}',
        b'{"temperature": NaN, "slo_ttft_ms": -5}',
    ],
)
@pytest.mark.parametrize("found", [{}, {"headway_dispatch": 7}], ids=["alone", "dispatched"])
def test_a_key_written_with_escapes_is_the_same_key(body, found):
    with pytest.raises(ConfigError, match="slo_ttft_ms must be more than 0"):
        amend(body, found)


def test_a_client_gives_itself_no_dispatch_number():
    assert xargs({"vllm_xargs": {"headway_dispatch": 9, "a": 1}}) == {"a": 1}
    body = rb'{"vllm_xargs": {"headway_\u0064ispatch": 9}}'
    assert json.loads(amend(body, {})) == {"vllm_xargs": {}}


def test_a_long_prompt_is_copied_as_it_came():
    prompt = b"[1,   2, " + b"3," * 100_000 + b"4]"
    passed = amend(b'{"prompt": ' + prompt + b', "slo_ttft_ms": 500}', {})
    assert prompt in passed
    assert json.loads(passed)["vllm_xargs"] == {"slo_ttft_ms": 500}


def test_a_target_of_a_million_digits_is_refused_without_being_read():
    with pytest.raises(ConfigError, match="must be a number of milliseconds") as refused:
        amend(b'{"slo_ttft_ms": ' + b"9" * 1_000_000 + b"}", {})
    assert len(str(refused.value)) < 200


def test_targets_left_out_are_the_engines():
    default = Slo(3.0, 0.1)
    assert slo_of(None, default) is default
    assert slo_of({"else": 1}, default) is default
    assert slo_of({"slo_tpot_ms": 25}, default) == Slo(3.0, 0.025)
    assert slo_of({"slo_ttft_ms": None}, default) == default


# The middleware


def serve(body, path="/v1/completions", headers=(), chunks=1):
    """Send a request through; return the body the server saw, and the messages of the answer."""
    seen, answer = [], []
    size = -(-len(body) // chunks) or 1
    parts = [body[n : n + size] for n in range(0, len(body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": n < len(parts) - 1}
        for n, part in enumerate(parts)
    ]

    async def app(scope, receive, send):
        got = b""
        while True:
            message = await receive()
            got += message.get("body", b"")
            if not message.get("more_body"):
                break
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        assert not lengths or lengths == [b"%d" % len(got)]
        seen.append(got)

    async def receive():
        return messages.pop(0)

    async def send(message):
        answer.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    asyncio.run(Middleware(app)(scope, receive, send))
    return seen, answer


def test_a_request_arrives_amended():
    body = json.dumps({"prompt": "x" * 100, "slo_ttft_ms": 500}).encode()
    seen, _ = serve(body, headers=[(b"content-length", b"%d" % len(body))], chunks=3)
    assert json.loads(seen[0]) == {"prompt": "x" * 100, "vllm_xargs": {"slo_ttft_ms": 500}}


def test_nonsense_is_answered_400():
    seen, answer = serve(b'{"slo_ttft_ms": -5}')
    assert not seen
    assert answer[0]["status"] == 400
    assert "slo_ttft_ms must be more than 0" in json.loads(answer[1]["body"])["error"]["message"]


def test_other_paths_pass():
    body = b'{"slo_ttft_ms": -5}'
    assert serve(body, path="/tokenize")[0] == [body]


def test_a_leader_that_was_followed_is_refused_and_told_so():
    """Health checks show the token too: the newer leader has placed nothing yet."""
    seen, answers = [], []

    async def app(scope, receive, send):
        seen.append(scope["path"])

    async def receive():
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        answers.append(message)

    middleware = Middleware(app)
    for method, path, token in (
        ("POST", "/v1/completions", b"7"),
        ("GET", "/health", b"9"),
        ("POST", "/v1/completions", b"7"),
        ("GET", "/health", b"7"),
        ("POST", "/v1/completions", b"9"),
        ("POST", "/v1/completions", b"nonsense"),
    ):
        scope = {"type": "http", "method": method, "path": path, "headers": [(b"x-headway-fence", token)]}
        asyncio.run(middleware(scope, receive, send))
    assert seen == ["/v1/completions", "/health", "/health", "/v1/completions", "/v1/completions"]
    start, _ = answers
    assert start["status"] == 409
    assert (b"x-headway-fence", b"9") in start["headers"]
