"""Which engine a pod is, and when it joins, drains and leaves."""

import msgspec
import pytest

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.front.config import DiscoverySpec, FrontConfig
from headway.front.discovery.pods import Members, Pod, instance_name

POOL = {"pool": "llama"}


def pod(
    name="vllm-0",
    ip="10.0.0.1",
    *,
    ready=True,
    labels=None,
    annotations=None,
    leaving=False,
    phase="Running",
):
    """A pod as the API server writes it, with fields nobody reads."""
    metadata = {"name": name, "uid": f"uid-of-{name}", "labels": labels, "annotations": annotations}
    if leaving:
        metadata["deletionTimestamp"] = "2026-11-24T10:00:00Z"
    conditions = [
        {"type": "PodScheduled", "status": "True"},
        {"type": "Ready", "status": "True" if ready else "False", "reason": "x"},
    ]
    status = {"phase": phase, "conditions": conditions} | ({"podIP": ip} if ip else {})
    data = {"kind": "Pod", "metadata": metadata, "spec": {"nodeName": "n"}, "status": status}
    return msgspec.json.decode(msgspec.json.encode(data), type=Pod)


def members(*, cluster=None, **discovery):
    config = FrontConfig.parse({"discovery": POOL | discovery} | (cluster or {}))
    return Members(config.discovery, config.check_instance)


PD = {"disaggregated": True}


# What it is


def test_a_pod_of_one_port_is_an_engine_with_the_ranks_that_the_configuration_says():
    (engine,) = members(engine={"ranks": 8, "chunk_tokens": 4096}).update([pod()], [8000]).instances
    assert (engine.name, engine.url, engine.role) == ("vllm-0", "http://10.0.0.1:8000", Role.AGGREGATED)
    assert (engine.ranks, engine.rank_by, engine.chunk_tokens) == (8, "header", 4096)


def test_every_port_of_a_pod_is_a_rank_of_one_engine():
    (engine,) = members().update([pod()], [8000, 8001, 8002]).instances
    assert (engine.ranks, engine.rank_by) == (3, "port")
    assert [engine.rank_url(rank) for rank in range(3)] == [
        "http://10.0.0.1:8000",
        "http://10.0.0.1:8001",
        "http://10.0.0.1:8002",
    ]


def test_ports_that_do_not_follow_each_other_are_ranks_in_the_pools_order():
    (engine,) = members().update([pod()], [9100, 8000]).instances
    assert [engine.rank_url(rank) for rank in range(2)] == ["http://10.0.0.1:9100", "http://10.0.0.1:8000"]


@pytest.mark.parametrize("key", ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"])
def test_a_pod_says_which_of_the_ports_it_serves(key):
    said = pod(annotations={key: "8001, 8000"})
    (engine,) = members().update([said], [8000, 8001, 8002]).instances
    assert engine.ranks == 2 and engine.rank_url(1) == "http://10.0.0.1:8001"
    (engine,) = members().update([pod(annotations={key: "8002"})], [8000, 8001, 8002]).instances
    assert (engine.ranks, engine.url) == (1, "http://10.0.0.1:8002")


def test_an_address_of_ipv6_stands_in_brackets():
    found = members(engine={"events_port": 5557}).update([pod(ip="fd00::1")], [8000, 8001])
    (engine,) = found.instances
    assert engine.url == "http://[fd00::1]:8000" and engine.rank_url(1) == "http://[fd00::1]:8001"
    assert engine.events == "tcp://[fd00::1]:5557"


def test_pass_events_are_at_ports_of_the_pod():
    engine = {"events_port": 5557, "snapshots_port": 5558}
    (found,) = members(engine=engine).update([pod()], [8000]).instances
    assert (found.events, found.snapshots) == ("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558")


@pytest.mark.parametrize(
    ("label", "role"),
    [("prefill", Role.PREFILL), ("decode", Role.DECODE), (None, Role.DECODE)],
)
def test_the_label_says_the_role_and_without_one_the_configuration(label, role):
    labels = {} if label is None else {"llm-d.ai/role": label}
    tables = {"role": "decode", "prefill": {"ranks": 4}, "decode": {"ranks": 32}}
    (engine,) = members(cluster=PD, **tables).update([pod(labels=labels)], [8000]).instances
    assert (engine.role, engine.ranks) == (role, 4 if role is Role.PREFILL else 32)


@pytest.mark.parametrize("label", ["both", "prefill-decode", "encode-prefill-decode", "all", "aggregated"])
def test_who_does_all_is_an_engine_of_an_aggregated_cluster(label):
    (engine,) = members().update([pod(labels={"llm-d.ai/role": label})], [8000]).instances
    assert engine.role is Role.AGGREGATED


def test_the_label_may_have_another_name():
    ours = members(cluster=PD, role_label="example.com/phase")
    (engine,) = ours.update([pod(labels={"example.com/phase": "decode"})], [8000]).instances
    assert engine.role is Role.DECODE


def test_sglang_prefill_engines_have_the_bootstrap_port_and_decode_engines_none():
    engine = {"dialect": "sglang", "bootstrap_port": 8998}
    pods = [
        pod(role, ip, labels={"llm-d.ai/role": role})
        for role, ip in (("prefill", "10.0.0.1"), ("decode", "10.0.0.2"))
    ]
    found = {each.name: each for each in members(cluster=PD, engine=engine).update(pods, [8000]).instances}
    assert (found["prefill"].bootstrap_port, found["decode"].bootstrap_port) == (8998, None)


def test_names_longer_than_ours_may_be_stay_apart():
    one, other = (instance_name("a" * 100 + end) for end in "bc")
    assert len(one) <= 64 and len(other) <= 64 and one != other
    assert instance_name("vllm-decode-7d9f-x2x") == "vllm-decode-7d9f-x2x"


# What does not fit


@pytest.mark.parametrize(
    ("misfit", "why"),
    [
        (
            pod("bad", labels={"llm-d.ai/role": "encode"}),
            "pod bad: label llm-d.ai/role is 'encode', known: aggregated, all, both, decode,",
        ),
        (pod("bad", labels={"llm-d.ai/role": "decode"}), "but the cluster is aggregated"),
        (
            pod("bad", annotations={"llm-d.ai/active-ports": "9"}),
            "pod bad: llm-d.ai/active-ports is '9', but the target ports are 8000",
        ),
    ],
)
def test_a_pod_that_does_not_fit_is_left_out_and_keeps_no_other_out(misfit, why):
    ours = members()
    found = ours.update([misfit, pod("good")], [8000])
    assert [each.name for each in found.instances] == ["good"]
    assert list(ours.misfits) == ["bad"] and why in ours.misfits["bad"]
    assert ours.update([pod("good")], [8000]).instances and not ours.misfits


# When


def test_a_pod_joins_when_it_is_ready_for_the_first_time():
    ours = members()
    for early in (pod(ready=False), pod(ip="", phase="Pending"), pod(leaving=True)):
        assert ours.update([early], [8000]).instances == ()
    found = ours.update([pod()], [8000])
    assert [each.name for each in found.instances] == ["vllm-0"] and not found.draining


def test_a_pod_that_is_ready_no_more_drains_and_is_taken_back():
    ours = members()
    ours.update([pod()], [8000])
    assert ours.update([pod(ready=False)], [8000]).draining == {"vllm-0"}
    assert ours.update([pod()], [8000]).draining == frozenset()


def test_a_pod_that_is_being_deleted_drains_while_it_is_there():
    ours = members()
    ours.update([pod()], [8000])
    found = ours.update([pod(leaving=True)], [8000])
    assert [each.name for each in found.instances] == ["vllm-0"] and found.draining == {"vllm-0"}
    assert ours.update([], [8000]).instances == ()


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_ended_leaves_and_must_be_ready_again_to_join(phase):
    ours = members()
    ours.update([pod()], [8000])
    assert ours.update([pod(phase=phase)], [8000]).instances == ()
    assert ours.update([pod(ready=False)], [8000]).instances == ()


def test_a_pod_of_the_same_name_with_another_address_is_another_engine():
    ours = members()
    ours.update([pod()], [8000])
    (engine,) = ours.update([pod(ip="10.0.0.2")], [8000]).instances
    assert engine.url == "http://10.0.0.2:8000"


def test_other_ports_of_the_pool_make_other_engines():
    ours, same = members(), pod()
    assert ours.update([same], [8000]).instances[0].ranks == 1
    assert ours.update([same], [8000, 8001]).instances[0].ranks == 2


# What `[discovery]` may say


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({}, "discovery: needs one of file, pool and selector, and has none"),
        ({"pool": "a", "file": "b.toml"}, "has file and pool"),
        ({"selector": "app=vllm"}, "selector and target_ports go together"),
        ({"pool": "a", "target_ports": [8000]}, "selector and target_ports go together"),
        ({"selector": "app=vllm", "target_ports": [80, 80]}, "target_ports has a port twice"),
        (
            {"prefill_selector": "a=b", "target_ports": [80]},
            "prefill_selector and decode_selector go together",
        ),
        (
            {"prefill_selector": "a=b", "decode_selector": "c=d", "target_ports": [80]},
            "prefill_selector and decode_selector need a label's key in common",
        ),
        ({"prefill_selector": "a in (b)", "decode_selector": "a=c"}, "discovery.prefill_selector"),
        ({"prefill_selector": "a=b", "decode_selector": "a=c"}, "selector and target_ports go together"),
        ({"pool": "../secrets"}, "discovery.pool"),
        ({"pool": "a", "engine": {"rank": 8}}, "unknown key discovery.engine.rank: did you mean 'ranks'?"),
        ({"pool": "a", "namespaces": "b"}, "unknown key discovery.namespaces: did you mean 'namespace'?"),
    ],
)
def test_a_wrong_table_is_one_line_that_names_the_key(table, why):
    with pytest.raises(ConfigError) as error:
        FrontConfig.parse({"discovery": table})
    assert why in str(error.value) and "\n" not in str(error.value)


def test_engines_are_either_listed_or_found():
    with pytest.raises(ConfigError, match=r"instances: with \[discovery\] the engines are found there"):
        FrontConfig.parse({"discovery": POOL, "instances": [{"name": "a", "url": "http://a:1"}]})


def test_a_selector_takes_the_place_of_a_pool():
    spec = DiscoverySpec(selector="app in (vllm),!canary", target_ports=(8000, 8001))
    assert spec.pool is None and spec.target_ports == (8000, 8001)


BY_ROLE = {
    "prefill_selector": "app=vllm,component=prefill",
    "decode_selector": "app=vllm,component=decode",
    "target_ports": [8000],
}


def test_roles_are_told_by_a_selector_each():
    config = FrontConfig.parse({"discovery": BY_ROLE} | PD)
    assert config.discovery.watched == "app=vllm,component in (prefill,decode)"
    found = Members(config.discovery, config.check_instance)
    pods = [
        pod(name=f"vllm-{component}", ip=ip, labels={"app": "vllm", "component": component})
        for component, ip in (("prefill", "10.0.0.1"), ("decode", "10.0.0.2"), ("router", "10.0.0.3"))
    ]
    roles = {each.name: each.role for each in found.update(pods, [8000]).instances}
    assert roles == {"vllm-prefill": Role.PREFILL, "vllm-decode": Role.DECODE}
    why = found.misfits["vllm-router"]
    assert why == "pod vllm-router: its labels match neither of prefill_selector and decode_selector"
