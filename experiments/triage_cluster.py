"""Triage at the cluster level: who is still served in time from half to twice the capacity.

python -m experiments.triage_cluster [--traces DIR]
"""

import headway
from experiments.table import print_comparison, sources


def main() -> None:
    """Print one table per workload."""
    for _, source in sources("azure-code", "azure-conv"):
        result = headway.compare(
            **source,
            cluster="dsv3-h200-pd",
            policies=["staggered", "triage", "least-tokens", "round-robin"],
            load=[0.5, 0.8, 1.0, 1.3, 1.6, 2.0],
            arrivals="poisson",
            requests=4000,
            seed=1,
            seeds=3,
        )
        print_comparison(result)


if __name__ == "__main__":
    main()
