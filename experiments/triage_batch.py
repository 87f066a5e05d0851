"""Triage inside one engine, against FairBatching (both anchors), Sarathi and vLLM v1.

python -m experiments.triage_batch [--traces DIR]
"""

import headway
from experiments.table import print_comparison, sources

BATCH = [
    "triage",
    "fair",
    "fair:anchor=first-token",
    "stall-free:token_budget=512",
    "stall-free:token_budget=2048",
    "vllm-v1",
]


def main() -> None:
    """Print one table per workload."""
    for _, source in sources("azure-conv", "azure-code"):
        result = headway.compare(
            **source,
            cluster="llama8b-h100",
            policies=["least-tokens"],
            batch=BATCH,
            load=[0.5, 0.8, 0.9, 1.0, 1.1, 1.3, 1.6, 2.0],
            arrivals="poisson",
            requests=3000,
            seed=1,
            seeds=3,
        )
        print_comparison(result)


if __name__ == "__main__":
    main()
