"""Which figures a person sees first, and how they are written: the same tables on screen and in the report.

A `Grid` is text in rows and columns with the best of each column marked; `to_rich` draws it in a terminal
(leaving out the least telling columns where the window is narrow), `report.html` in a page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from headway.report.confidence import Estimate, estimate
from headway.report.results import CapacityResult, Cell, Comparison, combinations, is_baseline
from headway.report.sweep_result import Point, SweepResult

__all__ = [
    "Column",
    "Grid",
    "capacity_grid",
    "compare_grids",
    "front_grid",
    "headlines",
    "points_grid",
    "refused_grid",
    "sweep_headlines",
    "to_rich",
]

Better = Literal["low", "high", "neither"]
NOTHING = "–"

#: What the frame takes beside a column's text.
_PADDING = 3


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its head, unit, which way is better, its rank (1 is never left out) and if it is words."""

    head: str
    unit: str = ""
    better: Better = "neither"
    rank: int = 1
    text: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A table as text. `best` holds (row, column) of what is marked; `ours`: rows that are no baselines."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    ours: frozenset[int] = frozenset()
    caption: str = ""


@dataclass(frozen=True, slots=True)
class _Measure:
    column: Column
    key: str
    write: Callable[[float], str]
    scale: float = 1.0
    #: Shown only where it is above 0 in some run.
    only_if_any: bool = False
    #: Written with the half-width of its 95% interval where there are several seeds.
    interval: bool = False


def seconds(value: float) -> str:
    """Write seconds with three significant digits."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def percent(value: float) -> str:
    """Write a share as a percentage; only a full 1 is 100%."""
    return "100%" if value == 1 else f"{min(100 * value, 99.9):.1f}%"


def _one(value: float) -> str:
    return f"{value:.1f}"


def _two(value: float) -> str:
    return f"{value:.2f}"


_TTFT_MEAN = _Measure(Column("TTFT mean", "s", "low"), "ttft_s.mean", seconds, interval=True)
_MEASURES = (
    _Measure(Column("TTFT p50", "s", "low", 3), "ttft_s.p50", seconds),
    _Measure(Column("TTFT p99", "s", "low"), "ttft_s.p99", seconds, interval=True),
    _Measure(Column("TPOT p50", "ms", "low", 4), "tpot_s.p50", _one, 1e3),
    _Measure(Column("TPOT p99", "ms", "low", 2), "tpot_s.p99", _one, 1e3),
    _Measure(Column("SLO met", "", "high"), "slo_attainment", percent, interval=True),
    _Measure(Column("envelope", "", "high", 6), "envelope_attainment", percent),
    _Measure(Column("goodput", "req/s", "high", 2), "goodput_rps", _two, interval=True),
    _Measure(Column("chunk used", "", "high", 3), "chunk_utilisation", percent),
    _Measure(Column("bubble", "", "low", 5), "bubble", percent, only_if_any=True),
    _Measure(Column("late TTFT p99", "s", "low", 7), "missed_ttft_s.p99", seconds, only_if_any=True),
    _Measure(Column("rejected", "", "low", 3), "rejected", _one, only_if_any=True),
    _Measure(Column("lost", "", "low"), "lost", _one, only_if_any=True),
)


_GOODPUT_PER_GPU = _Measure(Column("goodput per GPU", "req/s", "high"), "", _two, interval=True)
_SWEEP_MEASURES = tuple(
    measure
    for measure in _MEASURES
    if measure.key in ("ttft_s.p50", "ttft_s.p99", "tpot_s.p99", "slo_attainment", "rejected", "lost")
)


def compare_grids(comparison: Comparison) -> list[Grid]:
    """One grid per load: policies in rows, in the order they were named."""
    cells = comparison.cells()
    measures = [m for m in _MEASURES if not m.only_if_any or any(c.mean(m.key) > 0 for c in cells)]
    return [_grid(comparison, rps, measures) for rps in dict.fromkeys(cell.rps for cell in cells)]


def _grid(comparison: Comparison, rps: float, measures: Sequence[_Measure]) -> Grid:
    cells = [cell for cell in comparison.cells() if cell.rps == rps]
    shown = (_TTFT_MEAN, *measures)
    columns = [Column("policy", text=True), *(m.column for m in shown)]
    labels = [comparison.label(c.policy, c.batch) for c in cells]
    rows = [[x, *(_write(c.estimate(m.key), m) for m in shown)] for x, c in zip(labels, cells, strict=True)]
    baseline = comparison.best_baseline(rps)
    if baseline is not None and len(cells) > 1:
        columns.insert(2, Column("vs best baseline"))
        for row, cell in zip(rows, cells, strict=True):
            row.insert(2, _change(cell, baseline))
    best = frozenset((row, i) for i, column in enumerate(columns) for row in _best(cells, column, shown))
    return Grid(
        _title(comparison, cells[0]),
        tuple(columns),
        tuple(map(tuple, rows)),
        best,
        frozenset(i for i, c in enumerate(cells) if not is_baseline(c.policy, c.batch)),
    )


def _title(comparison: Comparison, cell: Cell) -> str:
    load = f"load {cell.load:g} · " if cell.load is not None else ""
    return f"{load}{cell.rps:.3g} req/s"


def _write(value: Estimate, measure: _Measure) -> str:
    if math.isnan(value.mean):
        return NOTHING
    text = measure.write(value.mean * measure.scale)
    if value.half_width is None or not measure.interval:
        return text
    width = value.half_width * measure.scale
    return f"{text} ±{100 * width:.1f}" if measure.write is percent else f"{text} ±{measure.write(width)}"


def _change(cell: Cell, baseline: Cell) -> str:
    if (cell.policy, cell.batch) == (baseline.policy, baseline.batch):
        return "best"
    change = _against(cell, baseline)
    if math.isnan(change.mean) or _refuses_more(cell, baseline):
        return NOTHING
    width = "" if change.half_width is None else f" ±{100 * change.half_width:.0f}"
    return f"{_signed(change.mean)}{width}"


def _refuses_more(cell: Cell, other: Cell) -> bool:
    """Whether it refuses over 1% more requests: the mean of the rest then says little against the other's."""
    return cell.mean("rejected") > other.mean("rejected") + 0.01 * cell.mean("requests")


def _against(cell: Cell, baseline: Cell) -> Estimate:
    """The change in mean TTFT, paired by seed: both served the same requests, so noise cancels."""
    before = {run.seed: run.ttft_s.get("mean") for run in baseline.runs}
    pairs = ((run.ttft_s.get("mean"), before.get(run.seed)) for run in cell.runs)
    return estimate([after / rival - 1 for after, rival in pairs if after is not None and rival])


def _best(cells: Sequence[Cell], column: Column, shown: Sequence[_Measure]) -> list[int]:
    """The rows that read best in a column: equal text is equally good."""
    measure = next((m for m in shown if m.column is column), None)
    if measure is None or column.better == "neither":
        return []
    means = [cell.mean(measure.key) for cell in cells]
    known = [value for value in means if not math.isnan(value)]
    if len(known) < 2:
        return []
    top = min(known) if column.better == "low" else max(known)
    texts = [measure.write(value * measure.scale) for value in means]
    best = [i for i, text in enumerate(texts) if text == measure.write(top * measure.scale)]
    return best if len(best) < len(known) else []


def capacity_grid(result: CapacityResult) -> Grid:
    """One row per policy, with the change against the best baseline."""
    rival = max((run.capacity_rps for run in result.runs if is_baseline(run.policy, run.batch)), default=0.0)
    top = max((run.capacity_rps for run in result.runs), default=0.0)
    columns = (
        Column("policy", text=True),
        Column("batch", text=True),
        Column("capacity", "req/s", "high"),
        Column("95% interval", "req/s"),
        Column("of nominal"),
        Column("vs best baseline"),
    )
    rows = []
    for run in result.runs:
        interval = f"{max(0.0, run.ci95[0]):.2f} … {run.ci95[1]:.2f}" if run.ci95 else NOTHING
        share = f"{100 * run.capacity_rps / result.provenance.nominal_rps:.0f}%"
        change = _signed(run.capacity_rps / rival - 1, 1) if rival else NOTHING
        rows.append((run.policy, run.batch, f"{run.capacity_rps:.2f}", interval, share, change))
    best = frozenset((i, 2) for i, run in enumerate(result.runs) if run.capacity_rps == top and len(rows) > 1)
    ours = frozenset(i for i, run in enumerate(result.runs) if not is_baseline(run.policy, run.batch))
    return Grid("capacity", columns, tuple(rows), best, ours, _capacity_caption(result))


def _capacity_caption(result: CapacityResult) -> str:
    if not result.runs:
        return ""
    run = result.runs[0]
    what = (
        f"TTFT ≤ {run.slo_ttft_s:g} s and mean TPOT ≤ {1e3 * run.slo_tpot_s:g} ms"
        if run.metric == "slo"
        else "every token before its deadline (FairBatching's envelope)"
    )
    return f"highest rate with {percent(run.attainment)} of requests in time: {what}"


def front_grid(result: SweepResult) -> Grid:
    """The Pareto front, a row per point: the most goodput per GPU first, the least latency last."""
    caption = (
        f"of {len(result.points)} points, those that keep {percent(result.attainment)} of requests in both "
        f"SLOs and that no other such point beats in goodput per GPU and {_written(result.latency)}"
    )
    return _points_grid(result, result.front(), "Pareto front", caption, frozenset())


def points_grid(result: SweepResult) -> Grid:
    """Every point, in the order of the sweep; those on the front are set off."""
    front = result.front()
    on_front = frozenset(i for i, point in enumerate(result.points) if point in front)
    return _points_grid(result, result.points, "all points", "", on_front)


def _points_grid(
    result: SweepResult, points: Sequence[Point], title: str, caption: str, ours: frozenset[int]
) -> Grid:
    known = {measure.key: measure for measure in (_TTFT_MEAN, *_MEASURES)}
    column = Column(_written(result.latency), "s", "low")
    latency = known.get(result.latency, _Measure(column, result.latency, seconds, interval=True))
    shown = [_GOODPUT_PER_GPU, latency, *(m for m in _SWEEP_MEASURES if m is not latency)]
    shown = [m for m in shown if not m.only_if_any or any(p.cell.mean(m.key) > 0 for p in result.points)]
    columns = (Column("topology", text=True), Column("GPUs"), Column("load"), Column("rate", "req/s"))
    rows = [
        (
            result.label(point),
            str(point.topology.gpus),
            NOTHING if point.cell.load is None else f"{point.cell.load:g}",
            f"{point.cell.rps:.3g}",
            *(_write(_point_estimate(point, measure), measure) for measure in shown),
        )
        for point in points
    ]
    return Grid(title, (*columns, *(m.column for m in shown)), tuple(rows), ours=ours, caption=caption)


def _point_estimate(point: Point, measure: _Measure) -> Estimate:
    return point.goodput_per_gpu if measure is _GOODPUT_PER_GPU else point.cell.estimate(measure.key)


def _written(measure: str) -> str:
    """A measure of `Run` in words: `ttft_s.p99` is TTFT p99."""
    what, _, statistic = measure.partition("_s.")
    return f"{what.upper()} {statistic}"


def refused_grid(result: SweepResult) -> Grid:
    """The topologies that cannot be, and simulations that failed, each with its reason."""
    rows = [(refusal.topology.name, refusal.why) for refusal in result.refused]
    rows += [(run.name, run.why) for run in result.failed]
    return Grid("left out", (Column("what", text=True), Column("why", text=True)), tuple(rows))


def sweep_headlines(result: SweepResult) -> list[str]:
    """The two ends of the front in a sentence each, or that there is none."""
    front = result.front()
    if not front:
        best = max((point.cell.mean("slo_attainment") for point in result.points), default=0.0)
        wanted = percent(result.attainment)
        return [f"no point keeps {wanted} of requests in both SLOs; the best keeps {percent(best)}"]
    latency = _written(result.latency)
    ends = {"most goodput per GPU": front[0], f"least {latency}": front[-1]}
    return [
        f"{what}: {result.label(point)} at {_at(point.cell)}, "
        f"{point.goodput_per_gpu.mean:.2f} req/s per GPU, "
        f"{latency} {seconds(point.cell.mean(result.latency))} s"
        for what, point in ends.items()
    ]


def headlines(comparison: Comparison) -> list[str]:
    """A sentence for each of ours: its largest gain on the best baseline, and its largest loss, if any.

    A baseline that buys its TTFT with late tokens, or by refusing more, is no rival there.
    """
    lines = []
    for pair in (pair for pair in combinations(comparison) if not is_baseline(*pair)):
        changes = [
            (_against(cell, best).mean, cell, best)
            for cell in comparison.cells()
            if (cell.policy, cell.batch) == pair and (best := _rival(comparison, cell)) is not None
        ]
        changes = [change for change in changes if not math.isnan(change[0])]
        if changes:
            lines.append(_headline(comparison, changes))
        if in_time := _in_time(comparison, pair):
            lines.append(in_time)
    return lines


def _rival(comparison: Comparison, cell: Cell) -> Cell | None:
    """The baseline with the lowest mean TTFT at equal terms; None when `cell` itself refuses more than it."""
    tpot_s = 1.1 * max(comparison.provenance.slo_tpot_s, cell.mean("tpot_s.p99"))
    rivals = [
        other
        for other in comparison.cells()
        if other.rps == cell.rps
        and is_baseline(other.policy, other.batch)
        and not other.mean("tpot_s.p99") > tpot_s
        and not _refuses_more(cell, other)
        and not math.isnan(other.mean("ttft_s.mean"))
    ]
    return min(rivals, key=lambda other: other.mean("ttft_s.mean"), default=None)


def _headline(comparison: Comparison, changes: list[tuple[float, Cell, Cell]]) -> str:
    gain, cell, rival = min(changes, key=lambda change: change[0])
    worst, where, _ = max(changes, key=lambda change: change[0])
    name = comparison.label(cell.policy, cell.batch)
    if gain > -0.005:
        return f"{name}: mean TTFT never under the best baseline's; {_signed(worst)} at {_at(where)}"
    text = (
        f"{name}: mean TTFT {_signed(gain)} against the best baseline "
        f"({comparison.label(rival.policy, rival.batch)}) at {_at(cell)}"
    )
    return text if worst <= 0.005 else f"{text}; worse at {_at(where)}: {_signed(worst)}"


def _in_time(comparison: Comparison, pair: tuple[str, str]) -> str | None:
    """Where a policy keeps most more requests within both SLOs than any baseline; None when nowhere."""
    mine = {c.rps: c for c in comparison.cells() if (c.policy, c.batch) == pair}
    gains = []
    for rps, cell in mine.items():
        best = max(_baseline_attainments(comparison, rps), default=math.nan)
        gains.append((cell.mean("slo_attainment") - best, cell, best))
    gain, cell, best = max(gains, key=lambda item: item[0] if not math.isnan(item[0]) else -1.0)
    if not gain >= 0.01:
        return None
    met = percent(cell.mean("slo_attainment"))
    return (
        f"{comparison.label(*pair)}: {met} of requests meet both SLOs at {_at(cell)}, "
        f"{percent(best)} under the best baseline"
    )


def _baseline_attainments(comparison: Comparison, rps: float) -> list[float]:
    cells = (c for c in comparison.cells() if c.rps == rps and is_baseline(c.policy, c.batch))
    return [c.mean("slo_attainment") for c in cells]


def _signed(change: float, digits: int = 0) -> str:
    text = f"{100 * change:+.{digits}f}%".replace("-", "−")
    return text if text.strip("+−0.%") else "0%"


def _at(cell: Cell) -> str:
    return f"load {cell.load:g}" if cell.load is not None else f"{cell.rps:.3g} req/s"


def to_rich(grid: Grid, *, width: int = 120) -> Table:
    """Draw a grid for a terminal `width` characters wide."""
    shown = _fit(grid, width)
    table = Table(
        title=grid.title,
        caption=grid.caption or None,
        box=SIMPLE_HEAD,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    for index in shown:
        column = grid.columns[index]
        table.add_column(
            Text("\n".join(_head(column))), justify="left" if column.text else "right", no_wrap=True
        )
    for number, row in enumerate(grid.rows):
        table.add_row(*(_styled(grid, number, index, row[index]) for index in shown))
    return table


def _styled(grid: Grid, row: int, column: int, text: str) -> Text:
    if (row, column) in grid.best:
        return Text(text, style="bold green")
    return Text(text, style="cyan" if column == 0 and row in grid.ours else "")


def _head(column: Column) -> list[str]:
    """A head on two lines, its unit on the second: narrow columns leave room for more of them."""
    first, _, last = column.head.rpartition(" ")
    return [first, f"{last} {column.unit}".rstrip()] if first else [last, column.unit]


def _fit(grid: Grid, width: int) -> list[int]:
    """The columns that fit, dearest kept; the first always."""
    wide = [
        max(map(len, [*_head(column), *(row[i] for row in grid.rows)])) + _PADDING
        for i, column in enumerate(grid.columns)
    ]
    shown = list(range(len(grid.columns)))
    by_rank = sorted(shown, key=lambda i: grid.columns[i].rank)
    while sum(wide[i] for i in shown) > width and grid.columns[by_rank[-1]].rank > 1:
        shown.remove(by_rank.pop())
    return shown
