"""A million requests over 64 instances of 32 ranks (2,048 in all): seconds and peak memory.

    python -m benchmarks.million [REQUESTS [POLICY]]

DeepSeek-V3 costs, 40 prefill and 24 decode instances, Azure conversation lengths, at 0.8 of nominal capacity.
Targets: 10 minutes, 2 GiB.
"""

import resource
import sys
import time

from benchmarks import Figure, show
from headway.core.events import Role
from headway.hosts.sim import simulate
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.workload import make_items, parametric


def figures(requests: int = 1_000_000, policy: str = "staggered") -> list[Figure]:
    cluster = load_cluster("dsv3-h200-pd")
    cluster = cluster.with_pool(Role.PREFILL, instances=40, ranks=32).with_pool(Role.DECODE, instances=24)
    workload = parametric("azure-conv")
    capacity = nominal_capacity_rps(cluster, workload.mean_prompt_tokens, workload.mean_output_tokens)
    items = make_items(workload, rps=0.8 * capacity, arrivals="poisson", requests=requests)
    started_s = time.process_time()
    result = simulate(cluster, items, policy, "vllm-v1")
    spent_s = time.process_time() - started_s
    done = sum(outcome.finished_s is not None for outcome in result.outcomes)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    what = f"{requests:,} requests"
    case = f"{policy}: 2,048 ranks, {0.8 * capacity:,.0f} requests/s, {done:,} completed"
    took = f"{spent_s:.0f} s of CPU ({result.wall_s:.0f} s in all), {result.steps:,} steps"
    return [
        Figure(what, case, took, "600 s", spent_s < 600),
        Figure(what, "peak memory of the process", f"{peak_gib:.2f} GiB", "2 GiB", peak_gib < 2),
    ]


if __name__ == "__main__":
    given = dict(zip(("requests", "policy"), sys.argv[1:], strict=False))
    show(figures(int(given.get("requests", 1_000_000)), given.get("policy", "staggered")))
