"""SBS decode placement against the baselines, with skewed lengths and a decode pool that is the bottleneck.

    python -m experiments.sbs_decode [--traces DIR]

Prefill is made plentiful (twelve instances) so that the decode pool alone decides. Throughput at equal TPOT
is the highest rate at which 99% of requests keep a mean TPOT of 50 ms. The run is long against the stay of a
request, for the pool must have filled up.
"""

import headway
from experiments.table import CAPACITY_COLUMNS, head, print_capacity, sources
from headway.core.events import Role

DECODE = ["iqr-lexicographic", "round-robin", "least-requests", "least-tokens"]


def main() -> None:
    """Print the table."""
    cluster = headway.load_cluster("dsv3-h200-pd").with_pool(Role.PREFILL, instances=12)
    for name, source in sources("deepseek-r1"):
        head(f"{name}, 99% within a mean TPOT of 50 ms", *CAPACITY_COLUMNS)
        print_capacity(
            headway.capacity(
                **source,
                cluster=cluster,
                policies=[f"staggered+{decode}" for decode in DECODE],
                attainment=0.99,
                arrivals="poisson",
                requests=16_000,
                seed=1,
                seeds=2,
                slo_ttft_s=1000.0,
                slo_tpot_s=0.05,
                tolerance=0.02,
            )
        )


if __name__ == "__main__":
    main()
