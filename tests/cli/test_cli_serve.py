"""`headway serve` and `headway emulate`: what is checked before anything starts, and the whole as a
process.
"""

import fcntl
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from headway.cli import app
from headway.cli.embedded import gateway_data
from headway.cli.emulate import to_toml
from headway.core.events import Role
from headway.hosts.emulator import Endpoint
from headway.hosts.gateway import GatewayConfig
from headway.model.presets import load_cluster

GATEWAY = '[[instances]]\nname = "a"\nurl = "http://127.0.0.1:9"\n'
OTHER = GATEWAY.replace('"a"', '"b"').replace(":9", ":10")
ADMIN = "[admin]\nport = 0\n"
CODE = "from headway.cli import main; main()"


def headway_(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(GATEWAY)
    return path


# Checked before anything starts


def test_a_sound_file_is_said_to_be_sound(file: Path):
    result = headway_("serve", "--config", str(file), "--check", "--policy", "least-tokens")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"sound: {file}: least-tokens over 1 aggregated × 1 ranks\n"


def test_without_a_file_the_embedded_cluster_is_checked():
    result = headway_("serve", "--check", "--cluster", "llama8b-h100", "--policy", "pab")
    assert result.exit_code == 0, result.output
    assert "pab over llama8b-h100, emulated at 0.25 × its speed" in result.stdout


def test_flags_of_other_routers_are_checked_with_a_warning_for_each_that_does_nothing():
    words = ("--worker-urls", "http://a:1", "--cache-threshold", "0.5", "--policy", "cache_aware")
    result = headway_("serve", "--check", *words, "--port", "1234")
    assert result.exit_code == 0, result.output
    assert "staggered over 1 aggregated" in result.stdout
    assert result.stderr.splitlines() == [
        "warning: --policy cache_aware: staggered, which looks for cached prefixes on the ranks free next",
        "warning: --cache-threshold has no effect here",
    ]


def test_what_is_open_to_others_is_a_warning_of_the_check_too():
    words = ("--worker-urls", "http://a:1", "--host", "0.0.0.0", "--open-worker-api")
    result = headway_("serve", "--check", *words, "--port", "1234")
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warning: whoever can connect to 0.0.0.0:1234 can ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.toml"], "none.toml: cannot read the gateway file"),
        (["--config", "FILE", "--policy", "stagered"], "did you mean 'staggered'"),
        (["--config", "FILE", "--queue-size", "3"], "--queue-size: with --config"),
        (["--config", "FILE", "--prot", "1"], "unknown flag --prot: did you mean --port?"),
        (["--config", "FILE", "--dialet=vllm"], "unknown flag --dialet: did you mean --dialect?"),
        (["--config", "FILE", "other.toml"], "nothing takes 'other.toml'"),
        (["--cluster", "llama8b-h100", "--prot", "1"], "unknown flag --prot: did you mean --port?"),
        (["--config", "FILE", "--cluster", "x"], "--cluster is for the embedded cluster"),
        (["--cluster", "dsv3-h201-pd", "--check"], "did you mean 'dsv3-h200-pd'"),
        (["--policy", "stagered"], "did you mean 'staggered'"),
        (["--log-level", "loud"], "logs.level"),
        (["--speed", "0", "--cluster", "llama8b-h100"], "speed must be a positive number"),
        (["--batch", "fare", "--cluster", "llama8b-h100"], "did you mean 'fair'"),
        (["--prot", "1"], "did you mean --port?"),
        (["--foo", "1"], "unknown flag --foo: see --help"),
        (["--port", "abc"], "'--port': 'abc' is not a port (0 to 65535)"),
        (["--port", "70000"], "'--port': '70000' is not a port (0 to 65535)"),
        (["--port"], "'--port' requires an argument"),
        (["--jwt-issuer", "x"], "--jwt-issuer: JSON web tokens are not checked here"),
    ],
)
def test_an_error_is_one_line_and_status_2(arguments: list[str], message: str, file: Path):
    result = headway_("serve", *[str(file) if word == "FILE" else word for word in arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "dsv3"], "unknown cluster preset 'dsv3'"),
        (["--only", "engine-9", "--cluster", "llama8b-h100"], "did you mean 'engine-0'"),
        (["--write-config", "no/such/gateway.toml"], "there is no directory 'no/such'"),
    ],
)
def test_what_cannot_be_emulated_is_one_line(arguments: list[str], message: str):
    result = headway_("emulate", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["serve", "emulate"])
def test_help_teaches_by_example(command: str):
    text = headway_(command, "--help").stdout
    assert "Examples" in text and f"headway {command}" in text


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "[auth]\napi_keys_env = 'NOBODY_SET_IT'",
            "auth.api_keys_env: the environment variable NOBODY_SET_IT",
        ),
        ("[admin]\ntoken_env = 'NOBODY_SET_IT'", "admin.token_env: the environment variable NOBODY_SET_IT"),
        ("[tls]\ncertificate = 'no.pem'\nkey = 'no.key'", "tls"),
        ("[server]\ntokenizer = 'no.json'", "server.tokenizer"),
    ],
)
def test_what_parsing_cannot_find_out_is_told_with_the_file_too(table: str, message: str, file: Path):
    file.write_text(f"{GATEWAY}{table}\n")
    result = headway_("serve", "--config", str(file), "--check")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {file}: {message}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "arguments", "missing"),
    [
        ("httptools", ["--config", "FILE"], True),
        ("zmq", ["--config", "FILE"], True),
        ("aiohttp", ["--config", "FILE"], False),
        ("aiohttp", ["--cluster", "llama8b-h100"], True),
    ],
)
def test_what_is_not_installed_is_missed_where_it_is_needed(
    module: str, arguments: list[str], missing: bool, file: Path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    words = [str(file) if word == "FILE" else word for word in arguments]
    result = headway_("serve", "--check", *words)
    assert (f"error: {module} is missing: pip install 'headway[gateway]'" in result.stderr) == missing
    assert result.exit_code == (2 if missing else 0), result.output


# The embedded cluster as the gateway sees it


def endpoint(name: str, role: Role, ranks: int) -> Endpoint:
    urls = (f"http://127.0.0.1:{ranks}",)
    return Endpoint(
        name, role, urls[0], ranks, "header", "tcp://127.0.0.1:2", "tcp://127.0.0.1:3", None, urls
    )


@pytest.mark.parametrize(("ports", "told"), [((81, 82), None), ((81, 90), (81, 90))])
def test_ports_of_ranks_are_told_where_they_are_not_in_a_row(ports, told):
    urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
    where = ("tcp://127.0.0.1:2", "tcp://127.0.0.1:3")
    prefill = Endpoint("prefill-0", Role.PREFILL, urls[0], 2, "port", *where, None, urls)
    data = gateway_data(load_cluster("dsv3-h200-pd"), [prefill, endpoint("decode-0", Role.DECODE, 32)])
    spec = GatewayConfig.parse(data).instances[0]
    assert (spec.ports, spec.rank_url(1)) == (told, urls[1])


def test_a_gateway_file_for_emulated_engines_reads_back_the_same():
    cluster = load_cluster("dsv3-h200-pd")
    endpoints = [endpoint("prefill-0", Role.PREFILL, 8), endpoint("decode-0", Role.DECODE, 32)]
    data = gateway_data(cluster, endpoints, speed=0.5)
    assert tomllib.loads(to_toml(data)) == data
    config = GatewayConfig.parse(data)
    assert config.disaggregated and config.instances[0].chunk_tokens == 4096
    assert config.instances[1].instance_up(1) == cluster.pools[1].instance_up("decode-0", 1)


def test_targets_and_waits_slow_down_with_the_engines():
    config = GatewayConfig.parse(gateway_data(load_cluster("dsv3-h200-pd"), [], speed=0.1))
    assert (config.slo.ttft_s, config.slo.tpot_s) == pytest.approx((20.0, 0.5))
    assert config.limits.queue_timeout_s == pytest.approx(1200.0)


# As a process


@contextmanager
def serving(*arguments: str):
    """`headway serve` as a process, and its URL."""
    command = [sys.executable, "-c", CODE, "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert "headway serves on http://" in line, line + process.stderr.read()
        yield process, line.split(" on ")[1].split(": ")[0]
    finally:
        process.kill()
        process.communicate()


def get(url: str, body: dict | None = None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=5) as answer:
        return json.load(answer)


def until(condition, timeout_s: float = 5.0) -> None:
    ends_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_s, "it did not come true"
        time.sleep(0.01)


def is_closed(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def test_one_command_serves_and_stops_without_a_trace():
    with serving("--cluster", "llama8b-h100", "--speed", "20") as (process, url):
        assert get(url + "/ready")["ready"] is True
        answer = get(url + "/v1/completions", {"model": "llama8b-h100", "prompt": "abcd", "max_tokens": 3})
        assert answer["choices"][0]["text"] == "tok0 tok1 tok2"
        lines = [process.stdout.readline() for _ in range(3)]
        assert "curl -N http://127.0.0.1" in "".join(lines)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=10)
        assert (process.returncode, err) == (0, "")
        assert is_closed(url)


def page_line(process) -> str:
    return next(line for line in iter(process.stdout.readline, "") if line.startswith("  page"))


def said(process, what: str) -> str:
    """The URL said at the start."""
    return next(line.split()[1] for line in iter(process.stdout.readline, "") if line.split()[0] == what)


def test_the_pages_address_is_printed_where_there_is_one(file: Path):
    with serving("--config", str(file)) as (process, url):
        assert page_line(process).split() == ["page", url + "/"]
    file.write_text(GATEWAY + "[admin]\nport = 0\n")
    with serving("--config", str(file), "--host", "0.0.0.0") as (process, _):
        page = page_line(process).split()[1]
        assert f"  admin    {page.removesuffix('/')}" == process.stdout.readline().rstrip()


def test_what_is_open_to_everyone_has_no_page_without_an_admin_bind(file: Path):
    with serving("--config", str(file), "--host", "0.0.0.0") as (process, _):
        line = page_line(process)
        assert "[admin] token_env" in line and "[admin] port" in line


def test_the_embedded_engines_die_with_a_gateway_that_is_killed():
    with serving("--cluster", "llama8b-h100", "--speed", "20") as (process, _):
        listed = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
        )
        children = [int(pid) for pid in listed.stdout.split()]
        assert children
        process.kill()
        process.wait()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


def test_sighup_reads_the_file_again_and_a_wrong_one_changes_nothing(file: Path):
    file.write_text(GATEWAY + ADMIN)
    with serving("--config", str(file)) as (process, _):
        admin = said(process, "admin")

        def workers() -> list[str]:
            return [worker["name"] for worker in get(admin + "/workers")]

        assert workers() == ["a"]
        file.write_text(GATEWAY + OTHER + ADMIN)
        process.send_signal(signal.SIGHUP)
        until(lambda: workers() == ["a", "b"])
        lines = iter(process.stderr.readline, "")
        file.write_text(GATEWAY + OTHER + ADMIN + "[limits]\nretries = 9\n[slo]\nttft_s = 9\n")
        process.send_signal(signal.SIGHUP)
        assert any("a restart is needed for: [slo], [limits]" in line for line in lines)
        file.write_text("nonsense = 1")
        process.send_signal(signal.SIGHUP)
        assert any("configuration not read again" in line for line in lines)
        assert workers() == ["a", "b"]
        file.write_text(GATEWAY.replace('"a"', '"c"') + 'role = "decode"\n' + ADMIN)
        process.send_signal(signal.SIGHUP)
        assert any("configuration not read again" in line for line in lines)
        assert workers() == ["a", "b"]


def test_sighup_without_a_file_is_logged_and_nothing_else():
    words = ("--worker-urls", "http://127.0.0.1:9", "--prometheus-port", "0")
    with serving(*words) as (process, url):
        process.send_signal(signal.SIGHUP)
        assert any("SIGHUP is ignored" in line for line in iter(process.stderr.readline, ""))
        assert get(url + "/health") == {"status": "ok"}


def test_it_ends_though_nobody_reads_its_logs(file: Path):
    with serving("--config", str(file)) as (process, url):
        reader = process.stderr
        room = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
        host, port = url.removeprefix("http://").split(":")
        client = http.client.HTTPConnection(host, int(port))
        for _ in range(room // 100):  # a line is longer
            client.request("POST", "/v1/chat/completions", body=b"{")
            client.getresponse().read()
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0


def test_the_reference_names_every_key_of_the_configuration():
    docs = Path(__file__).parents[2] / "docs"
    text = "".join(
        (docs / name).read_text(encoding="utf-8") for name in ("gateway.md", "kubernetes.md", "leader.md")
    )
    other = (docs / "operations.md").read_text(encoding="utf-8")
    for table, field in GatewayConfig.model_fields.items():
        assert f"[{table}]" in text or f"`{table}`" in text
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        keys = {key for kind in kinds for key in getattr(kind, "model_fields", {})}
        missing = [key for key in keys if not any(form in text for form in (f"`{key}`", f".{key}]"))]
        missing = [key for key in missing if f"{key} =" not in other]
        assert missing == [], table
