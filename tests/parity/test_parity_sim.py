"""One script of events, two hosts, one decision log, byte for byte.

A simulation is recorded and played back through the public `ScriptedHost`; hand-made scripts go through both.
"""

import random

import pytest

from headway.core.cluster import cluster_policies, create_cluster
from headway.core.decision_log import DecisionLog
from headway.core.events import Failed, Finished, InstanceDown, PrefillDone, Role
from headway.hosts.sim import parse_fault, simulate
from headway.hosts.sim.driver import Driver, Recorder
from headway.hosts.sim.kernel import REPORT, Kernel
from headway.model.presets import load_cluster
from headway.testing import ScriptedHost, arrived, pass_ended, up
from headway.workload.items import Item

SEED = 7


def specs(role):
    return [name for name in cluster_policies.names() if role in cluster_policies.find(name)[0].roles]


def workload(requests, rps):
    rng = random.Random(SEED)
    now = 0.0
    for _ in range(requests):
        now += rng.expovariate(rps)
        yield Item(now, rng.randrange(1, 4000), rng.randrange(1, 20))


CASES = [
    *[(f"{policy}+least-requests", "dsv3-h200-pd", 80.0) for policy in specs(Role.PREFILL)],
    *[(f"round-robin+{policy}", "dsv3-h200-pd", 80.0) for policy in specs(Role.DECODE)],
    *[(policy, "llama8b-h100-x4", 60.0) for policy in specs(Role.AGGREGATED)],
]
FAULTS = {
    "dsv3-h200-pd": ["hang:prefill-0@0.5", "die:prefill-1@1", "recover:prefill-1@2", "recover:prefill-0@8"],
    "llama8b-h100-x4": ["hang:engine-0@0.5", "die:engine-1@1", "recover:engine-1@2", "recover:engine-0@8"],
}


@pytest.mark.parametrize(("policy", "preset", "rps"), CASES)
def test_a_recorded_simulation_replays_to_the_same_decision_log(policy, preset, rps):
    cluster, recorder = load_cluster(preset), Recorder()
    faults = [parse_fault(text) for text in FAULTS[preset]]
    result = simulate(
        cluster, list(workload(200, rps)), policy, "vllm-v1",
        seed=SEED, faults=faults, keep_log=True, observers=[recorder],
    )  # fmt: skip
    host = ScriptedHost(
        create_cluster(policy, disaggregated=cluster.disaggregated, rng=random.Random(f"{SEED}/policy"))
    )
    host.run(recorder.script)
    assert result.log.lines and host.log.text() == result.log.text()


def test_every_registered_policy_is_covered():
    covered = {part for spec, *_ in CASES for part in spec.split("+")}
    assert covered == set(cluster_policies.names())


def through_the_simulators_driver(policy, script):
    kernel, log = Kernel(), DecisionLog()
    driver = Driver(policy, kernel, lambda now, action: None, [log])
    for at_s, event in script:
        kernel.at(at_s, REPORT, lambda now, event=event: driver.feed(event, now))
    kernel.at(script[-1][0], REPORT, lambda now: kernel.stop())
    kernel.run()
    return log.text()


TWO_POOLS = [
    (0.0, up("prefill-0", ranks=2, chunk=1000)),
    (0.0, up("prefill-1", ranks=2, chunk=1000)),
    (0.0, up("decode-0", ranks=4, chunk=64, kv_blocks=500)),
    (0.10, arrived("a", at=0.10, prompt=900)),
    (0.10, arrived("b", at=0.10, prompt=2500)),
    (0.11, arrived("c", at=0.11, prompt=100)),
    (0.11, arrived("too long", at=0.11, prompt=9000)),
    (0.40, PrefillDone("a")),
    (0.40, pass_ended("prefill-0", 1, ran=(900, 1000), acknowledged=2, queued=(0, 1500), duration=0.3)),
    (0.45, arrived("d", at=0.45, prompt=700)),
    (0.70, InstanceDown("prefill-0")),
    (0.70, Failed("b", "instance-failed", True)),
    (0.80, Finished("a", 8)),
    (9.00, up("prefill-0", ranks=2, chunk=1000, epoch=1)),
    (9.50, arrived("e", at=9.5, prompt=30)),
]
ONE_POOL = [
    (0.0, up("engine-0", chunk=512)),
    (0.0, up("engine-1", chunk=512)),
    (1.0, arrived("a", at=1.0, prompt=300)),
    (1.0, arrived("b", at=1.0, prompt=700)),
    (1.2, arrived("c", at=1.2, prompt=50)),
    (1.3, PrefillDone("a")),
    (
        1.3,
        pass_ended("engine-0", 1, ran=(300,), acknowledged=1, running=(1,), waiting=(0,), pab_tokens=(40,)),
    ),
    (1.4, arrived("d", at=1.4, prompt=500)),
    (1.5, Finished("a", 3)),
    (2.5, pass_ended("engine-1", 1, ran=(512,), acknowledged=1, queued=(188,), pab_tokens=(0,))),
    (9.0, arrived("e", at=9.0, prompt=10)),
]


@pytest.mark.parametrize(("policy", "preset", "rps"), CASES)
def test_a_script_made_by_hand_gives_one_log_in_both_hosts(policy, preset, rps):
    disaggregated = preset == "dsv3-h200-pd"
    script = TWO_POOLS if disaggregated else ONE_POOL
    in_simulation, scripted = (
        create_cluster(policy, disaggregated=disaggregated, rng=random.Random(SEED)) for _ in range(2)
    )
    host = ScriptedHost(scripted)
    host.run(script)
    assert host.log.lines and host.log.text() == through_the_simulators_driver(in_simulation, script)
