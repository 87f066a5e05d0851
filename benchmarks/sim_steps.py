"""Simulated engine steps per second, end to end: kernel, engine model, batch policy, cluster policy.

    python -m benchmarks.sim_steps

A step is one pass of one lockstep group, however many ranks it has; rank steps count each rank of it.
What a step costs depends on how many requests arrive, are placed and finish in its time, so requests per
second stand beside it. Engines of one rank step one by one, a few requests at a time ("24 engines", the case
with the target for `staggered`); a decode pass of EP32 serves up to 4,096 requests, and there are more
requests than steps.
"""

from benchmarks import Figure, cpu_s, show
from headway.core.actions import Action
from headway.core.cluster.pool import PoolPolicy
from headway.core.events import Arrived, Event, InstanceUp, PassEnded, Role
from headway.hosts.sim import SimResult, simulate
from headway.model.cluster import ClusterSpec
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.workload import Item, make_items, parametric

#: `InTurn`, as a policy spec.
IN_TURN = "benchmarks.sim_steps:InTurn"


class InTurn(PoolPolicy):
    """Places requests on ranks in turn and hears of nothing else: what a step costs without a policy."""

    dispatches = 0

    def handle(self, event: Event, now: float) -> list[Action]:
        """Answer arrivals only."""
        if isinstance(event, InstanceUp):
            self.ledger.up(event)
        if not isinstance(event, Arrived):
            return []
        rank = self.ledger.ranks[self.dispatches % len(self.ledger.ranks)]
        self.dispatches += 1
        return [self.ledger.place(event.request, rank, now, "in-turn")]

    def _place(self, now: float) -> None:
        """Nothing is ever held."""


def long_outputs(requests: int) -> list[Item]:
    """Return requests that decode for long: hardly any arrivals, so steps are all there is."""
    return [Item(0.02 * number, 800, 8_000) for number in range(requests)]


def at_load(cluster: ClusterSpec, workload: str, requests: int, load: float = 0.8) -> list[Item]:
    """Return Poisson arrivals at a share of the cluster's nominal capacity."""
    source = parametric(workload)
    capacity = nominal_capacity_rps(cluster, source.mean_prompt_tokens, source.mean_output_tokens)
    return make_items(source, rps=load * capacity, arrivals="poisson", requests=requests, seed=0)


def measure(case: str, cluster: ClusterSpec, policy: str, items: list[Item], target: int = 0) -> Figure:
    results: list[SimResult] = []
    rank_steps = 0

    def count(now: float, event: object, actions: object) -> None:
        nonlocal rank_steps
        if isinstance(event, PassEnded):
            rank_steps += len(event.ran_tokens)

    spent_s = cpu_s(lambda: results.append(simulate(cluster, items, policy, "vllm-v1")))
    steps_s = results[0].steps / spent_s
    simulate(cluster, items, policy, "vllm-v1", observers=[count])
    figure = (
        f"{steps_s:,.0f} steps/s ({rank_steps / spent_s:,.0f} rank steps, "
        f"{len(items) / spent_s:,.0f} requests)"
    )
    aim = f"{target:,} steps/s" if target else ""
    name = "no policy" if policy.startswith(IN_TURN) else policy
    return Figure("simulator", f"{name}: {case}", figure, aim, steps_s >= target if target else None)


def figures() -> list[Figure]:
    dense, deepseek = load_cluster("llama8b-h100"), load_cluster("dsv3-h200-pd")
    ranks24 = dense.with_pool(Role.AGGREGATED, instances=24)
    return [
        measure("one rank, decodes only", dense, IN_TURN, long_outputs(32), 50_000),
        measure("one rank, decodes only", dense, "round-robin", long_outputs(32)),
        measure("EP8 + EP32, decodes only", deepseek, f"{IN_TURN}+{IN_TURN}", long_outputs(64)),
        measure("EP8 + EP32, decodes only", deepseek, "round-robin", long_outputs(64)),
        measure(
            "24 engines, conversations", ranks24, "staggered", at_load(ranks24, "azure-conv", 4_000), 15_000
        ),
        measure(
            "3 × EP8 + EP32, conversations", deepseek, "staggered", at_load(deepseek, "azure-conv", 4_000)
        ),
        measure("3 × EP8 + EP32, code", deepseek, "staggered", at_load(deepseek, "azure-code", 2_000)),
        measure(
            "3 × EP8 + EP32, conversations", deepseek, "least-tokens", at_load(deepseek, "azure-conv", 4_000)
        ),
    ]


if __name__ == "__main__":
    show(figures())
