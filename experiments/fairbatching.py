"""FairBatching's claims: TTFT tail (2.29x), capacity of a node (+20.0%) and of a cluster with PAB (+54.3%).

    python -m experiments.fairbatching [--traces DIR]

The tail is compared at the highest load where the best Sarathi budget still has 99% of requests in SLO or
nearly so; capacity is the rate at which 99% of requests meet TTFT 1 s and TPOT 50 ms.
"""

import headway
from experiments.table import CAPACITY_COLUMNS, head, print_capacity, print_comparison, sources

SARATHI = ["stall-free:token_budget=512", "stall-free:token_budget=2048"]
BATCH = ["fair", "fair:anchor=first-token", "triage", *SARATHI, "vllm-v1"]


def main() -> None:
    """Print the tails, then the capacities of one node and of four."""
    for name, source in sources("azure-conv", "azure-code"):
        tails = headway.compare(
            **source,
            cluster="llama8b-h100",
            policies=["least-tokens"],
            batch=BATCH,
            load=[0.8, 0.85, 0.9],
            arrivals="poisson",
            requests=3000,
            seed=1,
            seeds=3,
        )
        print_comparison(tails)
        head(f"capacity at 99%, {name}", *CAPACITY_COLUMNS)
        for cluster, policies in (
            ("llama8b-h100", ["least-tokens"]),
            ("llama8b-h100-x4", ["least-tokens", "pab"]),
        ):
            found = headway.capacity(
                **source,
                cluster=cluster,
                policies=policies,
                batch=BATCH if len(policies) == 1 else ["fair:anchor=first-token", SARATHI[1]],
                attainment=0.99,
                arrivals="poisson",
                requests=2000 if len(policies) == 1 else 5000,
                tolerance=0.03,
                seed=1,
                seeds=3,
            )
            print_capacity(found)


if __name__ == "__main__":
    main()
