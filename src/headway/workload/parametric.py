"""Workloads without a file: lengths, arrivals and shared prefixes fitted to published traces.

How a workload is drawn:
- Lengths: the inverse CDF through quantiles of the trace, log-linear between them but for one exponent
  (`bend`) that makes the mean right. Draws are stratified, one from each n-th of the distribution, so that
  two seeds differ in order and pairing but hardly in total load.
- Prompt and output go together by a Gaussian copula with the trace's rank correlation.
- Arrivals: Gamma gaps with the trace's coefficient of variation, scaled to its mean rate exactly.
- Prefixes, where the trace has them: `Conversations`.
"""

import math
import random
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass
from itertools import accumulate, chain, count, islice

from headway.core.errors import ConfigError, unknown_name
from headway.workload.arrivals import gamma_gaps
from headway.workload.items import Items, Workload

__all__ = ["parametric", "parametric_names"]

# Where the quantiles of every fit are taken: each twentieth, closer in the tails, where the tokens are.
PROBABILITIES = (
    *(0.0, 0.005, 0.01, 0.025),
    *(twentieth / 20 for twentieth in range(1, 19)),
    *(0.925, 0.95, 0.975, 0.98, 0.985, 0.99, 0.995, 0.998, 0.999, 1.0),
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens: its quantiles at PROBABILITIES, and the bend between them."""

    quantiles: tuple[int, ...]
    bend: float

    def at(self, probability: float) -> int:
        """Return the length that `probability` (in [0, 1]) of requests do not exceed."""
        knot = bisect_right(PROBABILITIES, probability, hi=len(PROBABILITIES) - 1) - 1
        low, high = self.quantiles[knot], self.quantiles[knot + 1]
        if low == high:
            return low
        left, right = PROBABILITIES[knot], PROBABILITIES[knot + 1]
        along: float = ((probability - left) / (right - left)) ** self.bend
        return round(low * math.pow(high / low, along))


@dataclass(frozen=True, slots=True)
class Conversations:
    """Who shares a prefix with whom.

    Every prompt starts with the same `system_blocks`. A share `follow_ups` of the requests, if they find one,
    go on from an earlier request that came `rest_rows` to `open_rows` rows before and was shorter by about
    `growth_tokens` (exponential): the answer and the next question. `edited` of those keep only a uniform
    part of what came before: an earlier turn was changed. Distances are in rows, so that they scale with
    the load.
    """

    block_tokens: int
    system_blocks: int
    follow_ups: float
    rest_rows: int
    open_rows: int
    growth_tokens: float
    edited: float


@dataclass(frozen=True, slots=True)
class Fit:
    """All that is known of one trace. `step_s`: the resolution of its timestamps, where that shows."""

    trace: str
    prompt: Lengths
    output: Lengths
    rank_correlation: float
    rps: float
    arrival_cv: float
    step_s: float = 0.0
    conversations: Conversations | None = None


FITS = {
    "azure-conv": Fit(
        trace="Azure LLM inference 2023, conversation: 19,366 requests",
        prompt=Lengths(
            (
                *(2, 16, 29, 120, 181, 207, 372, 387, 396, 403, 414, 703, 984, 1020, 1045, 1071, 1097, 1130),
                *(1189, 1315, 1877, 2735, 4075, 4083, 4092, 4098, 4110, 4142, 4831, 5652, 6212, 14050),
            ),
            bend=1.077,
        ),
        output=Lengths(
            (
                *(7, 14, 16, 28, 41, 54, 67, 77, 85, 91, 96, 103, 113, 129, 151, 177, 217, 384),
                *(395, 400, 411, 424, 430, 451, 522, 540, 571, 601, 644, 918, 954, 1000),
            ),
            bend=0.748,
        ),
        rank_correlation=0.073,
        rps=5.53,
        arrival_cv=1.09,
    ),
    "azure-code": Fit(
        trace="Azure LLM inference 2023, coding: 8,819 requests",
        prompt=Lengths(
            (
                *(3, 12, 17, 44, 75, 147, 232, 385, 578, 770, 938, 1075, 1261, 1469, 1690, 1909, 2164, 2433),
                *(2745, 3193, 3923, 5194, 6097, 7315, 7435, 7436, 7436, 7436, 7436, 7437, 7437, 7437),
            ),
            bend=1.067,
        ),
        output=Lengths(
            (
                *(6, 6, 6, 6, 6, 7, 7, 8, 9, 9, 10, 11, 12, 13, 14, 16, 18, 20),
                *(24, 29, 39, 55, 69, 90, 145, 172, 201, 252, 361, 676, 831, 1899),
            ),
            bend=1.296,
        ),
        rank_correlation=-0.023,
        rps=2.57,
        arrival_cv=13.2,
    ),
    "mooncake-conversation": Fit(
        trace="Mooncake (FAST'25), conversation: 12,031 requests",
        prompt=Lengths(
            (
                *(891, 893, 894, 896, 901, 964, 1261, 1662, 2306, 3263, 4250, 4993, 5870, 6909, 8187, 9570),
                *(11239, 13196, 15368, 17869, 21467, 27367, 31521, 39552, 59009, 66484, 73954, 85401),
                *(100886, 118461, 121301, 126195),
            ),
            bend=1.083,
        ),
        output=Lengths(
            (
                *(1, 1, 3, 3, 10, 24, 46, 100, 156, 213, 256, 291, 322, 350, 375, 399, 423, 447),
                *(472, 504, 543, 597, 639, 698, 836, 893, 968, 1120, 1570, 2000, 2000, 2000),
            ),
            bend=0.965,
        ),
        rank_correlation=0.072,
        rps=3.40,
        # The published CV of 3.0 is that of timestamps in steps of 3 s; the counts per step are Poisson's
        # (mean 10.2, variance 11.2). Poisson arrivals set down on that grid have the published CV again.
        arrival_cv=1.0,
        step_s=3.0,
        # Median gap between turns 123 s (5%: 30 s), growth of the prompt 195/456/908 tokens at the quartiles,
        # one turn in five reusing much less than all of the turn before. `follow_ups` (in the trace 0.385 go
        # on from a turn) is set so that the reusable share of all prompt tokens is the trace's 0.373.
        conversations=Conversations(
            block_tokens=512,
            system_blocks=1,
            follow_ups=0.43,
            rest_rows=100,
            open_rows=850,
            growth_tokens=650.0,
            edited=0.2,
        ),
    ),
    "deepseek-r1": Fit(
        trace="ServeGen's deepseek-r1 clients, 30 min at 20 requests/s: 35,996 requests",
        prompt=Lengths(
            (
                *(4, 6, 8, 10, 17, 46, 61, 80, 155, 163, 177, 213, 261, 291, 355, 362, 375, 434),
                *(484, 672, 863, 1722, 2221, 3284, 10013, 12533, 15366, 19150, 25713, 28938, 30988, 43706),
            ),
            bend=1.165,
        ),
        output=Lengths(
            (
                *(53, 98, 111, 137, 174, 233, 275, 309, 338, 366, 390, 414, 438, 463, 490, 521, 562, 614),
                *(686, 794, 966, 1207, 1382, 1670, 3321, 4460, 6226, 8815, 13527, 17743, 19965, 29510),
            ),
            bend=1.246,
        ),
        rank_correlation=0.383,
        rps=20.0,
        arrival_cv=1.28,
    ),
}


def parametric_names() -> list[str]:
    """Names that `parametric` knows."""
    return list(FITS)


def parametric(name: str, requests: int = 10_000, seed: int = 0) -> Workload:
    """Draw a workload of `requests` rows from the fit called `name`; the same seed draws the same rows.

    Statistics are those of the traces' files, quantiles as observed; docs/workloads.md has the fits' errors.
    Raises ConfigError for an unknown name, naming the nearest, or a number of requests below 1.
    """
    if name not in FITS:
        raise unknown_name("workload", name, FITS)
    if requests < 1:
        raise ConfigError(f"workload {name}: requests must be at least 1, got {requests}")
    fit = FITS[name]
    rng = random.Random(f"{name}/{seed}")
    prompts, outputs = _lengths(fit, requests, rng)
    items = Items(fit.conversations.block_tokens if fit.conversations else 0)
    prefixes = _prefixes(fit.conversations, prompts, rng) if fit.conversations else [()] * requests
    for row in zip(_arrivals_s(fit, requests, rng), prompts, outputs, prefixes, strict=True):
        items.append(*row)
    return Workload(name, items, f"{name} (fitted to {fit.trace}; {requests:,} requests, seed {seed})")


def _lengths(fit: Fit, requests: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Draw prompt and output lengths, both of shape (requests,)."""
    # The normal correlation that gives this rank correlation (Pearson 1907).
    rho = 2.0 * math.sin(math.pi / 6.0 * fit.rank_correlation)
    own = math.sqrt(1.0 - rho * rho)
    prompt_scores = [rng.gauss(0.0, 1.0) for _ in range(requests)]
    output_scores = [rho * score + own * rng.gauss(0.0, 1.0) for score in prompt_scores]
    prompts = [fit.prompt.at(p) for p in _stratified(prompt_scores, rng)]
    outputs = [fit.output.at(p) for p in _stratified(output_scores, rng)]
    return prompts, outputs


def _stratified(scores: list[float], rng: random.Random) -> list[float]:
    """Return one probability per score, in the scores' order, each in its own n-th of [0, 1)."""
    probabilities = [0.0] * len(scores)
    for rank, row in enumerate(sorted(range(len(scores)), key=scores.__getitem__)):
        probabilities[row] = (rank + rng.random()) / len(scores)
    return probabilities


def _arrivals_s(fit: Fit, requests: int, rng: random.Random) -> list[float]:
    """Draw arrival times from 0 s on, at the trace's rate and burstiness."""
    gaps = gamma_gaps(rng, 1.0 / fit.rps, fit.arrival_cv, requests - 1)
    times = list(accumulate(chain((0.0,), gaps)))
    # A bursty process is far off its rate even over thousands of requests; a recorded trace is not.
    scale = (requests - 1) / fit.rps / times[-1] if times[-1] > 0.0 else 1.0
    if not fit.step_s:
        return [time * scale for time in times]
    return [time * scale // fit.step_s * fit.step_s for time in times]


def _prefixes(conversations: Conversations, prompts: list[int], rng: random.Random) -> list[tuple[int, ...]]:
    """Draw the block hashes of every prompt, shape (requests,) of (full blocks,)."""
    fresh = count(conversations.system_blocks)
    system = tuple(range(conversations.system_blocks))
    open_turns: list[tuple[int, int]] = []  # (prompt tokens, row), shortest first
    prefixes: list[tuple[int, ...]] = []
    for row, prompt in enumerate(prompts):
        _age(open_turns, row, prompts, conversations)
        earlier = _earlier_turn(open_turns, prompt, conversations, rng)
        shared = system if earlier is None else _kept(prefixes[earlier], conversations, rng)
        blocks = prompt // conversations.block_tokens
        new = islice(fresh, max(0, blocks - len(shared)))
        prefixes.append((*shared[:blocks], *new))
    return prefixes


def _age(
    open_turns: list[tuple[int, int]], row: int, prompts: list[int], conversations: Conversations
) -> None:
    """Open the row that has rested long enough, close the one that has been open too long."""
    rested, expired = row - conversations.rest_rows, row - conversations.open_rows
    if rested >= 0:
        insort(open_turns, (prompts[rested], rested))
    if expired >= 0:
        at = bisect_left(open_turns, (prompts[expired], expired))
        if at < len(open_turns) and open_turns[at][1] == expired:
            del open_turns[at]


def _earlier_turn(
    open_turns: list[tuple[int, int]], prompt: int, conversations: Conversations, rng: random.Random
) -> int | None:
    """Take the row this prompt goes on from: the longest open one that leaves room for the growth."""
    if rng.random() >= conversations.follow_ups:
        return None
    longest = prompt - rng.expovariate(1.0 / conversations.growth_tokens)
    at = bisect_right(open_turns, longest, key=lambda turn: turn[0]) - 1
    return open_turns.pop(at)[1] if at >= 0 else None


def _kept(prefix: tuple[int, ...], conversations: Conversations, rng: random.Random) -> tuple[int, ...]:
    """Return what a follow-up keeps of the turn before: all, or up to where it was edited."""
    if rng.random() >= conversations.edited:
        return prefix
    return prefix[: max(conversations.system_blocks, round(rng.random() * len(prefix)))]
