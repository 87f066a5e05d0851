"""When requests come: as recorded, Poisson, or Gamma with a chosen burstiness, at the rate asked for.

Load is scaled by compressing time; no row is ever dropped to make a trace lighter.
"""

import math
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate

from headway.core.errors import ConfigError, unknown_name
from headway.workload.items import Item, Items, Workload

__all__ = ["gamma_gaps", "make_items", "parse_arrivals"]

ARRIVALS = ("recorded", "poisson", "gamma:CV")
MAX_CV = 100.0  # beyond it a gap is either 0 or the whole run: no rate to speak of


def make_items(
    workload: Workload, *, rps: float, arrivals: str = "recorded", requests: int | None = None, seed: int = 0
) -> list[Item]:
    """Return the arrivals of one run, at a mean rate of `rps` requests per second.

    `arrivals`:
      `recorded`   the first `requests` rows at their own times, all gaps multiplied by one factor so that the
                   mean rate of those rows is `rps`. `seed` plays no part.
      `poisson`    exponential gaps, independent of the lengths. The rate is `rps` in expectation.
      `gamma:CV`   Gamma gaps of that coefficient of variation: above 1 burstier than Poisson, below 1 calmer.

    With drawn gaps the rows come in an order shuffled by `seed`, each once before any comes twice. Rows that
    share prefixes keep their order and start at a random row instead: shuffled, the turns of a conversation
    would follow one another at distances that no cache ever sees.

    `requests` (default: as many as the workload has) beyond the workload's length repeats it end to end; the
    prefix hashes of each repeat are new, for it stands for other conversations.

    Raises ConfigError for a rate or a number that is not positive, an unknown process, or a workload
    without any span of time to compress.
    """
    if not 0.0 < rps < math.inf:
        raise ConfigError(f"rps must be a positive number of requests per second, got {rps!r}")
    if requests is not None and requests < 1:
        raise ConfigError(f"requests must be at least 1, got {requests}")
    count = len(workload) if requests is None else requests
    cv = parse_arrivals(arrivals)
    if cv is None:
        return _place(workload.items, range(count), _recorded_times(workload, count, rps))
    # One stream each: the same seed draws the same rows whatever the process.
    order = _drawn_order(workload.items, count, random.Random(f"{seed}/rows"))
    times = accumulate(gamma_gaps(random.Random(f"{seed}/arrivals"), 1.0 / rps, cv, count))
    return _place(workload.items, order, times)


def parse_arrivals(text: str) -> float | None:
    """Return the coefficient of variation that `poisson` (1) or `gamma:CV` names; None for `recorded`."""
    name, colon, value = text.strip().partition(":")
    if name not in ("recorded", "poisson", "gamma"):
        raise unknown_name("arrivals", text, ARRIVALS)
    if name != "gamma":
        if colon:
            raise ConfigError(f"arrivals {text!r}: {name} takes no value")
        return None if name == "recorded" else 1.0
    try:
        cv = float(value)
    except ValueError:
        cv = math.nan
    if not 0.0 < cv <= MAX_CV:
        raise ConfigError(
            f"arrivals {text!r}: write gamma:CV, the coefficient of variation above 0 and at most {MAX_CV:g}"
        )
    return cv


def gamma_gaps(rng: random.Random, mean_s: float, cv: float, count: int) -> Iterator[float]:
    """Yield `count` gaps in seconds of the given mean and coefficient of variation (1: exponential)."""
    if cv == 1.0:
        return (rng.expovariate(1.0 / mean_s) for _ in range(count))
    shape = 1.0 / (cv * cv)
    return (rng.gammavariate(shape, mean_s / shape) for _ in range(count))


def _recorded_times(workload: Workload, count: int, rps: float) -> Iterator[float]:
    """Times of the first `count` rows, repeated end to end, with the first at 0 and `rps` on average."""
    times, rows = workload.items.arrivals_s, len(workload)
    if count == 1:
        return iter((0.0,))
    lap_s = workload.span_s * rows / max(1, rows - 1)  # the seam is as wide as the mean gap

    def recorded_s(position: int) -> float:
        lap, row = divmod(position, rows)
        return lap * lap_s + times[row] - times[0]

    span_s = recorded_s(count - 1)
    if span_s <= 0.0:
        raise ConfigError(
            f"workload {workload.name}: its first {count} rows all come at once, so there is no time to "
            "compress: use poisson arrivals"
        )
    factor = (count - 1) / rps / span_s
    return (recorded_s(position) * factor for position in range(count))


def _drawn_order(items: Items, count: int, rng: random.Random) -> Iterator[int]:
    """Yield `count` positions; position // rows is the repeat, position % rows the row."""
    rows = len(items)
    if items.prefixes:
        start = rng.randrange(rows)
        yield from (at - at % rows + (start + at) % rows for at in range(count))
        return
    for lap in range(0, count, rows):
        shuffled = list(range(lap, lap + rows))
        rng.shuffle(shuffled)
        yield from shuffled[: count - lap]


def _place(items: Items, order: Sequence[int] | Iterator[int], times: Iterator[float]) -> list[Item]:
    """Set the rows at `order` down at `times`."""
    rows, block_tokens = len(items), items.prefix_block_tokens
    if not items.prefixes:
        prompts, outputs = items.prompt_tokens, items.output_tokens
        return [Item(t, prompts[at % rows], outputs[at % rows]) for at, t in zip(order, times, strict=True)]
    shift = _span_of_hashes(items)
    placed = []
    for at, arrival_s in zip(order, times, strict=True):
        lap, row = divmod(at, rows)
        prefix = items.prefix(row)
        if lap:
            prefix = tuple(block + lap * shift for block in prefix)
        lengths = items.prompt_tokens[row], items.output_tokens[row]
        placed.append(Item(arrival_s, *lengths, prefix, block_tokens if prefix else 0))
    return placed


def _span_of_hashes(items: Items) -> int:
    """How far to move the hashes so that none meets one of its own copies."""
    known = [prefix for prefix in items.prefixes if prefix]
    return max(map(max, known)) - min(map(min, known)) + 1
