"""A policy of one's own: it waits for an instance with nothing to do, then sends everything there.

    python examples/own_policy.py

On a command line it is `headway compare --policies own_policy:OneIdle+least-tokens,least-tokens` with this
directory on PYTHONPATH. The same class runs, unchanged, wherever a cluster policy runs.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import headway
from headway.core.cluster import PoolPolicy, PoolSettings
from headway.core.settings import setting


@dataclass(frozen=True, slots=True)
class OneIdleSettings(PoolSettings):
    most: int = setting(64, "most requests sent at once", unit="requests", at_least=1)


class OneIdle(PoolPolicy):
    Settings = OneIdleSettings
    settings: OneIdleSettings
    summary = "hold until an instance is idle, then deal the buffer over its ranks"

    def _place(self, now: float) -> None:
        for instance in self.ledger.active:
            if not any(rank.queued_tokens for rank in instance.ranks):
                batch = list(self.buffer.values())[: self.settings.most]
                for waiting in sorted(batch, key=lambda w: -w.request.prompt_tokens):
                    rank = min(instance.ranks, key=lambda r: r.queued_tokens)
                    self._dispatch(waiting, rank, now, "idle")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # so that worker processes find the class by its name, too
    comparison = headway.compare(
        workload="azure-conv",
        policies=["own_policy:OneIdle+least-tokens", "least-tokens", "staggered"],
        load=[0.3, 0.7],
        requests=1500,
        workers=1,
    )
    for run in comparison.runs:
        ttft = f"mean TTFT {run.ttft_s['mean']:.3f} s  p99 {run.ttft_s['p99']:.3f} s"
        print(f"load {run.load}  {run.policy:32} {ttft}")


if __name__ == "__main__":
    main()
