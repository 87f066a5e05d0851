"""One simulation, by hand: a recorded or fitted workload, a cluster, a policy, and what came out.

python examples/simulate.py
"""

import statistics

import headway
from headway.hosts.sim.faults import parse_fault


def main() -> None:
    workload = headway.parametric("azure-code", requests=1000, seed=7)
    items = headway.make_items(workload, rps=60.0, arrivals="poisson", seed=7)
    cluster = headway.load_cluster("dsv3-h200-pd")
    for faults in ([], [parse_fault("die:prefill-1@5"), parse_fault("recover:prefill-1@10")]):
        result = headway.simulate(cluster, items, "staggered", "vllm-v1", seed=7, faults=faults)
        served = [o for o in result.outcomes if o.first_token_s is not None]
        ttft_s = statistics.fmean(
            o.first_token_s - o.arrival_s for o in served if o.first_token_s is not None
        )
        what = f"{result.steps} passes, {len(faults)} faults"
        print(f"{len(served)} of {len(items)} served, mean TTFT {ttft_s:.3f} s, {what}")


if __name__ == "__main__":
    main()
