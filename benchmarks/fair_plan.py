"""Time of one plan of each batch policy (target: `fair` under 1 ms over 256 running and 256 waiting).

python -m benchmarks.fair_plan
"""

import random
from dataclasses import dataclass, field
from statistics import median
from time import process_time

from benchmarks import Figure, show
from headway.core.batch import BatchPolicy, StepReport, batch_policies
from headway.core.request import Request, Slo

_NOW_S = 100.0


@dataclass(eq=False, slots=True)
class _Work:
    request: Request
    todo_tokens: int
    context_tokens: int = 0
    generated_tokens: int = 0
    first_token_s: float | None = None


@dataclass(slots=True)
class _View:
    waiting: list[_Work]
    decodes: list[_Work]
    prefilling: list[_Work] = field(default_factory=list)
    token_cap: int = 8192
    free_seats: int = 256
    free_blocks: int = 60_000
    block_tokens: int = 16
    decode_context_tokens: int = 0


def _view(running: int, waiting: int, rng: random.Random) -> _View:
    """Every second decode has banked slack; the oldest prompts can no longer make their TTFT."""
    slo = Slo(ttft_s=1.0, tpot_s=0.05)
    arrivals = sorted(_NOW_S - 2.0 * rng.random() for _ in range(waiting))
    prompts = [
        _Work(Request(f"w{i}", at, n := rng.randrange(50, 4000), slo), n) for i, at in enumerate(arrivals)
    ]
    decodes = []
    for i in range(running):
        generated = rng.randrange(1, 400)
        line_s = _NOW_S - generated * slo.tpot_s + (i % 2) * 0.5 * rng.random()
        request = Request(f"d{i}", line_s - slo.ttft_s, 1000, slo)
        decodes.append(_Work(request, 1, 1000 + generated, generated, line_s))
    return _View(prompts, decodes, decode_context_tokens=sum(d.context_tokens for d in decodes))


def _teach(policy: BatchPolicy, rng: random.Random) -> None:
    """Steps of Llama-3.1-8B on one H100 (shape of the calibration, without the knee)."""
    for _ in range(400):
        decodes = rng.randrange(1, 256)
        chunk = rng.choice((0, 256, 1024, 4096))
        context = 1000 * decodes
        seconds = 6.4e-3 + 2e-5 * (decodes + chunk) + 4.2e-8 * context + 7.7e-10 * chunk**2 / 2
        policy.observe(StepReport(decodes + chunk, decodes, context, chunk**2 / 2, seconds), 0.0)


def median_plan_s(spec: str, running: int, waiting: int, rounds: int = 200) -> float:
    """Median CPU seconds of one plan."""
    rng = random.Random(7)
    policy = batch_policies.create(spec, rng)
    _teach(policy, rng)
    view = _view(running, waiting, rng)
    times = []
    for _ in range(rounds):
        start = process_time()
        policy.plan(view, _NOW_S)
        times.append(process_time() - start)
    return median(times)


def figures() -> list[Figure]:
    found = []
    for name in batch_policies.names():
        small_s, large_s = (median_plan_s(name, n, n) for n in (64, 256))
        figure = f"{1e3 * large_s:.3f} ms ({1e3 * small_s:.3f} ms over 64 and 64)"
        aim = ("1 ms", large_s < 1e-3) if name == "fair" else ("", None)
        found.append(Figure("batch plan", f"{name}: 256 running, 256 waiting", figure, *aim))
    return found


if __name__ == "__main__":
    show(figures())
