"""Simulated engine steps per second, end to end: kernel, engine model, batch policy, cluster policy.

    python -m benchmarks.sim_steps

A step is one pass of one lockstep group, however many ranks it has; rank steps count each rank of it. What a step
costs depends on how many requests arrive, are placed and finish per step, so requests per second stand beside it:
on `dsv3-h200-pd` a decode pass of 32 ranks serves some 2,000 requests at once, and there are more requests than
steps.
"""

from headway.core.events import PassEnded, Role
from headway.hosts.sim import SimResult, simulate
from headway.model.cluster import ClusterSpec
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.workload import Item, make_items, parametric

from benchmarks import Figure, cpu_s, show


def long_outputs(requests: int = 64, output_tokens: int = 8_000) -> list[Item]:
    """Return requests that decode for long: hardly any arrivals, so steps are all there is."""
    return [Item(0.02 * number, 800, output_tokens) for number in range(requests)]


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
        f"{steps_s:,.0f} steps/s, {rank_steps / spent_s:,.0f} rank steps/s, "
        f"{len(items) / spent_s:,.0f} requests/s"
    )
    aim = f"{target:,} steps/s" if target else ""
    return Figure("simulator", f"{policy}: {case}", figure, aim, steps_s >= target if target else None)


def figures() -> list[Figure]:
    dense, deepseek = load_cluster("llama8b-h100"), load_cluster("dsv3-h200-pd")
    ranks24 = dense.with_pool(Role.AGGREGATED, instances=24)
    return [
        measure("one rank, decodes only", dense, "round-robin", long_outputs(), 50_000),
        measure("EP8 + EP32, decodes only", deepseek, "round-robin", long_outputs()),
        measure("24 engines, conversations", ranks24, "staggered", at_load(ranks24, "azure-conv", 4_000), 15_000),
        measure("3 × EP8 + EP32, conversations", deepseek, "staggered", at_load(deepseek, "azure-conv", 4_000)),
        measure("3 × EP8 + EP32, code", deepseek, "staggered", at_load(deepseek, "azure-code", 2_000)),
        measure("3 × EP8 + EP32, conversations", deepseek, "least-tokens", at_load(deepseek, "azure-conv", 4_000)),
    ]


if __name__ == "__main__":
    show(figures())
