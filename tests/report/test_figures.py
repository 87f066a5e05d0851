"""Pictures: what is drawn, not how it looks."""

from dataclasses import replace
from pathlib import Path

import pytest

from headway.report import figures
from headway.report.results import CapacityResult, Comparison


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_lines_for_every_policy_in_each_panel(comparison: Comparison):
    figure = figures.latency_against_load(comparison)
    assert labels(figure) == ["staggered", "least-tokens", "round-robin"]
    lines = figure.axes[0].get_lines()
    assert list(lines[0].get_xdata()) == [0.4, 0.8]
    assert list(lines[0].get_ydata()) == pytest.approx([1.35, 1.8])


def test_ours_are_coloured_and_baselines_grey(comparison: Comparison):
    ours, *baselines = figures.latency_against_load(comparison).axes[0].get_lines()
    assert ours.get_linewidth() > baselines[0].get_linewidth()
    for line in baselines:
        red, green, blue = (int(line.get_color()[i : i + 2], 16) for i in (1, 3, 5))
        assert red == green == blue


def test_rates_are_drawn_where_no_load_was_given(comparison: Comparison):
    rates = replace(comparison, runs=[replace(run, load=None) for run in comparison.runs])
    axes = figures.latency_against_load(rates).axes[0]
    assert axes.get_xlabel() == "requests per second"


def test_capacity_is_read_off_between_loads(comparison: Comparison):
    """least-tokens falls from 100% at 4 to 90% at 8 requests per second: through 99% at 4.4."""
    bars = figures.read_off_capacity(comparison)
    assert bars["least-tokens"][0] == pytest.approx(4.4)
    assert "staggered" not in bars  # never under 99%: nothing to read off


def test_searched_capacity_has_whiskers(capacities: CapacityResult):
    bars = figures.measured_capacity(capacities)
    assert bars["pab · fair"] == (12.0, 1.0, True)
    assert figures.capacity_bars(bars, "x").axes[0].containers


def test_the_timeline_has_a_lane_per_prefill_rank(comparison: Comparison):
    figure = figures.timeline(comparison.timelines)
    assert len(figure.axes) == 2
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["prefill-0"]
    assert figure.axes[0].get_ylim() == (2, 0)
    assert "42%" in figure.axes[0].get_title(loc="left")  # 170 of 400 tokens


def test_the_overview_is_a_png(comparison: Comparison, tmp_path: Path):
    figures.to_png(figures.overview([comparison, comparison]), tmp_path / "a.png", dpi=40)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_figure_is_the_same_svg(comparison: Comparison):
    first, second = (figures.to_svg(figures.distributions(comparison, 8.0), "a") for _ in range(2))
    assert first == second
    assert first.startswith("<svg")
