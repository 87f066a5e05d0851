"""Small policies and pools for the tests of the engine model."""

import random
from collections.abc import Sequence

from headway.core.batch.contract import BatchPolicy, BatchView, Plan
from headway.core.events import Role
from headway.core.request import DEFAULT_SLO, Request, Slo
from headway.core.settings import Settings
from headway.model.cluster import PoolSpec
from headway.model.costs import DenseCosts, LockstepCosts, PhaseCosts
from headway.model.engine import Engine, Work

#: 10 ms a pass, 1 ms a token: easy to reckon by hand.
PLAIN = DenseCosts(0.010, 0, 0.001, 0.001, 0.0, 0.0)
LOCKSTEP = LockstepCosts(
    prefill=PhaseCosts(0.010, 0.001, sync_fixed_s=0.100, sync_token_s=0.010),
    decode=PhaseCosts(0.005, 0.001, sync_fixed_s=0.020, sync_token_s=0.002),
)


class FirstCome(BatchPolicy):
    """All decodes, partial prompts, then new ones, as the token cap allows."""

    decodes_always_run = True

    def plan(self, view: BatchView, now: float) -> Plan:
        return Plan([(work, work.todo_tokens) for work in (*view.prefilling, *view.waiting)])


class Asked(FirstCome):
    """The same, but the engine must ask before every step."""

    decodes_always_run = False


class Scripted(BatchPolicy):
    """Calls `script(view)` for its plan, `FirstCome` when there is none."""

    script = None

    def plan(self, view: BatchView, now: float) -> Plan:
        return self.script(view) if self.script else FirstCome.plan(self, view, now)


def policies(kind: type[BatchPolicy], ranks: int = 1) -> list[BatchPolicy]:
    return [kind(Settings(), random.Random(0)) for _ in range(ranks)]


def pool(role: Role = Role.AGGREGATED, **changes) -> PoolSpec:
    spec = {"role": role, "token_cap": 64, "max_running": 8, "kv_blocks": 100, "block_tokens": 4}
    spec |= {"costs": PLAIN, "host_gap_s": 0.0, "jitter": 0.0} | changes
    return PoolSpec(**spec)


def engine(
    role: Role = Role.AGGREGATED, *, kind: type[BatchPolicy] = FirstCome, ranks: int = 1, **changes
) -> Engine:
    return Engine(pool(role, ranks=ranks, **changes), policies(kind, ranks), random.Random(0))


def scripted(script, **changes) -> Engine:
    spec = pool(**changes)
    policy = policies(Scripted)[0]
    policy.script = script
    return Engine(spec, [policy], random.Random(0))


def request(
    name: str,
    prompt_tokens: int,
    *,
    arrival_s: float = 0.0,
    slo: Slo = DEFAULT_SLO,
    prefix: Sequence[int] = (),
):
    block_tokens = 8 if prefix else 0
    return Request(
        name, arrival_s, prompt_tokens, slo, prefix=tuple(prefix), prefix_block_tokens=block_tokens
    )


def work(name: str, prompt_tokens: int, output_tokens: int, *, prefilled: bool = False, **more) -> Work:
    return Work(request(name, prompt_tokens, **more), output_tokens, prefilled)


def run_pass(engine: Engine, now: float):
    """Run one pass; return its end and its outcome."""
    end = now + engine.start_pass(now)
    return end, engine.end_pass(end)


def drain(engine: Engine, now: float = 0.0, limit: int = 10_000):
    """Run passes until nothing is left; return the end and the finished in order."""
    finished = []
    for _ in range(limit):
        if not engine.has_work:
            return now, finished
        now, outcome = run_pass(engine, now)
        finished += outcome.finished
    raise AssertionError("the engine does not come to an end")
