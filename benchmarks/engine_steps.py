"""Engine passes per second of one core: decode only, no policy work.

    python -m benchmarks.engine_steps

"steady": nothing joins or leaves. "turnover": outputs of 200 to 400 tokens, each finished request replaced.
"""

import random
import time

from benchmarks import Figure, show
from headway.core.batch.contract import BatchPolicy, BatchView, Plan
from headway.core.events import Role
from headway.core.registry import Rng
from headway.core.request import Request
from headway.core.settings import Settings
from headway.model import Engine, PoolSpec, Work
from headway.model.fits import FITTED

SECONDS = 1.0
DECODES_PER_RANK = 64


class EveryDecode(BatchPolicy):
    """Runs every decode; an engine need not even ask."""

    decodes_always_run = True

    def plan(self, view: BatchView, now: float) -> Plan:
        """Say: all of them."""
        return Plan()


def full_engine(ranks: int, rng: random.Random, *, turnover: bool) -> Engine:
    """Return an engine with `DECODES_PER_RANK` decodes on every rank."""
    pool = PoolSpec(
        role=Role.DECODE,
        ranks=ranks,
        token_cap=4096,
        kv_blocks=1_000_000,
        costs=FITTED["dsv3-h200-ep32" if ranks > 1 else "llama8b-h100"],
    )
    policy_rng: Rng = rng
    engine = Engine(pool, [EveryDecode(Settings(), policy_rng) for _ in range(ranks)], rng)
    for number in range(ranks * DECODES_PER_RANK):
        submit(engine, f"r{number}", number % ranks, rng, turnover=turnover)
    return engine


def submit(engine: Engine, name: str, rank: int, rng: random.Random, *, turnover: bool) -> None:
    """Hand the engine one request that was prefilled elsewhere."""
    output_tokens = rng.randint(200, 400) if turnover else 10_000_000
    engine.submit(Work(Request(name, 0.0, 1000), output_tokens, prefilled=True), rank, 0.0)


def passes_per_second(ranks: int, *, turnover: bool) -> float:
    """Run for `SECONDS` of this process's CPU time and count."""
    rng = random.Random(0)
    engine = full_engine(ranks, rng, turnover=turnover)
    now, passes, started = 0.0, 0, time.process_time()
    while (elapsed := time.process_time() - started) < SECONDS:
        for _ in range(100):
            now += engine.start_pass(now) or 0.0
            for work in engine.end_pass(now).finished:
                submit(engine, work.request.id, work.rank, rng, turnover=turnover)
        passes += 100
    return passes / elapsed


def figures() -> list[Figure]:
    found = []
    for ranks in (1, 8, 32):
        steady, turnover = (passes_per_second(ranks, turnover=turnover) for turnover in (False, True))
        case = f"{ranks} × {DECODES_PER_RANK} decodes, engine alone"
        found.append(Figure("engine", case, f"{steady:,.0f} steps/s, {turnover:,.0f} with turnover"))
    return found


if __name__ == "__main__":
    show(figures())
