"""A million requests over 64 instances of 32 ranks (2,048 in all): wall seconds and peak memory.

    python benchmarks/million.py [REQUESTS [POLICY]]

DeepSeek-V3 costs, 40 prefill and 24 decode instances, Azure conversation lengths, at 0.8 of nominal capacity.
"""

import resource
import sys

from headway.core.events import Role
from headway.hosts.sim import simulate
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.workload import make_items, parametric


def main(requests: str = "1000000", policy: str = "staggered") -> None:
    cluster = load_cluster("dsv3-h200-pd")
    cluster = cluster.with_pool(Role.PREFILL, instances=40, ranks=32).with_pool(Role.DECODE, instances=24)
    workload = parametric("azure-conv")
    capacity = nominal_capacity_rps(cluster, workload.mean_prompt_tokens, workload.mean_output_tokens)
    items = make_items(workload, rps=0.8 * capacity, arrivals="poisson", requests=int(requests))
    result = simulate(cluster, items, policy, "vllm-v1")
    done = sum(outcome.finished_s is not None for outcome in result.outcomes)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(items):,} requests at {0.8 * capacity:,.0f}/s, {done:,} completed, {result.steps:,} steps: "
        f"{result.wall_s:.0f} s (target 600), peak {peak_gib:.2f} GiB (target 2)"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
