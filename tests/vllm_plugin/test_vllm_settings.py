"""What the plug-in reads, and how it says no."""

import pytest

from headway.core.errors import ConfigError
from headway.core.request import Slo
from headway.hosts.vllm.settings import read
from headway.hosts.vllm.versions import SUPPORTED, require_supported


def test_nothing_said_is_fair():
    settings = read({}, {})
    assert settings.policy == "fair"
    assert settings.slo == Slo(2.0, 0.05)
    assert settings.events is None


def test_additional_config_goes_before_the_environment():
    environment = {"HEADWAY_TTFT_S": "1", "HEADWAY_TPOT_S": "0.1", "HEADWAY_POLICY": "triage"}
    settings = read({"headway": {"ttft_s": 0.5}}, environment)
    assert (settings.ttft_s, settings.tpot_s, settings.policy) == (0.5, 0.1, "triage")


def test_the_margin_is_the_policys():
    policy = read({"headway": {"policy": "triage:relegated_share=0.1", "margin": 0.75}}, {}).make_policy(None)
    assert policy.settings.margin_quantile == 0.75
    assert policy.settings.relegated_share == 0.1


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"polcy": "fair"}, "unknown setting 'polcy': did you mean 'policy'"),
        ({"policy": "fiar"}, "unknown batch policy 'fiar': did you mean 'fair'"),
        ({"policy": "fair:marge=1"}, "unknown setting 'marge'"),
        ({"ttft_s": -1}, "ttft_s must be at least 0.001"),
        ({"ttft_s": "soon"}, "ttft_s must be a number, got 'soon'"),
        ({"tpot_s": True}, "tpot_s must be a number"),
        ({"margin": 2}, "margin must be at most 1"),
        ({"policy": "vllm-v1", "margin": 0.5}, "unknown setting 'margin_quantile'"),
        ({"snapshots": "tcp://*:1"}, "snapshots needs events"),
        ("fair", "must be a map"),
    ],
)
def test_bad_settings_get_one_line(given, complaint):
    with pytest.raises(ConfigError) as told:
        read({"headway": given}, {})
    assert complaint in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("version", [*SUPPORTED, "0.32.0", "0.31.1+cpu", "0.30.2rc1"])
def test_supported_versions(version):
    require_supported(version)


@pytest.mark.parametrize("version", ["0.29.9", "0.33.0", "0.3", "1.0", "dev"])
def test_other_versions_are_refused(version):
    with pytest.raises(ConfigError, match=f"supports vLLM 0.30, 0.31, 0.32; this is vLLM {version}"):
        require_supported(version)


@pytest.mark.parametrize("setting", ["events", "snapshots"])
@pytest.mark.parametrize("port", ["99999", "65536", "-1", "", "0x10", "1e3", "port", "٣"])
def test_a_port_that_cannot_be_is_refused_at_the_start(setting, port):
    addresses = {"events": "tcp://127.0.0.1:5557"} | {setting: f"tcp://127.0.0.1:{port}"}
    with pytest.raises(ConfigError, match=f"{setting}: 'tcp://127.0.0.1:.*' needs a port from 0 to 65535"):
        read({"headway": addresses}, {})


@pytest.mark.parametrize("address", ["tcp://*:0", "tcp://127.0.0.1:*", "tcp://[::1]:65535", "ipc:///tmp/x"])
def test_addresses_that_can_be(address):
    assert read({"headway": {"events": address}}, {}).events == address
