"""SBS against every immediate policy: TTFT over load, three EP8 prefill instances of DeepSeek-V3.

python -m experiments.sbs_prefill [--traces DIR]
"""

import headway
from experiments.table import print_comparison, sources

IMMEDIATE = ["least-tokens", "least-requests", "vllm-dp", "power-of-two", "round-robin", "random"]
LOADS = [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]


def main() -> None:
    """Print one table per workload."""
    for _, source in sources("azure-code", "azure-conv"):
        result = headway.compare(
            **source,
            cluster="dsv3-h200-pd",
            policies=["staggered", "triage", *IMMEDIATE],
            load=LOADS,
            arrivals="poisson",
            requests=4000,
            seed=1,
            seeds=4,
        )
        print_comparison(result)


if __name__ == "__main__":
    main()
