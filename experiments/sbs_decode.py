"""SBS decode placement against the baselines, with skewed lengths and a decode pool that is the bottleneck.

    python -m experiments.sbs_decode [--traces DIR]

Prefill is made plentiful (twelve instances) so that the decode pool alone decides. Throughput at equal TPOT is the
highest rate at which 99% of requests keep a mean TPOT of 50 ms.
"""

import headway
from experiments.table import sources

DECODE = ["iqr-lexicographic", "round-robin", "random", "power-of-two", "least-requests", "least-tokens", "vllm-dp"]


def main() -> None:
    """Print one table per workload and TPOT target."""
    from headway.core.events import Role

    cluster = headway.load_cluster("dsv3-h200-pd").with_pool(Role.PREFILL, instances=12)
    for name, source in sources("deepseek-r1", "mooncake-conversation"):
        for tpot_s in (0.04, 0.05):
            found = headway.capacity(
                **source,
                cluster=cluster,
                policies=[f"staggered+{decode}" for decode in DECODE],
                attainment=0.99,
                arrivals="poisson",
                requests=6000,
                seed=1,
                seeds=2,
                slo_ttft_s=1000.0,
                slo_tpot_s=tpot_s,
                tolerance=0.02,
            )
            print(f"\n{name}, TPOT {1e3 * tpot_s:.0f} ms\n\n| decode policy | rps | ci95 |\n|---|---|---|")
            for run in found.runs:
                low, high = run.ci95 or (run.capacity_rps, run.capacity_rps)
                print(f"| {run.policy} | {run.capacity_rps:.1f} | {low:.1f}–{high:.1f} |", flush=True)


if __name__ == "__main__":
    main()
