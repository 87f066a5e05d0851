"""SBS decode placement against the baselines, with skewed lengths and a decode pool that is the bottleneck.

    python -m experiments.sbs_decode [--traces DIR]

Prefill is made plentiful (twelve instances) so that the decode pool alone decides. Throughput at equal TPOT
is the
highest rate at which 99% of requests keep a mean TPOT of 50 ms.
"""

import headway
from experiments.table import CAPACITY_COLUMNS, head, print_capacity, sources
from headway.core.events import Role

DECODE = [
    "iqr-lexicographic",
    "round-robin",
    "random",
    "power-of-two",
    "least-requests",
    "least-tokens",
    "vllm-dp",
]


def main() -> None:
    """Print one table per workload and TPOT target."""
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
            head(f"{name}, 99% within a mean TPOT of {1e3 * tpot_s:.0f} ms", *CAPACITY_COLUMNS)
            print_capacity(found)


if __name__ == "__main__":
    main()
