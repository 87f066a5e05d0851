"""What a gateway file may say, and how it is told what is wrong."""

from pathlib import Path

import pytest

from headway.core.cluster.paired import Paired
from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.front.policy import create_policy
from headway.hosts.gateway import GatewayConfig

FILE = """
[server]
host = "0.0.0.0"
port = 9000

[[instances]]
name = "prefill-0"
url = "http://10.0.0.1:8000/"
role = "prefill"
ranks = 8
rank_by = "port"
chunk_tokens = 4096

[[instances]]
name = "decode-0"
url = "http://10.0.0.2:8000"
role = "decode"
ranks = 32
kv_blocks = 20000
max_running = 256

[policy]
cluster = "staggered+iqr-lexicographic"

[slo]
ttft_s = 1.0
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    return path


def test_a_file_is_read(tmp_path):
    config = GatewayConfig.from_toml(written(tmp_path, FILE))
    assert config.disaggregated and not config.both_legs_at_once
    prefill, decode = config.instances
    assert [prefill.rank_url(rank) for rank in (0, 3)] == ["http://10.0.0.1:8000", "http://10.0.0.1:8003"]
    assert decode.rank_url(3) == "http://10.0.0.2:8000"
    up = decode.instance_up(epoch=2)
    assert (up.role, up.ranks, up.kv_blocks, up.epoch) == (Role.DECODE, 32, 20000, 2)
    assert config.slo.slo().ttft_s == 1.0


def test_an_empty_file_is_a_gateway_without_engines(tmp_path):
    assert GatewayConfig.from_toml(written(tmp_path, "")).instances == ()


AGGREGATED = {"name": "a", "url": "http://h:1"}
SGLANG = {"dialect": "sglang", "url": "http://h:1"}

WRONG = [
    (
        {"instances": [{"name": "a", "url": "http://h"}, {"name": "b", "url": "http://H:80/"}]},
        r"instance 'b': http://H:80 is the address of 'a' already: an engine has one name",
    ),
    (
        {
            "instances": [
                {"name": "a", "url": "http://h:1", "ranks": 4, "rank_by": "port"},
                {"name": "b", "url": "http://h:3"},
            ]
        },
        r"instance 'b': http://h:3 is the address of 'a' already",
    ),
    ({"limits": {"queue_timeout_s": 1e300}}, r"limits\.queue_timeout_s: .*less than or equal to 604800"),
    ({"sever": {}}, r"unknown key sever: did you mean 'server'\?"),
    ({"limits": {"retrys": 1}}, r"unknown key limits\.retrys: did you mean 'retries'\?"),
    ({"instances": [AGGREGATED | {"ulr": ""}]}, r"unknown key instances\[0\]\.ulr: did you mean 'url'\?"),
    ({"instances": [{"name": "a"}]}, r"missing key instances\[0\]\.url"),
    ({"instances": [AGGREGATED | {"url": "ftp://h"}]}, r"instances\[0\]\.url: must be http"),
    ({"instances": [AGGREGATED | {"url": "http://h:99999"}]}, r"instances\[0\]\.url: must be http"),
    (
        {"instances": [AGGREGATED | {"ranks": 0}]},
        r"instances\[0\]\.ranks: .*greater than or equal to 1, got 0",
    ),
    ({"instances": [AGGREGATED | {"dialect": "tgi"}]}, r"instances\[0\]\.dialect: .*'vllm' or 'sglang'"),
    ({"instances": [AGGREGATED, AGGREGATED]}, "two instances are called 'a'"),
    ({"instances": [AGGREGATED | {"role": "prefill"}]}, "needs a decode instance"),
    (
        {"instances": [AGGREGATED, AGGREGATED | {"name": "b", "role": "decode"}]},
        "instance 'a' has role 'aggregated'",
    ),
    ({"instances": [AGGREGATED | {"snapshots": "tcp://h:1"}]}, "snapshots needs events"),
    ({"instances": [AGGREGATED | {"bootstrap_port": 1}]}, "bootstrap_port is for dialect 'sglang'"),
    (
        {"instances": [SGLANG | {"name": "p", "role": "prefill"}, SGLANG | {"name": "d", "role": "decode"}]},
        "instance 'p': missing key bootstrap_port",
    ),
    ({"policy": {"cluster": "stagered"}}, "unknown policy 'stagered': did you mean 'staggered'"),
    ({"policy": {"cluster": "staggered:spacing=9"}}, "spacing must be at most 1"),
    ({"slo": {"ttft_s": 0}}, r"slo\.ttft_s: .*greater than 0, got 0"),
    ({"slo": {"ttft_s": float("nan")}}, r"slo\.ttft_s"),
    ({"tls": {"certificate": "c.pem"}}, r"missing key tls\.key"),
    ({"policy": {"cluster": "a+b"}}, r"policy\.cluster: .*names two policies"),
    ({"instances": [AGGREGATED | {"url": "http://a..b:80"}]}, r"instances\[0\]\.url: the host's name must"),
    (
        {"instances": [AGGREGATED | {"url": f"http://{'a' * 64}:80"}]},
        r"instances\[0\]\.url: .*1 to 63 characters",
    ),
    ({"instances": [AGGREGATED | {"url": "http://h:1/a b"}]}, r"instances\[0\]\.url: must not have spaces"),
    *(
        (
            {"instances": [AGGREGATED | {"events": address}]},
            r"instances\[0\]\.events: must be tcp://HOST:PORT",
        )
        for address in ("nonsense", "http://h:1", "tcp://h", "tcp://h:0", "tcp://*:5557", "ipc://")
    ),
    *(
        (
            {"instances": [AGGREGATED | {"events": "tcp://h:1"} | {key: address}]},
            rf"instances\[0\]\.{key}: the port must be from 1 to 65535",
        )
        for key in ("events", "snapshots")
        for address in ("tcp://127.0.0.1:99999", "tcp://[::1]:65536")
    ),
    ({"admin": {"port": 8080}}, r"admin\.port: 8080 is server\.port already"),
    ({"server": {"host": "0.0.0.0"}, "metrics": {"port": 8080}}, r"metrics\.port: 8080 is server\.port"),
    ({"admin": {"port": 9090}, "metrics": {"port": 9090}}, r"metrics\.port: 9090 is admin\.port already"),
    ({"admin": {"host": "0.0.0.0", "port": 9090}}, r"admin\.host: .*admin\.token_env is missing"),
]

SOUND = [
    {"server": {"port": 0}, "admin": {"port": 0}, "metrics": {"port": 0}},
    {"server": {"host": "10.0.0.1", "port": 80}, "metrics": {"port": 80}},
    {"server": {"host": "::", "port": 80}, "metrics": {"host": "127.0.0.1", "port": 80}},
    {"admin": {"host": "0.0.0.0", "port": 9090, "token_env": "TOKEN"}},
    {"admin": {"host": "::1", "port": 9090}},
    {"admin": {"host": "0.0.0.0"}},
    {"instances": [AGGREGATED | {"events": "tcp://[::1]:5557", "snapshots": "ipc:///run/engine"}]},
    {"instances": [AGGREGATED | {"url": "http://[::1]:8000"}]},
]


@pytest.mark.parametrize("data", SOUND)
def test_what_is_sound(data):
    GatewayConfig.parse(data)


@pytest.mark.parametrize(("data", "message"), WRONG)
def test_what_is_wrong_is_told_in_one_line_with_file_and_key(data, message):
    with pytest.raises(ConfigError, match=message) as caught:
        GatewayConfig.parse(data, where="gateway.toml")
    assert str(caught.value).startswith("gateway.toml: ") and "\n" not in str(caught.value)


def test_a_file_that_is_missing_or_no_toml(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the gateway file: No such file"):
        GatewayConfig.from_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not TOML"):
        GatewayConfig.from_toml(written(tmp_path, "= 3"))


def test_sglang_in_two_pools_gets_both_legs_at_once():
    pair = [
        SGLANG | {"name": "p", "role": "prefill", "bootstrap_port": 8998},
        SGLANG | {"name": "d", "role": "decode", "url": "http://h:2"},
    ]
    config = GatewayConfig.parse({"instances": pair})
    assert config.both_legs_at_once and isinstance(create_policy(config).groups[0].policy, Paired)
