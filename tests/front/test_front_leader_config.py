"""What [leader] may say, and what a person is told who said it wrongly."""

import pytest

from headway.core.cluster.led import Led
from headway.core.errors import ConfigError
from headway.front.config import FrontConfig
from headway.front.lease import create_elector
from headway.front.policy import create_policy

VALKEY = {"backend": "valkey", "url": "valkey://10.0.0.9:6379"}


def config_of(**leader):
    return FrontConfig.parse({"leader": leader}, where="gateway.toml")


def elector_of(config):
    return create_elector(config, clock=lambda: 0.0, feed=lambda event: None)


def test_without_it_the_process_is_alone_and_leads():
    config = config_of()
    elector = elector_of(config)
    assert elector.leads() and not elector.shared
    assert elector.headers() == {}
    assert not isinstance(create_policy(config), Led)


def test_with_a_store_it_does_not_lead_before_the_store_says_so():
    config = config_of(**VALKEY)
    elector = elector_of(config)
    assert elector.shared and not elector.leads()
    assert elector.headers() == {}
    assert isinstance(create_policy(config), Led)
    assert elector.standing() == {
        "pool": "default",
        "leads": False,
        "token": None,
        "leader": None,
        "why": "it has not asked for the lease yet",
    }


def test_a_request_waits_two_leases_for_a_leader_unless_told_otherwise():
    assert config_of(lease_s=3.0).leader.patience_s == 6.0
    assert config_of(lease_s=3.0, wait_s=0).leader.patience_s == 0.0


def test_the_pool_is_that_where_engines_are_found_unless_it_is_named():
    found = {"discovery": {"pool": "llama", "api_server": "http://10.0.0.1"}}
    assert FrontConfig.parse(found).pool_name == "llama"
    assert FrontConfig.parse(found | {"leader": {"pool": "mine"}}).pool_name == "mine"
    assert FrontConfig.parse({}).pool_name == "default"


@pytest.mark.parametrize(
    ("leader", "told"),
    [
        ({"backend": "etcd"}, "gateway.toml: leader.backend: input should be 'memory', 'valkey' or"),
        ({"backed": "valkey"}, "gateway.toml: unknown key leader.backed: did you mean 'backend'?"),
        ({"backend": "valkey"}, "gateway.toml: leader: backend 'valkey' needs url"),
        (
            {"url": "valkey://a"},
            "gateway.toml: leader: url is for backend 'valkey', and this is 'memory'",
        ),
        (
            VALKEY | {"namespace": "inference"},
            "gateway.toml: leader: namespace is for backend 'kubernetes-lease', and this is 'valkey'",
        ),
        (VALKEY | {"url": "http://a"}, "gateway.toml: leader.url: must be valkey://HOST[:PORT][/DB]"),
        (VALKEY | {"url": "valkey://:secret@a"}, "leader.url: must not have a user or a password"),
        (VALKEY | {"url": "valkey://a/zero"}, "leader.url: must have nothing after HOST[:PORT] but"),
        (VALKEY | {"url": "valkey://a:port"}, "leader.url: must be valkey://HOST[:PORT][/DB]"),
        (VALKEY | {"lease_s": 0.1}, "leader.lease_s: input should be greater than or equal to 0.5, got 0.1"),
        (VALKEY | {"pool": "My Pool"}, "leader.pool: string should match pattern"),
        (
            VALKEY | {"replicas": ["a", "b"], "replica": "c"},
            "leader: replicas needs replica to be one of them, and it is 'c'",
        ),
        (VALKEY | {"replicas": ["a", "b"]}, "replicas needs replica to be one of them, and it is None"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(leader, told):
    with pytest.raises(ConfigError) as error:
        config_of(**leader)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_password_that_is_not_set_is_told_before_anything_starts():
    with pytest.raises(ConfigError, match=r"leader\.password_env: the environment variable NOT_SET"):
        elector_of(config_of(**VALKEY, password_env="NOT_SET"))


def test_outside_of_a_pod_kubernetes_needs_an_api_server(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match=r"leader\.api_server: missing, and this is no pod"):
        elector_of(config_of(backend="kubernetes-lease"))
