"""Simulated engine steps per second, end to end: kernel, engine model, batch policy, cluster policy.

    python benchmarks/sim_steps.py

A step is one pass of one lockstep group, however many ranks it has; rank steps count each rank. Time is CPU
time of this process, so that a busy machine does not blur it.
"""

import time

from headway.core.events import PassEnded
from headway.hosts.sim import simulate
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.workload import Item, make_items, parametric


def long_outputs() -> list[Item]:
    """Return 64 requests that decode for long: hardly any arrivals, so steps are all there is."""
    return [Item(0.02 * number, 800, 8_000) for number in range(64)]


def conversations(preset: str, requests: int = 4_000, load: float = 0.8) -> list[Item]:
    cluster, workload = load_cluster(preset), parametric("azure-conv")
    capacity = nominal_capacity_rps(cluster, workload.mean_prompt_tokens, workload.mean_output_tokens)
    return make_items(workload, rps=load * capacity, arrivals="poisson", requests=requests, seed=0)


def measure(title: str, preset: str, policy: str, items: list[Item], target: str) -> None:
    rank_steps = 0

    def count(now: float, event: object, actions: object) -> None:
        nonlocal rank_steps
        if isinstance(event, PassEnded):
            rank_steps += len(event.ran_tokens)

    started_s = time.process_time()
    result = simulate(load_cluster(preset), items, policy, "vllm-v1", observers=[count])
    spent_s = time.process_time() - started_s
    print(
        f"{title:32} {result.steps / spent_s:9,.0f} steps/s {rank_steps / spent_s:11,.0f} rank steps/s "
        f"{len(items) / spent_s:9,.0f} requests/s   (target {target})"
    )


def main() -> None:
    fast, staggered = "50,000 steps/s", "15,000 steps/s"
    measure("one rank, decodes only", "llama8b-h100", "round-robin", long_outputs(), fast)
    measure("EP8 + EP32, decodes only", "dsv3-h200-pd", "round-robin", long_outputs(), fast)
    conv = conversations("dsv3-h200-pd")
    measure("staggered, 24 prefill ranks", "dsv3-h200-pd", "staggered", conv, staggered)
    measure("least-tokens, 24 prefill ranks", "dsv3-h200-pd", "least-tokens", conv, staggered)


if __name__ == "__main__":
    main()
