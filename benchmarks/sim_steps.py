"""Simulated engine steps per second, end to end: kernel, engine model, batch policy, cluster policy.

python benchmarks/sim_steps.py
"""

from headway.hosts.sim import simulate
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.workload import make_items, parametric

#: (what it shows, preset, cluster policy, workload, load as a share of nominal capacity, requests, target steps/s)
CASES = [
    ("without policy work", "llama8b-h100", "round-robin", "azure-conv", 0.8, 4_000, 50_000),
    ("staggered, 24 prefill ranks", "dsv3-h200-pd", "staggered", "azure-conv", 0.8, 4_000, 15_000),
    ("least-tokens, 24 prefill ranks", "dsv3-h200-pd", "least-tokens", "azure-conv", 0.8, 4_000, 15_000),
]


def main() -> None:
    for title, preset, policy, lengths, load, requests, target in CASES:
        cluster, workload = load_cluster(preset), parametric(lengths)
        capacity = nominal_capacity_rps(cluster, workload.mean_prompt_tokens, workload.mean_output_tokens)
        items = make_items(workload, rps=load * capacity, arrivals="poisson", requests=requests, seed=0)
        result = simulate(cluster, items, policy, "vllm-v1")
        speed = result.steps / result.wall_s
        print(
            f"{title:32} {result.steps:9,} steps in {result.wall_s:6.2f} s: {speed:9,.0f}/s (target {target:,})"
        )


if __name__ == "__main__":
    main()
