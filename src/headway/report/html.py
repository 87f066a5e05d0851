"""One self-contained page: what was found, in pictures and tables, and what the numbers rest on.

Opens offline: pictures are inline SVG, there is no script, and colours follow the reader's light or dark
theme. Whatever comes from outside (names, paths, the command) is escaped.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from headway.report import figures
from headway.report.metrics import PassRecord
from headway.report.results import CapacityResult, Comparison, Provenance, combinations, is_baseline
from headway.report.sweep_result import SweepResult
from headway.report.tables import (
    Grid,
    capacity_grid,
    compare_grids,
    front_grid,
    headlines,
    points_grid,
    refused_grid,
    sweep_headlines,
)

__all__ = ["render", "render_sweep", "write", "write_sweep"]

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #5a636e; --rule: #d5d9de;
  --mark: #eaf3fb; --ours: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ec; --soft: #9aa4af;
  --rule: #363c44; --mark: #1c2b38; --ours: #63b3e4; } }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .4rem; }
h2 + p, .soft, figcaption, caption { color: var(--soft); } h3 { font-size: 1.02rem; margin: 2rem 0 .4rem; }
figure { margin: 1rem 0 0; } figcaption { font-size: .88rem; max-width: 46rem; }
svg { width: 100%; height: auto; } svg text { font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%;
  margin: .4rem 0 1.6rem; }
caption { text-align: left; caption-side: bottom; font-size: .85rem; padding-top: .35rem; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.words { text-align: left; white-space: normal; }
thead th { border-bottom: 1px solid var(--ink); font-weight: 600; vertical-align: bottom; }
thead small { display: block; color: var(--soft); font-weight: 400; }
tbody td { border-bottom: 1px solid var(--rule); } td.best { font-weight: 700; background: var(--mark); }
tr.ours td:first-child { color: var(--ours); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
ul.found { padding-left: 1.1rem; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .92em; }
nav a { color: var(--ours); margin-right: 1.2em; }
"""


def render(
    comparisons: Sequence[Comparison], capacities: Sequence[CapacityResult] = (), *, title: str
) -> str:
    """Return the page as text."""
    parts = [_contents(comparisons, capacities)]
    parts += [_comparison(comparison, f"c{i}") for i, comparison in enumerate(comparisons)]
    parts += [_capacity(result, f"k{i}") for i, result in enumerate(capacities)]
    return _page(title, parts)


def render_sweep(result: SweepResult, *, title: str) -> str:
    """Return the page of a sweep as text."""
    return _page(title, [_sweep(result)])


def write(
    path: Path, comparisons: Sequence[Comparison], capacities: Sequence[CapacityResult] = (), *, title: str
) -> None:
    """Write the page to a file."""
    path.write_text(render(comparisons, capacities, title=title), encoding="utf-8")


def write_sweep(path: Path, result: SweepResult, *, title: str) -> None:
    """Write the page of a sweep to a file."""
    path.write_text(render_sweep(result, title=title), encoding="utf-8")


def _page(title: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join([f"<h1>{escape(title)}</h1>", *parts])
        + "\n</body>\n</html>\n"
    )


def _contents(comparisons: Sequence[Comparison], capacities: Sequence[CapacityResult]) -> str:
    if len(comparisons) + len(capacities) < 2:
        return ""
    links = [f'<a href="#c{i}">{escape(_name(c))}</a>' for i, c in enumerate(comparisons)]
    links += [f'<a href="#k{i}">capacity: {escape(_name(c))}</a>' for i, c in enumerate(capacities)]
    return f"<nav>{''.join(links)}</nav>"


def _name(result: Comparison | CapacityResult) -> str:
    return f"{result.cluster} · {result.workload}"


def _comparison(comparison: Comparison, key: str) -> str:
    found = "".join(f"<li>{escape(line)}</li>" for line in headlines(comparison))
    parts = [
        f'<h2 id="{key}">{escape(_name(comparison))}</h2>',
        f'<ul class="found">{found}</ul>' if found else "",
    ]
    if len(comparison.cells()) > len(combinations(comparison)):
        parts += _over_load(comparison, key)
    parts += _one_load(comparison, key)
    parts.append("<h3>All figures</h3>")
    parts += [_table(grid) for grid in compare_grids(comparison)]
    parts.append(_rests_on(comparison.provenance, comparison.cluster, comparison.workload))
    return "\n".join(part for part in parts if part)


def _over_load(comparison: Comparison, key: str) -> list[str]:
    """Figures that need more than one load."""
    parts = [
        "<h3>Latency against load</h3>",
        _figure(
            figures.latency_against_load(comparison),
            f"{key}-load",
            "Means over the seeds. Dotted: the target. A load of 1 is the rate at which the tighter pool "
            "would run full with all its ranks equal.",
        ),
    ]
    bars = figures.read_off_capacity(comparison)
    if bars:
        caption = "highest rate at which 99% of requests meet both targets, read off the loads simulated"
        note = "A policy that is above 99% at every load simulated, or below it at all of them, has no bar."
        parts += ["<h3>Capacity</h3>", _figure(figures.capacity_bars(bars, caption), f"{key}-capacity", note)]
    note = (
        "How much of each pass's chunks was used, and how much of it was ranks waiting for the fullest one."
    )
    parts += [
        "<h3>Chunk utilisation</h3>",
        _figure(figures.utilisation_against_load(comparison), f"{key}-use", note),
    ]
    return parts


def _one_load(comparison: Comparison, key: str) -> list[str]:
    """Figures of a single load: the one nearest to 0.75, where the passes were kept."""
    cell = min(
        comparison.cells(), key=lambda c: abs((c.load or c.rps / comparison.provenance.nominal_rps) - 0.75)
    )
    at = f"load {cell.load:g}" if cell.load is not None else f"{cell.rps:.3g} req/s"
    parts = [
        f"<h3>Distributions at {at}</h3>",
        _figure(
            figures.distributions(comparison, cell.rps),
            f"{key}-cdf",
            "Read from the left: the share of requests that took longer than the value below. First seed.",
        ),
    ]
    if comparison.timelines:
        note = (
            "A lane per rank, an outline per pass, filled as far as its chunk was used: "
            "blue prompts, orange decodes. Empty inside an outline: the rank waits for a fuller one. "
            "Empty between outlines: the engine is idle."
        )
        parts += [
            f"<h3>Passes at {at}</h3>",
            _figure(figures.timeline(_telling(comparison, cell.rps)), f"{key}-passes", note),
        ]
    return parts


def _telling(comparison: Comparison, rps: float) -> dict[str, list[PassRecord]]:
    """The timelines worth the room: the first of ours, the best baseline and the worst."""
    cells = sorted((c for c in comparison.cells() if c.rps == rps), key=lambda c: c.mean("ttft_s.mean"))
    ours = [pair for pair in combinations(comparison) if not is_baseline(*pair)][:2]
    others = [(c.policy, c.batch) for c in cells if is_baseline(c.policy, c.batch)]
    labels = [comparison.label(*pair) for pair in dict.fromkeys([*ours, *others[:1], *others[-1:]])]
    return {label: comparison.timelines[label] for label in labels if label in comparison.timelines}


def _capacity(result: CapacityResult, key: str) -> str:
    grid = capacity_grid(result)
    bars = figures.capacity_bars(figures.measured_capacity(result), grid.caption)
    return "\n".join(
        [
            f'<h2 id="{key}">Capacity: {escape(_name(result))}</h2>',
            _figure(bars, f"{key}-bars", "Whiskers: 95% interval over the seeds."),
            _table(grid),
            _rests_on(result.provenance, result.cluster, result.workload),
        ]
    )


def _sweep(result: SweepResult) -> str:
    found = "".join(f"<li>{escape(line)}</li>" for line in sweep_headlines(result))
    note = "Means over the seeds. Up and to the left is better. Dotted, where it is near: the target."
    grids = [front_grid(result), points_grid(result), refused_grid(result)]
    return "\n".join(
        [
            f"<h2>{escape(result.workload)}</h2>",
            f'<ul class="found">{found}</ul>',
            _figure(figures.goodput_against_latency(result), "pareto", note),
            *(_table(grid) for grid in grids if grid.rows),
            _rests_on(result.provenance, "DeepSeek-V3, prefill and decode apart", result.workload),
        ]
    )


def _figure(figure: Figure, name: str, note: str) -> str:
    return f"<figure>{figures.to_svg(figure, name)}<figcaption>{escape(note)}</figcaption></figure>"


def _table(grid: Grid) -> str:
    heads = "".join(f"<th>{escape(c.head)}{_unit(c.unit)}</th>" for c in grid.columns)
    body = "".join(_row(grid, number) for number in range(len(grid.rows)))
    caption = f"<caption>{escape(grid.caption)}</caption>" if grid.caption else ""
    return (
        f"<h3>{escape(grid.title)}</h3>"
        f'<div class="scroll"><table>{caption}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _unit(unit: str) -> str:
    return f"<small>{escape(unit)}</small>" if unit else ""


def _row(grid: Grid, number: int) -> str:
    row = enumerate(grid.rows[number])
    cells = "".join(f"<td{_class(grid, number, i)}>{escape(text)}</td>" for i, text in row)
    return f'<tr class="ours">{cells}</tr>' if number in grid.ours else f"<tr>{cells}</tr>"


def _class(grid: Grid, row: int, column: int) -> str:
    if (row, column) in grid.best:
        return ' class="best"'
    return ' class="words"' if column and grid.columns[column].text else ""


def _rests_on(basis: Provenance, cluster: str, workload: str) -> str:
    seeds = ", ".join(map(str, basis.seeds))
    facts = {
        "Cluster": f"{cluster}: {basis.cluster_source}",
        "Workload": (
            f"{workload}: {basis.workload_source}; means {basis.mean_prompt_tokens:.0f} prompt and "
            f"{basis.mean_output_tokens:.0f} output tokens"
        ),
        "Arrivals": f"{basis.arrivals}, {basis.requests:,} requests per simulation",
        "Nominal capacity": f"{basis.nominal_rps:.2f} requests per second (load 1)",
        "Targets": f"TTFT {basis.slo_ttft_s:g} s, TPOT {1e3 * basis.slo_tpot_s:g} ms",
        "Seeds": seeds,
        "Version": f"headway {basis.version}",
    }
    if math.isnan(basis.nominal_rps):  # of many clusters, each with its own
        del facts["Nominal capacity"]
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    command = f"<dt>Command</dt><dd><code>{escape(basis.command)}</code></dd>"
    return f"<h3>What the numbers rest on</h3><dl>{rows}{command}</dl>"
