"""A start script of another router swaps the program's name and works; what differs is said."""

import os
import re
from pathlib import Path

import pytest

from headway.cli import drop_in
from headway.cli.drop_in import read_flags
from headway.cli.drop_in_flags import IDLE, NOTES, REFUSED
from headway.cli.drop_in_policies import BY_LOAD, BY_PREFIX, POLICIES
from headway.core.errors import ConfigError
from headway.core.events import Role

#: What `headway serve` has under the same name.
OWN = {"--host", "--port", "--policy", "--log-level"}
W = ("--worker-urls", "http://a:8000", "http://b:8000")
PD = ("--vllm-pd-disaggregation", "--prefill", "http://p:8000", "--decode", "http://d:8000")


def config(*words: str, **said):
    return read_flags(words, **said).config


def notes(*words: str):
    return read_flags(words).notes


def documented(program: str) -> dict[str, str]:
    """The flags that its --help lists, and how many words follow each."""
    lines = (Path(__file__).parent / f"flags_{program}.txt").read_text().splitlines()
    return dict(line.split() for line in lines)


@pytest.mark.parametrize("program", ["vllm_router", "smg"])
def test_every_flag_of_theirs_is_known_with_as_many_words(program: str):
    known = drop_in._TAKES
    theirs = {flag: words for flag, words in documented(program).items() if flag not in OWN}
    assert {flag: known.get(flag) for flag in theirs} == theirs


def test_no_flag_is_taken_for_one_of_theirs_that_is_none():
    theirs = documented("vllm_router").keys() | documented("smg").keys()
    ours = {"--chunk-tokens", "--open-worker-api", "--admin-token-env"}
    assert drop_in._TAKES.keys() - theirs == ours


@pytest.mark.parametrize(("flag", "takes"), sorted(IDLE.items()))
def test_a_flag_without_effect_is_said_to_have_none(flag: str, takes: str):
    words = {"0": [], "1": ["1"], "*": ["x", "y"], "+": ["x", "y"]}[takes]
    assert notes(*W, flag, *words) == [f"{flag} {NOTES.get(flag, 'has no effect here')}"]


@pytest.mark.parametrize(("flag", "takes"), sorted((flag, takes) for flag, (takes, _) in REFUSED.items()))
def test_a_flag_that_decides_who_gets_in_or_where_requests_go_is_refused(flag: str, takes: str):
    words = {"0": [], "1": ["1"], "*": ["x", "y"], "+": ["x", "y"]}[takes]
    with pytest.raises(ConfigError) as caught:
        read_flags([*W, flag, *words])
    assert str(caught.value) == f"{flag}: {REFUSED[flag][1]}"


#: Words in the names of flags that guard something.
GUARDS = re.compile(r"jwt|auth|tenant|cert|api-key|control-plane|selector|allowed|wasm|tls|trust|secret")
#: They guard nothing by themselves: they refine a flag that is refused, or a database of answers.
HARMLESS = {
    "--priority-scheduler-tenant-metric-top-n",
    "--tenant-header-name",
    "--wasm-middleware-sha256",
    "--wasm-middleware-route",
    "--oracle-external-auth",
    "--mesh-tls-ca-cert",
    "--mesh-tls-cert",
    "--mesh-tls-key",
}


def test_no_flag_that_guards_something_is_taken_without_effect():
    assert {flag for flag in IDLE if GUARDS.search(flag)} - HARMLESS == set()


def test_worker_urls_are_engines():
    made = config(*W)
    assert [(each.name, each.url, each.role) for each in made.instances] == [
        ("a:8000", "http://a:8000", Role.AGGREGATED),
        ("b:8000", "http://b:8000", Role.AGGREGATED),
    ]
    assert made.policy.cluster == "staggered"
    assert (made.server.host, made.server.port) == ("127.0.0.1", 30000)
    assert (made.metrics.host, made.metrics.port) == ("127.0.0.1", 29000)


def test_host_port_and_policy_that_were_read_already_count():
    made = config(*W, host="0.0.0.0", port=0, policy="round_robin")
    assert (made.server.host, made.server.port, made.policy.cluster) == ("0.0.0.0", 0, "round-robin")


@pytest.mark.parametrize(
    ("words", "table", "key", "value"),
    [
        (["--max-payload-size", "1000"], "limits", "max_body_bytes", 1000),
        (["--max-payload-size=1000"], "limits", "max_body_bytes", 1000),
        (["--queue-timeout-secs", "7"], "limits", "queue_timeout_s", 7.0),
        (["--max-concurrent-requests", "50"], "limits", "concurrent_requests", 150),
        (["--max-concurrent-requests", "50", "--queue-size", "0"], "limits", "concurrent_requests", 50),
        (["--max-concurrent-requests", "-1"], "limits", "concurrent_requests", None),
        (["--rate-limit-tokens-per-second", "5"], "limits", "rate_limit_rps", 5.0),
        (["--rate-limit-tokens-per-second", "0"], "limits", "rate_limit_rps", None),
        (["--request-timeout-secs", "60"], "limits", "first_byte_timeout_s", 60.0),
        (["--retry-max-retries", "3"], "limits", "retries", 2),
        (["--disable-retries"], "limits", "retries", 0),
        (["--cb-failure-threshold", "10"], "health", "eject_after", 10),
        (["--cb-failure-threshold", "10"], "health", "breaker", "consecutive"),
        (["--cb-failure-threshold", "4294967295"], "health", "eject_after", 0),
        ([], "health", "breaker", "outlier"),
        (["--disable-circuit-breaker"], "health", "eject_after", 0),
        (["--disable-circuit-breaker", "--cb-failure-threshold", "2"], "health", "eject_after", 0),
        (["--cb-timeout-duration-secs", "60"], "health", "eject_for_s", 60.0),
        (["--health-failure-threshold", "4"], "health", "down_after", 4),
        ([], "limits", "queue_timeout_status", 408),
        (["--request-timeout-secs", "60"], "limits", "answer_timeout_s", 60.0),
        (["--cb-success-threshold", "3", "--health-success-threshold", "2"], "health", "return_after", 3),
        (["--health-check-interval-secs", "9"], "health", "interval_s", 9.0),
        (["--health-check-endpoint", "/ping"], "health", "path", "/ping"),
        (["--prometheus-host", "::", "--prometheus-port", "9090"], "metrics", "port", 9090),
        (["--shutdown-grace-period-secs", "5"], "server", "drain_timeout_s", 5.0),
        (["--chunk-tokens", "2048"], "worker_api", "chunk_tokens", 2048),
        (["--open-worker-api"], "worker_api", "open", True),
        (["--worker-startup-timeout-secs", "600"], "worker_api", "startup_timeout_s", 600.0),
        ([], "worker_api", "open", False),
        (["--admin-token-env", "TOKEN"], "admin", "token_env", "TOKEN"),
        ([], "limits", "max_body_bytes", 32 << 20),
        (["--cors-allowed-origins", "https://a.b", "*"], "cors", "allowed_origins", ("https://a.b", "*")),
    ],
)
def test_a_flag_sets_its_key(words: list[str], table: str, key: str, value: object):
    assert getattr(getattr(config(*W, *words), table), key) == value
    assert notes(*W, *words) == []


def test_data_parallel_ranks_go_by_header():
    (engine, _) = config(*W, "--intra-node-data-parallel-size", "8").instances
    assert (engine.ranks, engine.rank_by) == (8, "header")


# Prefill and decode apart


def test_prefill_and_decode_of_vllm():
    made = config(*PD, "--prefill", "http://q:8000", "none")
    roles = [(each.name, each.role.value, each.dialect, each.bootstrap_port) for each in made.instances]
    assert roles == [
        ("p:8000", "prefill", "vllm", None),
        ("q:8000", "prefill", "vllm", None),
        ("d:8000", "decode", "vllm", None),
    ]
    assert made.disaggregated


def test_a_bootstrap_port_that_vllm_does_not_need_is_said_to_be_unused():
    (note,) = notes(*PD, "--prefill", "http://q:8000", "9000")
    assert note == "--prefill http://q:8000 9000: vLLM's hand-over needs no bootstrap port, unused"


def test_prefill_and_decode_of_sglang():
    words = ("--pd-disaggregation", "--prefill", "http://p:1", "9000", "--prefill", "http://q:1")
    made = config("launch", *words, "--decode", "http://d:1")
    assert [each.bootstrap_port for each in made.instances] == [9000, 8998, None]
    assert {each.dialect for each in made.instances} == {"sglang"}
    assert made.both_legs_at_once


@pytest.mark.parametrize(
    ("policy", "words", "cluster"),
    [
        (None, [], "staggered"),
        ("cache_aware", [], "staggered"),
        ("cache_aware", ["--decode-policy", "cache_aware"], "staggered+least-tokens"),
        ("power_of_two", ["--decode-policy", "round_robin"], "power-of-two+round-robin"),
        ("round_robin", ["--prefill-policy", "random"], "random+round-robin"),
        (None, ["--prefill-policy", "random"], "random"),
        (None, ["--decode-policy", "least-requests"], "staggered+least-requests"),
        ("staggered:spacing=1:lead=0", [], "staggered:spacing=1:lead=0"),
    ],
)
def test_policies_of_both_pools(policy: str | None, words: list[str], cluster: str):
    assert read_flags([*PD, *words], policy=policy).config.policy.cluster == cluster


@pytest.mark.parametrize("name", POLICIES)
def test_their_policies_have_one_of_ours(name: str):
    made = read_flags(W, policy=name)
    assert made.config.policy.cluster == POLICIES[name]
    differs = name in BY_LOAD | BY_PREFIX
    assert len(made.notes) == differs


# Who is who


def test_smg_listens_everywhere_and_its_key_guards_the_door_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(drop_in.DOOR_KEY_ENV, raising=False)
    monkeypatch.delenv(drop_in.ENGINE_KEY_ENV, raising=False)
    made = config("launch", *W, "--api-key", "sesame")
    assert made.server.host == "0.0.0.0"
    assert os.environ[made.auth.api_keys_env] == os.environ[made.auth.engine_api_key_env] == "sesame"
    assert os.environ[made.admin.token_env] == "sesame"  # as there, who has it may add engines
    assert "sesame" not in repr(made)
    for name in (drop_in.DOOR_KEY_ENV, drop_in.ENGINE_KEY_ENV, drop_in.OPERATORS_ENV):
        monkeypatch.delenv(name)


def test_admin_keys_of_the_control_plane_are_the_operators(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(drop_in.OPERATORS_ENV, "")
    keys = ("--control-plane-api-keys", "a:Ops:admin:one", "b:More:admin:two:three")
    made = config("launch", *W, *keys)
    assert os.environ[made.admin.token_env] == "one,two:three"
    assert not made.auth.checks_keys


def test_the_key_of_vllm_router_is_for_the_engines_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(drop_in.ENGINE_KEY_ENV, "")
    made = config(*W, "--api-key", "sesame")
    assert made.auth.api_keys_env is None
    assert os.environ[made.auth.engine_api_key_env] == "sesame"


# Service discovery

SD = ("--service-discovery", "--selector", "app=vllm", "tier=a")
BY_ROLE = ("--prefill-selector", "app=vllm", "role=p", "--decode-selector", "app=vllm", "role=d")


def test_service_discovery_finds_pods_by_a_selector():
    made = config(*SD, "--service-discovery-port", "8000", "--service-discovery-namespace", "llm")
    found = made.discovery
    assert (found.selector, found.target_ports, found.namespace) == ("app=vllm,tier=a", (8000,), "llm")
    assert (found.engine.dialect, found.watched, made.instances) == ("vllm", "app=vllm,tier=a", ())


def test_the_port_is_80_and_what_an_engine_is_comes_from_the_flags():
    made = config("launch", *SD, "--chunk-tokens", "4096", "--intra-node-data-parallel-size", "2")
    engine = made.discovery.engine
    assert made.discovery.target_ports == (80,)
    assert (engine.dialect, engine.chunk_tokens, engine.ranks) == ("sglang", 4096, 2)


def test_prefill_and_decode_pods_have_a_selector_each():
    made = config("launch", "--pd-disaggregation", "--discovery-provider", "kubernetes", *BY_ROLE)
    found = made.discovery
    assert made.disaggregated and found.watched == "app=vllm,role in (p,d)"
    assert found.engine_of(Role.PREFILL).bootstrap_port == 8998
    assert found.engine_of(Role.DECODE).bootstrap_port is None


def test_without_a_namespace_a_note_says_which_is_watched():
    assert notes(*SD) == ["--service-discovery: this pod's namespace is watched; name another one"]
    assert notes(*SD, "--service-discovery-namespace", "llm") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (SD[:1], "--service-discovery: needs --selector KEY=VALUE…"),
        (SD[1:], "--selector: needs --service-discovery"),
        ([*W, "--service-discovery-port", "80"], "--service-discovery-port: needs --service-discovery"),
        ([*SD, *W], "--worker-urls: with --service-discovery the engines are found, not named"),
        ([*SD, "--selector", "app"], "--selector: 'app' is not KEY=VALUE"),
        (["--discovery-provider", "file"], "--discovery-provider file: only kubernetes can be asked here"),
        (["--vllm-pd-disaggregation", *SD], "--service-discovery: needs --prefill-selector KEY=VALUE…"),
    ],
)
def test_discovery_that_does_not_fit_together_is_one_line(words: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        read_flags(words)
    assert str(caught.value) == message


def test_selectors_of_both_roles_need_a_key_in_common():
    words = ("--pd-disaggregation", "--service-discovery", "--prefill-selector", "a=b")
    with pytest.raises(ConfigError, match="need a label's key in common"):
        read_flags([*words, "--decode-selector", "c=d"])


# What is wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*W, "--queue-sizes", "3"], "unknown flag --queue-sizes: did you mean --queue-size?"),
        ([*W, "--confg", "x"], "unknown flag --confg: did you mean --config?"),
        ([*W, "--zzz"], "unknown flag --zzz: see --help"),
        ([*W, "--foo"], "unknown flag --foo: see --help"),
        ([*W, "--dp-aware"], "--dp-aware: needs the ranks of an engine: --intra-node-data-parallel-size N"),
        (
            [*W, "--control-plane-api-keys", "a:b:user:c"],
            "--control-plane-api-keys: only ID:NAME:admin:KEY is known here",
        ),
        ([*W, "--queue-size"], "--queue-size: a value is missing"),
        ([*W, "--queue-size", "many"], "--queue-size: 'many' is not a whole number"),
        ([*W, "--queue-timeout-secs", "nan"], "--queue-timeout-secs: 'nan' is not a number"),
        (["stray"], "command line: nothing takes 'stray'"),
        ([*W, "--enable-igw", "stray"], "command line: nothing takes 'stray'"),
        (["--worker-urls", "a:8000"], "command line: 'a:8000' is not a URL: write http://HOST:PORT"),
        ([*PD, *W], "--worker-urls: with prefill and decode apart, say --prefill and --decode"),
        ([*PD[:3]], "command line: instances: a disaggregated cluster needs a decode instance"),
        ([*PD, "--prefill", "http://q:1", "1", "2"], "--prefill: URL [BOOTSTRAP_PORT], got '2' too"),
        (
            [*PD, "--kv-connector", "mooncake"],
            "--kv-connector mooncake: only nixl's hand-over is spoken here",
        ),
        ([*W, "--encode", "http://e:1"], "--encode: there is no encode pool here, only prefill and decode"),
        ([*W, "--backend", "openai"], "--backend: unknown engine 'openai': (known: sglang, vllm)"),
        (
            [*W, "--tls-cert-path", "a.pem"],
            "TLS needs --tls-cert-path and --tls-key-path: the key is missing",
        ),
        ([*W, *W], "command line: two instances are called 'a:8000'"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        read_flags(words)
    assert str(caught.value) == message


def test_a_misspelt_policy_names_the_nearest_of_theirs_and_ours():
    with pytest.raises(
        ConfigError, match="--policy: unknown policy 'cache_awre': did you mean 'cache_aware'"
    ):
        read_flags(W, policy="cache_awre")


def test_the_reference_names_every_flag_that_is_honoured_or_refused():
    text = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")
    short = {"--health-check-interval-secs": "-interval-secs", "--health-check-endpoint": "-endpoint"}
    named = drop_in._TAKES.keys() - IDLE.keys()
    assert [flag for flag in sorted(named) if f"`{short.get(flag, flag)}" not in text] == []
    assert [name for name in POLICIES if name.removesuffix("ing") not in text] == []
