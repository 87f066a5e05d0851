"""How results are drawn: latency against load, distributions, capacity, attainment, and passes per rank.

Ours are in colour, baselines in grey, told apart by marker and dash; colours are Okabe and Ito's, safe for
the colour-blind. Figures are made with matplotlib's objects alone (no pyplot, no global state): `to_png` for
paper and screen, `to_svg` for a page, where ink follows the page's own text colour.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from headway.report.metrics import QUANTILES, PassRecord
from headway.report.results import CapacityResult, Cell, Comparison, combinations, is_baseline
from headway.report.sweep_result import Point, SweepResult

__all__ = [
    "capacity_bars",
    "distributions",
    "goodput_against_latency",
    "latency_against_load",
    "overview",
    "timeline",
    "to_png",
    "to_svg",
    "utilisation_against_load",
]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREYS = ("#7d7d7d", "#9a9a9a", "#8b8b8b", "#a8a8a8", "#707070", "#939393")
#: Later lines are narrower, so that one that runs under another still shows.
_WIDTHS = (3.2, 1.8, 1.2)
_MARKERS = ("s", "^", "D", "v", "P", "X")
_DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)))
#: Stand-ins in the SVG that a page replaces by its own colours.
_INK, _RULE = "#010203", "#c8c8c9"
_T = TypeVar("_T")
_PREFILL, _DECODE = "#0072B2", "#E69F00"

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "headway",
    "savefig.transparent": False,
}


@dataclass(frozen=True, slots=True)
class _Look:
    """How one policy is drawn, the same in every figure."""

    label: str
    colour: str
    marker: str
    dash: tuple[float, tuple[float, ...]]
    width: float
    ours: bool


def overview(comparisons: Sequence[Comparison]) -> Figure:
    """Draw the main figure: a row per comparison; mean and p99 TTFT and SLO attainment against load."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(11.5, 3.7 * len(comparisons)), layout="constrained")
        rows = figure.subfigures(len(comparisons), 1, squeeze=False)
        for part, comparison in zip(rows[:, 0], comparisons, strict=True):
            part.suptitle(
                _caption(comparison), x=0.01, ha="left", fontsize=10.5, fontweight="bold", color=_INK
            )
            mean, tail, met = part.subplots(1, 3)
            looks = _looks(comparison)
            _lines(mean, comparison, looks, "ttft_s.mean", "mean TTFT, s", log=True)
            _lines(tail, comparison, looks, "ttft_s.p99", "p99 TTFT, s", log=True)
            _lines(met, comparison, looks, "slo_attainment", "requests that meet both SLOs")
            _as_share(met)
            _target(tail, comparison.provenance.slo_ttft_s)
            _legend(part, mean)
        return figure


def latency_against_load(comparison: Comparison) -> Figure:
    """Draw mean and p99 TTFT, p99 TPOT and attainment against load, one line per policy."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 6.6), layout="constrained")
        axes = figure.subplots(2, 2)
        looks = _looks(comparison)
        _lines(axes[0, 0], comparison, looks, "ttft_s.mean", "mean TTFT, s", log=True)
        _lines(axes[0, 1], comparison, looks, "ttft_s.p99", "p99 TTFT, s", log=True)
        _lines(axes[1, 0], comparison, looks, "tpot_s.p99", "p99 TPOT, ms", scale=1e3)
        axes[1, 0].set_ylim(bottom=0.0)
        _lines(axes[1, 1], comparison, looks, "slo_attainment", "requests that meet both SLOs")
        _as_share(axes[1, 1])
        _target(axes[0, 1], comparison.provenance.slo_ttft_s)
        _target(axes[1, 0], 1e3 * comparison.provenance.slo_tpot_s)
        _legend(figure, axes[0, 0])
        return figure


def utilisation_against_load(comparison: Comparison) -> Figure:
    """Draw how full the chunks are, and how much of the passes is bubble, against load."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.5), layout="constrained")
        used, bubble = figure.subplots(1, 2)
        looks = _looks(comparison)
        _lines(used, comparison, looks, "chunk_utilisation", "chunk used")
        _lines(bubble, comparison, looks, "bubble", "bubble (1 − mean rank / fullest rank)")
        for axes in (used, bubble):
            _as_share(axes)
        _legend(figure, used)
        return figure


def distributions(comparison: Comparison, rps: float) -> Figure:
    """Draw the share of requests whose TTFT, and TPOT, is above a value: tails show on a log scale."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        ttft, tpot = figure.subplots(1, 2)
        looks = _looks(comparison)
        for cell in comparison.cells():
            if cell.rps == rps:
                sampled = comparison.distribution_of(cell)
                _survival(ttft, sampled.ttft_s, looks[cell.policy, cell.batch])
                _survival(tpot, [1e3 * value for value in sampled.tpot_s], looks[cell.policy, cell.batch])
        for axes, name, target in (
            (ttft, "TTFT, s", comparison.provenance.slo_ttft_s),
            (tpot, "TPOT, ms", 1e3 * comparison.provenance.slo_tpot_s),
        ):
            axes.set(xlabel=name, yscale="log", ylim=(1e-3, 1.15))
            axes.set_title(f"share of requests with a {name.split(',')[0]} above")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
            _target(axes, target, across=True)
        ttft.set_xscale("log")
        ttft.xaxis.set_major_formatter(_PLAIN)
        _legend(figure, ttft)
        return figure


def capacity_bars(bars: Mapping[str, tuple[float, float | None, bool]], caption: str) -> Figure:
    """Draw bars of capacity: label → (requests per second, half-width of the 95% interval or None, ours)."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 0.7 + 0.32 * len(bars)), layout="constrained")
        axes = figure.subplots()
        places = list(range(len(bars)))[::-1]
        values = [value for value, _, _ in bars.values()]
        colours = [_COLOURS[0] if ours else _GREYS[1] for _, _, ours in bars.values()]
        errors = [half_width or 0.0 for _, half_width, _ in bars.values()]
        axes.barh(places, values, color=colours, height=0.66)
        if any(errors):
            axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=_INK, elinewidth=1.0, capsize=2.5)
        for place, value, error in zip(places, values, errors, strict=True):
            axes.annotate(
                f"{value:.3g}", (value + error, place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(places, list(bars))
        longest = max(value + error for value, error in zip(values, errors, strict=True))
        axes.set(xlabel="requests per second", xlim=(0, 1.12 * longest or 1.0))
        axes.set_title(caption, fontsize=9.0, fontweight="normal")
        axes.grid(visible=False, axis="y")
        return figure


def goodput_against_latency(result: SweepResult) -> Figure:
    """Draw every point of a sweep: latency across, goodput per GPU up; the Pareto front as a line, named."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 5.2), layout="constrained")
        axes = figure.subplots()
        front = result.front()
        able = [p.cell.mean("slo_attainment") >= result.attainment for p in result.points]
        rest = [(p, ok) for p, ok in zip(result.points, able, strict=True) if p not in front]
        _scatter(axes, result, [p for p, ok in rest if ok], _GREYS[0], "o", "beaten")
        _scatter(axes, result, [p for p, ok in rest if not ok], _GREYS[3], "x", "too few in SLO")
        _scatter(axes, result, front[::-1], _COLOURS[0], "o", "Pareto front", line=True)
        for point in _apart(front):
            place = (point.cell.mean(result.latency), point.goodput_per_gpu.mean)
            text = f"{result.label(point)} at {_rate(point.cell)}"
            axes.annotate(text, place, (-6, 4), textcoords="offset points", ha="right", fontsize=7.5)
        what, _, statistic = result.latency.partition("_s.")
        axes.set(
            xscale="log", xlabel=f"{what.upper()} {statistic}, s", ylabel="req/s per GPU", ylim=(0, None)
        )
        axes.set_title("goodput per GPU against latency")
        axes.xaxis.set_major_formatter(_PLAIN)
        left, right = axes.get_xlim()
        axes.set_xlim(left * (left / right) ** 0.3, right)  # names stand to the left of their points
        axes.xaxis.set_minor_formatter(_PLAIN if right < 3.0 * left else _SPARSE)
        slo = {"ttft": result.provenance.slo_ttft_s, "tpot": result.provenance.slo_tpot_s}
        if what in slo:
            _target(axes, slo[what], across=True)
        if result.points:
            _legend(figure, axes)
        return figure


def _apart(front: Sequence[Point]) -> list[Point]:
    """Those of the front whose names do not run into each other: a twentieth of the height lies between."""
    named: list[Point] = []
    for point in front:
        gap = named[-1].goodput_per_gpu.mean - point.goodput_per_gpu.mean if named else math.inf
        if gap >= 0.05 * front[0].goodput_per_gpu.mean:
            named.append(point)
    return named


def _scatter(
    axes: Axes,
    result: SweepResult,
    points: Sequence[Point],
    colour: str,
    marker: str,
    label: str,
    *,
    line: bool = False,
) -> None:
    if points:
        xs = [point.cell.mean(result.latency) for point in points]
        ys = [point.goodput_per_gpu.mean for point in points]
        # A staircase: between two points the better of those within the latency is what can be had.
        how: dict[str, Any] = {"drawstyle": "steps-post", "zorder": 3} if line else {"linestyle": "none"}
        axes.plot(xs, ys, color=colour, marker=marker, label=label, **how)


def _rate(cell: Cell) -> str:
    return f"load {cell.load:g}" if cell.load is not None else f"{cell.rps:.3g} req/s"


def measured_capacity(result: CapacityResult) -> dict[str, tuple[float, float | None, bool]]:
    """Bars from a capacity search."""
    several = len({run.batch for run in result.runs}) > 1
    return {
        f"{run.policy} · {run.batch}" if several else run.policy: (
            run.capacity_rps,
            (run.ci95[1] - run.ci95[0]) / 2 if run.ci95 else None,
            not is_baseline(run.policy, run.batch),
        )
        for run in result.runs
    }


def read_off_capacity(
    comparison: Comparison, attainment: float = 0.99
) -> dict[str, tuple[float, float | None, bool]]:
    """Bars read off a comparison: where attainment falls through the mark, linear between the rates
    simulated.

    Leaves out a policy that is above the mark at every rate, or below it at all of them: there is nothing to
    read.
    """
    bars: dict[str, tuple[float, float | None, bool]] = {}
    for policy, batch in combinations(comparison):
        points = _points(comparison, policy, batch, "slo_attainment", by_load=False)
        crossing = _crossing(points, attainment)
        if crossing is not None:
            bars[comparison.label(policy, batch)] = (crossing, None, not is_baseline(policy, batch))
    return bars


def timeline(timelines: Mapping[str, Sequence[PassRecord]]) -> Figure:
    """Draw passes as lanes, one per rank: an outline per pass, filled as far as its chunk was used.

    White inside an outline is a rank that waits for a fuller one; white between outlines is an idle engine.
    """
    shown = {label: _without_decode_pool(passes) for label, passes in timelines.items()}
    shown = {label: passes for label, passes in shown.items() if passes}
    span_s = _span_s([p for passes in shown.values() for p in passes])
    with rc_context(_STYLE):
        lanes = {label: _lanes(passes) for label, passes in shown.items()}
        height = sum(0.55 + max(0.5, 0.085 * len(own)) for own in lanes.values())
        figure = Figure(figsize=(9.6, 0.5 + height), layout="constrained")
        ratios = [max(4, len(own)) for own in lanes.values()]
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=ratios)
        for axes, (label, passes) in zip(panels[:, 0], shown.items(), strict=True):
            _draw_lanes(axes, passes, lanes[label], span_s)
            axes.set_title(_timeline_title(label, passes))
            axes.tick_params(axis="x", length=0)
        panels[-1, 0].set_xlabel("seconds")
        return figure


def to_png(figure: Figure, path: Path, *, dpi: int = 160) -> None:
    """Write a PNG on white."""
    with rc_context(_STYLE):
        figure.savefig(path, format="png", dpi=dpi, facecolor="white")


def to_svg(figure: Figure, name: str) -> str:
    """Return an `<svg>` element for a page: ink is `currentColor`, identifiers begin with `name`."""
    out = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)\bwidth="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)\bheight="[^"]*"', r'<svg \1role="img"', svg, count=1)
    return svg.replace(_INK, "currentColor").replace(_RULE, "var(--rule)")


def _caption(comparison: Comparison) -> str:
    return f"{comparison.cluster} · {comparison.workload} · {comparison.provenance.arrivals} arrivals"


def _looks(comparison: Comparison) -> dict[tuple[str, str], _Look]:
    pairs = combinations(comparison)
    ours = [pair for pair in pairs if not is_baseline(*pair)]
    others = [pair for pair in pairs if is_baseline(*pair)]
    looks = {pair: _our_look(i, comparison.label(*pair)) for i, pair in enumerate(ours)}
    return looks | {pair: _grey_look(i, comparison.label(*pair)) for i, pair in enumerate(others)}


def _our_look(index: int, label: str) -> _Look:
    return _Look(label, _pick(_COLOURS, index), "o", _DASHES[0], _pick(_WIDTHS, index), ours=True)


def _grey_look(index: int, label: str) -> _Look:
    colour, marker, dash = _pick(_GREYS, index), _pick(_MARKERS, index), _pick(_DASHES, index)
    return _Look(label, colour, marker, dash, 1.1, ours=False)


def _pick(choices: Sequence[_T], index: int) -> _T:
    return choices[index % len(choices)]


def _points(
    comparison: Comparison, policy: str, batch: str, measure: str, *, by_load: bool
) -> list[tuple[float, float]]:
    """(load or rate, mean of the measure), ascending; values that do not exist are left out."""
    cells: Iterable[Cell] = (c for c in comparison.cells() if (c.policy, c.batch) == (policy, batch))
    points = [(c.load if by_load and c.load is not None else c.rps, c.mean(measure)) for c in cells]
    return sorted((x, y) for x, y in points if not math.isnan(y))


def _crossing(points: Sequence[tuple[float, float]], mark: float) -> float | None:
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 >= mark > y1:
            return x0 + (x1 - x0) * (y0 - mark) / (y0 - y1)
    return None


def _lines(
    axes: Axes,
    comparison: Comparison,
    looks: Mapping[tuple[str, str], _Look],
    measure: str,
    title: str,
    *,
    log: bool = False,
    scale: float = 1.0,
) -> None:
    ends: list[tuple[float, float, _Look]] = []
    by_load = all(run.load is not None for run in comparison.runs)
    for (policy, batch), look in looks.items():
        points = _points(comparison, policy, batch, measure, by_load=by_load)
        if points:
            xs, ys = [x for x, _ in points], [scale * y for _, y in points]
            _line(axes, xs, ys, look)
            ends.append((xs[-1], ys[-1], look))
    axes.set_title(title)
    axes.set_xlabel("load (1 = nominal capacity)" if by_load else "requests per second")
    if log and ends:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.yaxis.set_minor_formatter(_SPARSE)


def _line(axes: Axes, xs: Sequence[float], ys: Sequence[float], look: _Look) -> None:
    axes.plot(
        xs,
        ys,
        color=look.colour,
        marker=look.marker,
        linestyle=look.dash,
        linewidth=look.width,
        markersize=5.0 if look.ours else 3.8,
        zorder=3 if look.ours else 2,
        label=look.label,
    )


def _survival(axes: Axes, values: Sequence[float], look: _Look) -> None:
    if values:
        above = [1 - q for q in QUANTILES]
        axes.plot(
            values,
            above,
            color=look.colour,
            linestyle=look.dash,
            linewidth=look.width,
            zorder=3 if look.ours else 2,
            label=look.label,
        )


def _legend(part: FigureBase, axes: Axes) -> None:
    """One legend for all panels of a part, under them."""
    handles, labels = axes.get_legend_handles_labels()
    room, widest = 150, 6 + max(map(len, labels), default=1)
    one_row = sum(6 + len(label) for label in labels) <= room
    columns = len(labels) if one_row else min(len(labels), max(1, room // widest))
    part.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5)


def _target(axes: Axes, value: float, *, across: bool = False) -> None:
    """Mark an SLO, without letting it stretch the scale."""
    limits = axes.get_xlim() if across else axes.get_ylim()
    if limits[0] < value < limits[1]:
        rule = axes.axvline if across else axes.axhline
        rule(value, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)


def _as_share(axes: Axes) -> None:
    axes.set_ylim(-0.02, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _plain(value: float, _position: object = None) -> str:
    return f"{value:g}"


def _sparse(value: float, _position: object = None) -> str:
    """Label 2 and 5 of each decade only."""
    lead = value / 10 ** math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:g}" if round(lead, 6) in (2.0, 5.0) else ""


_PLAIN = FuncFormatter(_plain)
_SPARSE = FuncFormatter(_sparse)


def _span_s(passes: Sequence[PassRecord]) -> tuple[float, float]:
    """From the first end to the last start: no lane begins or ends in the void. All, if that is nothing."""
    start, end = min(p.end_s for p in passes), max(p.start_s for p in passes)
    return (start, end) if start < end else (min(p.start_s for p in passes), max(p.end_s for p in passes))


def _without_decode_pool(passes: Sequence[PassRecord]) -> list[PassRecord]:
    """A decode pool's passes follow one another without end: prefill is where bubbles are."""
    return [p for p in passes if p.role != "decode"]


def _lanes(passes: Sequence[PassRecord]) -> dict[tuple[str, int], int]:
    """Each (instance, rank) to its lane, from the top down."""
    ranks = {(p.instance, p.first_rank + i) for p in passes for i in range(len(p.prefill_tokens))}
    return {key: lane for lane, key in enumerate(sorted(ranks))}


def _draw_lanes(
    axes: Axes,
    passes: Sequence[PassRecord],
    lanes: Mapping[tuple[str, int], int],
    span_s: tuple[float, float],
) -> None:
    outlines, prefills, decodes = [], [], []
    for record in passes:
        start, end = record.start_s - span_s[0], record.end_s - span_s[0]
        for rank, (tokens, running) in enumerate(zip(record.prefill_tokens, record.decodes, strict=True)):
            bottom = lanes[record.instance, record.first_rank + rank] + 0.92
            share = 0.84 * min(1.0, tokens / record.chunk_tokens)
            outlines.append(_box(start, end, bottom, 0.84))
            prefills.append(_box(start, end, bottom, share))
            if running:
                part = 0.84 * min(1.0, (tokens + running) / record.chunk_tokens)
                decodes.append(_box(start, end, bottom - share, min(0.84 - share, max(0.06, part - share))))
    axes.add_collection(PolyCollection(prefills, facecolors=_PREFILL, linewidths=0))
    axes.add_collection(PolyCollection(decodes, facecolors=_DECODE, linewidths=0))
    frames = PolyCollection(outlines, facecolors="none", edgecolors=_INK, linewidths=0.3, alpha=0.7)
    axes.add_collection(frames)
    axes.set(xlim=(0, span_s[1] - span_s[0]), ylim=(len(lanes), 0))
    axes.grid(visible=False)
    _name_instances(axes, lanes)


def _box(start: float, end: float, bottom: float, height: float) -> list[tuple[float, float]]:
    """A rectangle in data coordinates; lanes count downwards, so its top is above, at a smaller value."""
    return [(start, bottom), (end, bottom), (end, bottom - height), (start, bottom - height)]


def _name_instances(axes: Axes, lanes: Mapping[tuple[str, int], int]) -> None:
    places: dict[str, list[int]] = {}
    for (instance, _), lane in lanes.items():
        places.setdefault(instance, []).append(lane)
    axes.set_yticks([sum(own) / len(own) + 0.5 for own in places.values()], list(places))
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.yaxis.set_minor_locator(NullLocator())
    for own in list(places.values())[1:]:
        axes.axhline(own[0], color=_INK, linewidth=0.7)


def _timeline_title(label: str, passes: Sequence[PassRecord]) -> str:
    used = sum(sum(p.prefill_tokens) for p in passes)
    room = sum(p.chunk_tokens * len(p.prefill_tokens) for p in passes)
    return f"{label}: {100 * used / room:.0f}% of the chunks in this window used"
