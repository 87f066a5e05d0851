"""From measured steps to a cost model: which form of step time fits an engine, and how far off it is by
regime.

Two forms, both over the tokens computed `N`, the decodes `D` among them, the context of decodes `K` and the
attention of prefills `Q = Σ chunk·(prefix + chunk/2)`:

    linear   t = a + b·N + c·K + q·Q
    hinge    t = a + b0·min(N, n0) + b1·max(N − n0, 0) + d·max(D − d0, 0) + c·K + q·Q

The hinge is what dense engines do: below `n0` tokens a step reads the weights, above it computes. The output
layer, which runs for sampled tokens only, has a knee of its own, `d0`; its term is fitted where decodes were
counted. Fits are by least squares on the *relative* error, with no coefficient below 0: time does not shrink
with work. Relative to what a first fit predicts, not to what was measured: else slow steps weigh least, and
where steps of one size scatter by 25% the fit is 6% too fast. A prefill pays for its context through `Q`
alone: counted in `K` too, the same memory traffic would be charged twice, and the error of Llama-3.1-8B on an
H100 goes from 2.3% to 4.1%.
"""

import csv
import gzip
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headway.core.errors import ConfigError, unknown_name
from headway.model.costs import DenseCosts

__all__ = [
    "RegimeError",
    "Step",
    "errors_by_regime",
    "fit_hinge",
    "fit_linear",
    "host_gap_s",
    "jitter",
    "predict_s",
    "read_steps",
    "to_toml",
    "without_gap",
]

Regime = Literal["prefill", "decode", "mixed"]
_REGIMES: tuple[Regime, ...] = ("prefill", "decode", "mixed")

#: Column names accepted for each quantity, and what to multiply by. The first is the one we document.
_COLUMNS: dict[str, dict[str, float]] = {
    "new_tokens": {"new_tokens": 1.0, "N": 1.0},
    "context_tokens": {"context_tokens": 1.0, "K": 1.0},
    "attention": {"attention": 1.0, "Q": 1.0},
    "duration_s": {"duration_s": 1.0, "duration_ms": 1e-3, "ms": 1e-3},
}
_LEAST_S = 1e-6
_LEAST_STEPS = 8  # a few more than there are coefficients

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Step:
    """One measured step. `attention` in tokens²; `host_gap_s`: what of the duration passed before the step
    was formed, None where that was not measured; the other quantities as named.
    """

    new_tokens: float
    context_tokens: float
    attention: float
    duration_s: float
    regime: Regime
    host_gap_s: float | None = None
    decodes: float = 0.0


@dataclass(frozen=True, slots=True)
class RegimeError:
    """Relative error of fitted costs, as shares of the measured durations. `bias`: of the sum of all."""

    regime: str
    steps: int
    bias: float
    mean: float
    p95: float
    worst: float


def read_steps(path: Path, where: Mapping[str, str] | None = None) -> list[Step]:
    """Read measured steps from a CSV (plain or .gz) with a header.

    Columns: `new_tokens`, `context_tokens` (of decodes), `attention` (optional: 0) and `duration_s`, or `N`,
    `K`, `Q` and `ms`; `host_gap_s` and `decodes` may be there. A `phase` column of prefill, decode or mixed
    names the regime; without it, a step without attention is a decode. `where` keeps the rows whose columns
    contain the given texts. Raises ConfigError naming file, row and column.
    """
    try:
        with _open(path) as file:
            steps = _read(path, csv.DictReader(file), where or {})
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ConfigError(f"{path}: cannot be read as CSV: {error}") from None
    if len(steps) < _LEAST_STEPS:
        chosen = f" with {', '.join(f'{k}={v}' for k, v in where.items())}" if where else ""
        raise ConfigError(f"{path}: a fit needs at least {_LEAST_STEPS} steps, found {len(steps)}{chosen}")
    return steps


def _read(path: Path, rows: "csv.DictReader[str]", where: Mapping[str, str]) -> list[Step]:
    _check_header(path, [name.strip() for name in rows.fieldnames or []], where)
    kept = ((number, row) for number, row in enumerate(rows, start=2) if _matches(row, where))
    return [_step(f"{path}: row {number}", row) for number, row in kept]


def host_gap_s(steps: Sequence[Step]) -> float:
    """Return the median gap between steps; 0 where none was measured."""
    gaps = [step.host_gap_s for step in steps if step.host_gap_s is not None]
    return float(np.median(gaps)) if gaps else 0.0


def without_gap(steps: Sequence[Step], gap_s: float) -> list[Step]:
    """Return the steps less a constant gap. What of the gap grows with the batch stays in their durations."""
    return [replace(step, duration_s=max(step.duration_s - gap_s, _LEAST_S)) for step in steps]


def jitter(costs: DenseCosts, steps: Sequence[Step]) -> float:
    """Return the standard deviation of measured durations around the predicted ones, as a share of these."""
    shares = _durations(steps) / predict_s(costs, steps) - 1.0
    return float(np.sqrt(np.mean(shares**2)))


def fit_linear(steps: Sequence[Step]) -> DenseCosts:
    """Fit `t = a + b·N + c·K + q·Q`."""
    features, durations = _features(_table(steps), 0, math.inf), _durations(steps)
    first = features @ np.array(_solve(features, durations, durations))
    a, _, b, _, c, q = _solve(features, durations, first)
    return DenseCosts(a, 0, b, b, c, q)


def fit_hinge(steps: Sequence[Step]) -> DenseCosts:
    """Fit the form with knees: the `n0` among the multiples of 32, and the `d0`, that fit best."""
    table, durations = _table(steps), _durations(steps)
    linear = fit_linear(steps)
    scale = predict_s(linear, steps)

    def fit(knee: float, decode_knee: float) -> tuple[float, DenseCosts]:
        features = _features(table, knee, decode_knee)
        a, b0, b1, d, c, q = coefficients = _solve(features, durations, scale)
        loss = float(np.sum(((durations - features @ np.array(coefficients)) / scale) ** 2))
        return loss, DenseCosts(a, int(knee), b0, b1, c, q, int(decode_knee) if d else 0, d)

    best = np.inf, linear
    decode_knees = [math.inf, *_decode_knees(table)]
    decode_knee = math.inf
    # One knee at a time: the second round finds no better pair in practice, and 600 pairs are slow.
    for _ in range(2):
        for knee in _knees(table):
            best = min(best, fit(knee, decode_knee), key=_loss)
        knee = best[1].knee_tokens
        for decode_knee in decode_knees:
            best = min(best, fit(knee, decode_knee), key=_loss)
        decode_knee = best[1].decode_knee if best[1].decode_s else math.inf
    return best[1]


def errors_by_regime(costs: DenseCosts, steps: Sequence[Step]) -> list[RegimeError]:
    """Return relative errors for each regime that has steps, then for all of them."""
    groups = [(regime, [s for s in steps if s.regime == regime]) for regime in _REGIMES]
    return [_error(costs, name, group) for name, group in [*groups, ("all", list(steps))] if group]


def predict_s(costs: DenseCosts, steps: Sequence[Step]) -> Array:
    """Predicted durations, shape (steps,), in seconds."""
    tokens = (costs.token_s, costs.beyond_knee_token_s, costs.decode_s)
    coefficients = np.array([costs.fixed_s, *tokens, costs.context_token_s, costs.attention_s])
    predicted: Array = _features(_table(steps), costs.knee_tokens, costs.decode_knee) @ coefficients
    return predicted


def to_toml(costs: DenseCosts, **of_pool: float) -> str:
    """Return the lines of a cluster file's `[pools.costs]` table, after those `of_pool`."""
    above = [f"{name} = {value:.6g}" for name, value in of_pool.items()]
    lines = [
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value:.6g}"
        for name, value in _items(costs)
    ]
    return "\n".join([*above, *([""] if above else []), "[pools.costs]", *lines, ""])


def _items(costs: DenseCosts) -> list[tuple[str, Any]]:
    names = [field.name for field in fields(costs)]
    return [(name, getattr(costs, name)) for name in ["form", *(n for n in names if n != "form")]]


def _open(path: Path) -> io.TextIOWrapper:
    try:
        if path.suffix == ".gz":
            return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8", newline="")
        return path.open(encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def _check_header(path: Path, header: Sequence[str], where: Mapping[str, str]) -> None:
    if not header:
        raise ConfigError(f"{path}: empty file")
    for quantity, names in _COLUMNS.items():
        if quantity != "attention" and not names.keys() & set(header):
            raise ConfigError(f"{path}: no column {quantity} (or {', '.join(list(names)[1:])}) in the header")
    for name in where:
        if name not in header:
            raise unknown_name("column", name, header, where=str(path))


def _matches(row: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    return all(wanted.lower() in str(row[name]).lower() for name, wanted in where.items())


def _step(place: str, row: Mapping[str, Any]) -> Step:
    values = {quantity: _number(place, row, quantity) for quantity in _COLUMNS}
    if values["duration_s"] <= 0.0:
        raise ConfigError(f"{place}: the duration must be above 0")
    regime = _regime(place, row, values["attention"])
    gap_s = _finite(place, row, "host_gap_s") if "host_gap_s" in row else None
    decodes = _finite(place, row, "decodes") if "decodes" in row else 0.0
    return Step(**values, regime=regime, host_gap_s=gap_s, decodes=decodes)


def _number(place: str, row: Mapping[str, Any], quantity: str) -> float:
    name, scale = next(((n, s) for n, s in _COLUMNS[quantity].items() if n in row), ("", 0.0))
    return scale * _finite(place, row, name) if name else 0.0


def _finite(place: str, row: Mapping[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        raise ConfigError(f"{place}: {name} must be a number, got {row[name] or ''!r}") from None
    if not 0.0 <= value < math.inf:
        raise ConfigError(f"{place}: {name} must be a finite number of at least 0, got {row[name]!r}")
    return value


def _regime(place: str, row: Mapping[str, Any], attention: float) -> Regime:
    text = row.get("phase")
    if text is None:
        return "prefill" if attention else "decode"
    for regime in _REGIMES:
        if text == regime:
            return regime
    raise unknown_name("phase", str(text), _REGIMES, where=place)


def _durations(steps: Sequence[Step]) -> Array:
    return np.array([s.duration_s for s in steps])


class _Table(NamedTuple):
    """Steps in columns, each of shape (steps,)."""

    new: Array
    decodes: Array
    context: Array
    attention: Array


def _table(steps: Sequence[Step]) -> _Table:
    return _Table(
        np.array([s.new_tokens for s in steps], dtype=float),
        np.array([s.decodes for s in steps], dtype=float),
        np.array([0.0 if s.regime == "prefill" else s.context_tokens for s in steps]),
        np.array([s.attention for s in steps], dtype=float),
    )


def _features(table: _Table, knee: float, decode_knee: float) -> Array:
    """Shape (steps, 6): what the coefficients a, b0, b1, d, c, q multiply."""
    tokens = (np.minimum(table.new, knee), np.maximum(table.new - knee, 0.0))
    decodes = np.maximum(table.decodes - decode_knee, 0.0)
    return np.column_stack([np.ones(len(table.new)), *tokens, decodes, table.context, table.attention])


def _solve(features: Array, durations: Array, near: Array) -> list[float]:
    """Least squares of the error relative to `near`, of shape (steps,) in s; the most negative coefficient is
    set to 0 until none is left.
    """
    relative, target = features / near[:, None], durations / near
    scale = np.abs(relative).max(axis=0)  # columns differ by ten orders of magnitude
    kept = [int(column) for column in np.flatnonzero(scale)]
    while True:
        solution = np.linalg.lstsq(relative[:, kept] / scale[kept], target, rcond=None)[0]
        if len(kept) == 1 or solution.min() >= 0.0:
            break
        del kept[int(solution.argmin())]
    result = np.zeros(features.shape[1])
    result[kept] = np.maximum(solution, 0.0) / scale[kept]
    return [float(value) for value in result]


def _knees(table: _Table) -> list[int]:
    low, high = table.new.min(), table.new.max()
    return [knee for knee in range(32, 1025, 32) if low < knee < high]


def _decode_knees(table: _Table) -> list[int]:
    """Whole numbers that are a quarter apart, up to half the most decodes seen: a knee needs steps beyond
    it.
    """
    knees, knee = [], 0
    while knee <= table.decodes.max() / 2 and table.decodes.any():
        knees.append(knee)
        knee += max(1, knee // 4)
    return knees


def _loss(fitted: tuple[float, DenseCosts]) -> float:
    return fitted[0]


def _error(costs: DenseCosts, regime: str, steps: Sequence[Step]) -> RegimeError:
    predicted, measured = predict_s(costs, steps), _durations(steps)
    bias = float(predicted.sum() / measured.sum() - 1.0)
    shares = np.abs(predicted / measured - 1.0)
    return RegimeError(
        regime, len(steps), bias, float(shares.mean()), float(np.percentile(shares, 95)), float(shares.max())
    )
