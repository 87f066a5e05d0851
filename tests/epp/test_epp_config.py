"""What a picker's file may say, and what is told to its owner when it is wrong."""

import pytest
from typer.testing import CliRunner

from headway.cli import app
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
    assert isinstance(create_policy(EppConfig.parse({"instances": PD})), Paired)
    late = create_policy(EppConfig.parse({"instances": PD, "picker": {"handover": "phases"}}))
    assert not isinstance(late, Paired)


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
        ([], "which engines? say --config FILE or --pool-name NAME"),
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
