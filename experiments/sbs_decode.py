"""SBS decode placement against the baselines, with skewed lengths and a decode pool that is the bottleneck.

    python -m experiments.sbs_decode [--traces DIR]

Prefill is made plentiful so that the decode pool alone decides. Throughput at equal TPOT is the highest rate
at which 99% of requests keep a mean TPOT of 50 ms. DeepSeek-R1 lengths on H200 are bound by step time,
Mooncake's on H100 (80 GB) by KV. Runs are long against the stay of a request, for the pool must have filled
up.
"""

import headway
from experiments.table import CAPACITY_COLUMNS, head, print_capacity, sources
from headway.core.events import Role

DECODE = ["iqr-lexicographic", "round-robin", "least-requests", "least-tokens"]
CASES = [
    ("deepseek-r1", "dsv3-h200-pd", {"prefill": 12, "decode": 1}, 16_000),
    ("mooncake-conversation", "dsv3-h100-pd", {"prefill": 24, "decode": 1}, 6_000),
]


def main() -> None:
    """Print one table per workload."""
    found = dict(sources(*(name for name, *_ in CASES)))
    for name, preset, instances, requests in CASES:
        cluster = headway.load_cluster(preset)
        for role, count in instances.items():
            cluster = cluster.with_pool(Role(role), instances=count)
        head(f"{name}, 99% within a mean TPOT of 50 ms", *CAPACITY_COLUMNS)
        print_capacity(
            headway.capacity(
                **found[name],
                cluster=cluster,
                policies=[f"staggered+{decode}" for decode in DECODE],
                attainment=0.99,
                arrivals="poisson",
                requests=requests,
                seed=1,
                seeds=2,
                slo_ttft_s=1000.0,
                slo_tpot_s=0.05,
                tolerance=0.02,
            )
        )


if __name__ == "__main__":
    main()
