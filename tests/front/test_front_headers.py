"""What passes from engines to clients: nothing that names a server behind the front door."""

import time

import pytest

from headway.front.errors import engine_failed
from headway.front.headers import headers_for_client, without_addresses

ENGINE = "http://10.0.0.1:8000"


def test_headers_that_name_servers_are_dropped():
    headers = {
        "content-type": "application/json",
        "server": "uvicorn",
        "via": "1.1 engine-0",
        "x-envoy-upstream-service-time": "3",
        "x-backend-server": "engine-0",
        "x-custom": "served by 10.0.0.1:8000",
        "set-cookie": "a=1",
        "retry-after": "3",
    }
    kept = headers_for_client(headers, ENGINE)
    assert kept == {"Content-Type": "application/json", "Retry-After": "3"}


def test_an_engines_cors_headers_do_not_widen_the_gateways():
    assert headers_for_client({"access-control-allow-origin": "*"}, ENGINE) == {}


def test_a_redirect_to_the_engine_becomes_a_path():
    redirect = {"location": "http://10.0.0.1:8000/v1/x?a=1"}
    assert headers_for_client(redirect, ENGINE) == {"Location": "/v1/x?a=1"}
    elsewhere = {"location": "https://files.example/x"}
    assert headers_for_client(elsewhere, ENGINE) == {"Location": "https://files.example/x"}


def test_headers_of_the_connection_end_with_it():
    headers = {"connection": "X-Hop, close", "x-hop": "1", "transfer-encoding": "chunked", "x-kept": "1"}
    assert headers_for_client(headers, ENGINE) == {"X-Kept": "1"}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("connect to 10.0.0.1:8000 failed", "connect to [address] failed"),
        ("http://engine.svc:8000/v1/x is down", "[address]/v1/x is down"),
        ("tcp://[fd00::1]:5600", "[address]"),
        ("bind [::1]:80", "bind [address]"),
        ("worker-10.0.0.1 to -10.0.0.2", "worker-[address] to -[address]"),
        ("x-http://a:1/b, ip-10-0-0-1.ec2:80", "[address]/b, [address]"),
        ("max 4096.0 tokens, version 0.32.1", "max 4096.0 tokens, version 0.32.1"),
        ("list [1, 2] and 'a::b'", "list [1, 2] and 'a::b'"),
    ],
)
def test_addresses_in_an_engines_words_are_replaced(text: str, clean: str):
    assert without_addresses(text) == clean


def cpu_s(text: str) -> float:
    """Return the CPU time of replacing addresses: the least of a few."""

    def once() -> float:
        began_s = time.process_time()
        without_addresses(text)
        return time.process_time() - began_s

    return min(once() for _ in range(5))


@pytest.mark.parametrize("piece", ["-", "a-", "a.", "a+", ":", "[", "1.", "http://[", "a.b:1", "x"])
def test_the_time_to_replace_addresses_grows_no_faster_than_the_text(piece: str):
    small, large = ("[" + piece * (size // len(piece)) for size in (4096, 65_536))
    assert cpu_s(large) < 100 * max(cpu_s(small), 1e-5)  # 16 times the text; where it is squared, 256 times


@pytest.mark.parametrize(
    ("status", "code", "waits"),
    [
        (429, "engine_overloaded", True),
        (502, "engine_error", False),
        (503, "engine_unavailable", True),
        (504, "engine_timeout", False),
    ],
)
def test_an_engines_failure_names_no_engine(status: int, code: str, waits: bool):
    refusal = engine_failed(status, "no route to 10.0.0.1")
    assert (refusal.status, refusal.code) == (status, code)
    assert "10.0.0.1" not in str(refusal)
    assert ("Retry-After" in refusal.headers()) is waits
