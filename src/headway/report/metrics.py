"""What a run is measured by: one outcome per request, one record per pass, one `Run` per simulation.

`completed + rejected == requests` holds for every run; `lost` counts what breaks it and must be 0.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from headway.core.request import Slo

__all__ = [
    "QUANTILES",
    "Distribution",
    "Outcome",
    "PassRecord",
    "Run",
    "distribution",
    "meets_slo",
    "summarise",
]

#: Where a `Distribution` is sampled: every half per cent, and the last per cent finer.
QUANTILES: tuple[float, ...] = (*(i / 200 for i in range(200)), 0.9975, 0.999, 1.0)
#: Sums of step times differ from the target they were planned to by rounding, not by lateness.
_ROUNDING_S = 1e-9


@dataclass(slots=True)
class Outcome:
    """The life of one request. Times are seconds on the run's clock; None: it did not come to that.

    `lateness_s`: the largest (delivery − deadline line) over its output tokens, FairBatching's line `arrival
    + ttft + j·tpot`; at most 0 when every token was in time. `rejected`: why it was refused or given up.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo: Slo
    dispatched_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    lateness_s: float = float("-inf")
    rejected: str | None = None


class PassRecord(NamedTuple):
    """One forward pass of a lockstep group. Tuples have shape (ranks,), from `first_rank`."""

    instance: str
    role: str
    first_rank: int
    start_s: float
    end_s: float
    chunk_tokens: int
    prefill_tokens: tuple[int, ...]
    decodes: tuple[int, ...]


@dataclass(slots=True)
class Run:
    """One simulation in figures (schema `headway.compare/1`)."""

    policy: str
    batch: str
    load: float | None
    rps: float
    seed: int
    requests: int
    completed: int
    rejected: int
    lost: int
    ttft_s: dict[str, float]
    tpot_s: dict[str, float]
    e2e_s: dict[str, float]
    slo_attainment: float
    envelope_attainment: float
    goodput_rps: float
    throughput_tokens_s: float
    chunk_utilisation: float
    bubble: float
    decode_batch_imbalance: float
    sim_steps: int
    wall_s: float
    missed_ttft_s: dict[str, float] = field(default_factory=dict)
    rejected_by_reason: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Distribution:
    """TTFT and TPOT of one run at `QUANTILES`, in seconds; empty when no request got that far."""

    ttft_s: tuple[float, ...] = ()
    tpot_s: tuple[float, ...] = ()


def summarise(
    outcomes: Sequence[Outcome],
    *,
    policy: str,
    batch: str,
    load: float | None,
    rps: float,
    seed: int,
    chunk_utilisation: float = float("nan"),
    bubble: float = float("nan"),
    decode_batch_imbalance: float = float("nan"),
    sim_steps: int = 0,
    wall_s: float = 0.0,
) -> Run:
    """Condense the outcomes of one run.

    Latencies are over completed requests; a TPOT needs two output tokens. Attainments are shares of *all*
    requests: one that was rejected or lost has missed its targets. `goodput_rps` counts requests that met
    both targets per second of the time in which requests came; throughput is to the last finish.
    `missed_ttft_s` is the TTFT of those that completed but missed their TTFT target: how long relegated
    requests had to wait.
    """
    done = [o for o in outcomes if o.finished_s is not None]
    refused = [o for o in outcomes if o.finished_s is None and o.rejected is not None]
    met = sum(map(meets_slo, done))
    span_s, arrivals_s = _span_s(outcomes, done), _arrival_span_s(outcomes, done)
    return Run(
        policy=policy,
        batch=batch,
        load=load,
        rps=rps,
        seed=seed,
        requests=len(outcomes),
        completed=len(done),
        rejected=len(refused),
        lost=len(outcomes) - len(done) - len(refused),
        ttft_s=_spread([_ttft_s(o) for o in done]),
        tpot_s=_spread([_tpot_s(o) for o in done if o.output_tokens > 1]),
        e2e_s=_spread([_e2e_s(o) for o in done]),
        slo_attainment=met / len(outcomes) if outcomes else 0.0,
        envelope_attainment=sum(map(_meets_envelope, done)) / len(outcomes) if outcomes else 0.0,
        goodput_rps=met / arrivals_s if arrivals_s else 0.0,
        throughput_tokens_s=sum(o.output_tokens for o in done) / span_s if span_s else 0.0,
        chunk_utilisation=chunk_utilisation,
        bubble=bubble,
        decode_batch_imbalance=decode_batch_imbalance,
        sim_steps=sim_steps,
        wall_s=wall_s,
        missed_ttft_s=_spread([_ttft_s(o) for o in done if _ttft_s(o) > o.slo.ttft_s + _ROUNDING_S]),
        rejected_by_reason=dict(sorted(Counter(o.rejected or "" for o in refused).items())),
    )


def distribution(outcomes: Sequence[Outcome]) -> Distribution:
    """Sample the TTFT and TPOT of the completed requests at `QUANTILES`."""
    done = [o for o in outcomes if o.finished_s is not None]
    return Distribution(
        _quantiles([_ttft_s(o) for o in done]), _quantiles([_tpot_s(o) for o in done if o.output_tokens > 1])
    )


def meets_slo(outcome: Outcome) -> bool:
    """Whether the first token was in time, and the mean time per token after it (§5's stricter reading)."""
    if outcome.finished_s is None or _ttft_s(outcome) > outcome.slo.ttft_s + _ROUNDING_S:
        return False
    return outcome.output_tokens < 2 or _tpot_s(outcome) <= outcome.slo.tpot_s + _ROUNDING_S


def _meets_envelope(outcome: Outcome) -> bool:
    return outcome.lateness_s <= _ROUNDING_S


def _ttft_s(outcome: Outcome) -> float:
    assert outcome.first_token_s is not None, f"{outcome.request_id} finished without a first token"
    return outcome.first_token_s - outcome.arrival_s


def _tpot_s(outcome: Outcome) -> float:
    assert outcome.finished_s is not None and outcome.first_token_s is not None
    return (outcome.finished_s - outcome.first_token_s) / (outcome.output_tokens - 1)


def _e2e_s(outcome: Outcome) -> float:
    assert outcome.finished_s is not None
    return outcome.finished_s - outcome.arrival_s


def _arrival_span_s(outcomes: Sequence[Outcome], done: Sequence[Outcome]) -> float:
    """The time in which the requests came; of a burst, the time in which they were done."""
    arrivals_s = [o.arrival_s for o in outcomes]
    span_s = max(arrivals_s) - min(arrivals_s) if arrivals_s else 0.0
    return span_s or _span_s(outcomes, done)


def _span_s(outcomes: Sequence[Outcome], done: Sequence[Outcome]) -> float:
    if not done:
        return 0.0
    return max(o.finished_s or 0.0 for o in done) - min(o.arrival_s for o in outcomes)


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, percentiles (linear between ranks) and maximum; empty for no values."""
    if not values:
        return {}
    array = np.asarray(values)
    p50, p90, p95, p99 = np.percentile(array, (50, 90, 95, 99))
    spread = {"mean": array.mean(), "p50": p50, "p90": p90, "p95": p95, "p99": p99, "max": array.max()}
    return {name: float(value) for name, value in spread.items()}


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.quantile(np.asarray(values), QUANTILES).tolist()) if values else ()
