"""A start script of another router swaps the program's name and works; what differs is said."""

import os
from pathlib import Path

import pytest

from headway.cli import drop_in
from headway.cli.drop_in import POLICIES, read_flags
from headway.cli.drop_in_flags import IDLE
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
    assert drop_in._TAKES.keys() - theirs == {"--chunk-tokens"}


@pytest.mark.parametrize(("flag", "takes"), sorted(IDLE.items()))
def test_a_flag_without_effect_is_said_to_have_none(flag: str, takes: str):
    words = {"0": [], "1": ["1"], "*": ["x", "y"], "+": ["x", "y"]}[takes]
    assert notes(*W, flag, *words) == [f"{flag} has no effect here"]


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
        (["--cb-failure-threshold", "10", "--health-failure-threshold", "4"], "health", "eject_after", 4),
        (["--cb-success-threshold", "3", "--health-success-threshold", "2"], "health", "return_after", 3),
        (["--health-check-interval-secs", "9"], "health", "interval_s", 9.0),
        (["--health-check-endpoint", "/ping"], "health", "path", "/ping"),
        (["--prometheus-host", "::", "--prometheus-port", "9090"], "metrics", "port", 9090),
        (["--shutdown-grace-period-secs", "5"], "server", "drain_timeout_s", 5.0),
        (["--chunk-tokens", "2048"], "worker_api", "chunk_tokens", 2048),
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
    differs = name in drop_in._BY_LOAD | drop_in._BY_PREFIX
    assert len(made.notes) == differs


# Who is who


def test_smg_listens_everywhere_and_its_key_guards_the_door_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(drop_in.DOOR_KEY_ENV, raising=False)
    monkeypatch.delenv(drop_in.ENGINE_KEY_ENV, raising=False)
    made = config("launch", *W, "--api-key", "sesame")
    assert made.server.host == "0.0.0.0"
    assert os.environ[made.auth.api_keys_env] == os.environ[made.auth.engine_api_key_env] == "sesame"
    assert "sesame" not in repr(made)
    monkeypatch.delenv(drop_in.DOOR_KEY_ENV)
    monkeypatch.delenv(drop_in.ENGINE_KEY_ENV)


def test_the_key_of_vllm_router_is_for_the_engines_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(drop_in.ENGINE_KEY_ENV, "")
    made = config(*W, "--api-key", "sesame")
    assert made.auth.api_keys_env is None
    assert os.environ[made.auth.engine_api_key_env] == "sesame"


# What is wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*W, "--queue-sizes", "3"], "unknown flag --queue-sizes: did you mean --queue-size?"),
        ([*W, "--confg", "x"], "unknown flag --confg: did you mean --config?"),
        ([*W, "--zzz"], "unknown flag --zzz: see --help"),
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


def test_the_reference_names_every_flag_that_is_honoured():
    text = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")
    short = {"--health-check-interval-secs": "-interval-secs", "--health-check-endpoint": "-endpoint"}
    honoured = drop_in._TAKES.keys() - IDLE.keys()
    assert [flag for flag in sorted(honoured) if f"`{short.get(flag, flag)}" not in text] == []
    assert [name for name in POLICIES if name.removesuffix("ing") not in text] == []
