"""What a picker's file may say, and what is told to its owner when it is wrong."""

import pytest
from typer.testing import CliRunner

from headway.cli import app
from headway.cli.epp import _seconds
from headway.core.cluster.paired import Paired
from headway.core.errors import ConfigError
from headway.front.policy import create_policy
from headway.hosts.envoy.config import EppConfig

ENGINE = {"name": "a", "url": "http://10.0.0.1:8000"}
PD = [
    {"name": "p", "url": "http://10.0.0.1:8000", "role": "prefill"},
    {"name": "d", "url": "http://10.0.0.2:8000", "role": "decode"},
]


def test_ports_are_those_of_the_reference_picker():
    config = EppConfig.parse({})
    assert (config.server.grpc_port, config.server.grpc_health_port, config.metrics.port) == (
        9002,
        9003,
        9090,
    )
    assert (config.tls.mode, config.accounting.by, config.picker.fallbacks) == (
        "self-signed",
        "access-log",
        0,
    )


def test_a_sidecar_is_told_both_at_once_and_phases_place_decode_late():
    assert isinstance(create_policy(EppConfig.parse({"instances": PD})).groups[0].policy, Paired)
    late = create_policy(EppConfig.parse({"instances": PD, "picker": {"handover": "phases"}}))
    assert not isinstance(late.groups[0].policy, Paired)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"instances": [{"name": "a", "url": "http://engine:8000"}]},
            "instance 'a': url needs an address, as 10.0.0.1, not the name 'engine'",
        ),
        ({"picker": {"fallback": 1}}, "unknown key picker.fallback: did you mean 'fallbacks'?"),
        ({"objectives": {"x": {"prio": 1}}}, "unknown key objectives.x.prio: did you mean 'priority'?"),
        ({"tls": {"mode": "files"}}, "mode 'files' goes with certificate and key"),
        ({"tls": {"mode": "off", "certificate": "x"}}, "mode 'files' goes with certificate and key"),
        ({"server": {"grpc_port": 9090}}, "metrics.port: 9090 is server.grpc_port already"),
        (
            {"instances": PD, "picker": {"handover": "phases"}, "accounting": {"by": "events"}},
            "accounting.by: a report does not tell when a phase is over",
        ),
        (
            {"instances": [PD[0] | {"ranks": 2}, PD[1]]},
            "instance 'p': needs rank_by 'port'",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data, message):
    with pytest.raises(ConfigError) as error:
        EppConfig.parse(data)
    assert message in str(error.value) and "\n" not in str(error.value)


def headway_(*arguments):
    return CliRunner().invoke(app, ["epp", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "epp.toml"
    path.write_text('[[instances]]\nname = "a"\nurl = "http://10.0.0.1:8000"\n[server]\ngrpc_port = 7\n')
    return path


def test_a_sound_file_is_said_to_be_sound(file):
    result = headway_("--config", str(file), "--check", "--policy", "least-tokens")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"sound: {file}: least-tokens over 1 aggregated × 1 ranks\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which engines? say --config FILE, --pool-name NAME or --endpoint-selector"),
        (["--config", "none.toml"], "none.toml: cannot read the picker file"),
        (["--config", "FILE", "--policy", "stagered"], "did you mean 'staggered'"),
        (
            ["--config", "FILE", "--metrics-port", "9003"],
            "9003 is server.grpc_health_port already",
        ),
        (["--config", "FILE", "--cert-path", "nowhere"], "tls.certificate: cannot read nowhere/tls.crt"),
        (["--config", "FILE", "--cert-path", "x", "--no-secure-serving"], "there is no certificate"),
        (["--config", "FILE", "--pool-name", "qwen"], "with [discovery] the engines are found there"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_status_2(file, arguments, message):
    result = headway_(*[str(file) if each == "FILE" else each for each in arguments], "--check")
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30.0), ("45", 45.0), ("1m30s", 90.0), ("500ms", 0.5), ("1h", 3600.0)]
)
def test_a_drain_timeout_is_read_as_go_writes_durations(text, seconds):
    assert _seconds(text) == seconds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--drain-timeout", "soon"), "--drain-timeout: not a duration as 30s or 1m30s: 'soon'"),
        (("--drain-timeout", ""), "--drain-timeout: not a duration"),
        (("--endpoint-target-ports", "80,http"), "--endpoint-target-ports: not ports with commas between"),
        (("--endpoint-target-ports", "80,80"), "target_ports has a port twice"),
        (("--pool-name", "p"), "needs one of file, pool and selector, and has pool and selector"),
    ],
)
def test_nonsense_in_llm_ds_flags_is_one_line(arguments, said):
    ports = () if "--endpoint-target-ports" in arguments else ("--endpoint-target-ports", "8000")
    result = headway_("--endpoint-selector", "app=vllm", "--check", *ports, *arguments)
    assert result.exit_code == 2 and said in result.stderr


def test_engines_by_selector_need_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    flags = ("--endpoint-selector", "app=vllm,!canary", "--endpoint-target-ports", "8000,8001")
    result = headway_(*flags, "--pool-namespace", "llm", "--processors", "2", "--check")
    assert result.exit_code == 0, result.output
