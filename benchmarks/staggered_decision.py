"""Time of one decision of `staggered`: everything held is poured over the ranks of an idle cluster.

    python -m benchmarks.staggered_decision

The requests arrive while no instance takes work; the decision is what the policy does when a report says
that they all do. Target: 1,000 requests over 1,024 ranks in under 5 ms, growing as n log m. Over 32 instances
it is 32 decisions, one batch for each: every one orders again what the others left.
"""

import random
from time import process_time

from benchmarks import Figure, show
from headway.core.actions import Dispatch
from headway.core.cluster.compose import create_cluster
from headway.core.events import Arrived, InstanceDraining, InstanceUp, Role, Snapshot
from headway.core.request import Request

CHUNK_TOKENS = 4096


def decision_s(requests: int, instances: int, ranks: int, seed: int) -> float:
    """Return the CPU seconds of one decision that places all `requests`."""
    rng = random.Random(seed)
    policy = create_cluster("staggered", disaggregated=False, rng=rng)
    ups = [InstanceUp(f"prefill-{i}", Role.PREFILL, ranks, CHUNK_TOKENS) for i in range(instances)]
    for up in ups:
        policy.handle(up, 0.0)
        policy.handle(InstanceDraining(up.instance), 0.0)
    for number in range(requests):
        policy.handle(Arrived(Request(f"r{number}", 0.0, rng.randint(16, 2 * CHUNK_TOKENS))), 0.0)
    ledger = policy.ledger  # type: ignore[attr-defined]
    for up in ups:
        ledger.instances[up.instance].draining = False
    ledger.refresh()
    idle = Snapshot(ups[-1].instance, 0, 1, 0, busy=False, queued_tokens=(0,) * ranks)
    started_s = process_time()
    actions = policy.handle(idle, 0.0)
    spent_s = process_time() - started_s
    assert sum(isinstance(action, Dispatch) for action in actions) == requests
    return spent_s


def best_s(requests: int, instances: int, ranks: int, rounds: int = 12) -> float:
    return min(decision_s(requests, instances, ranks, seed) for seed in range(rounds))


def figures() -> list[Figure]:
    found = []
    for instances, ranks in ((1, 1024), (32, 32)):
        for requests in (250, 500, 1_000):
            spent_s = best_s(requests, instances, ranks)
            case = f"{requests:,} held, {instances} × {ranks} ranks"
            aim = ("5 ms", spent_s < 5e-3) if (requests, instances) == (1_000, 1) else ("", None)
            found.append(Figure("staggered decision", case, f"{1e3 * spent_s:.2f} ms", *aim))
    return found


if __name__ == "__main__":
    show(figures())
