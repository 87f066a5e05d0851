"""A sweep by hand: which points are on the front, and how they are written and drawn."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.errors import ConfigError
from headway.model.topology import Topology
from headway.report import figures
from headway.report.html import render_sweep
from headway.report.metrics import Run
from headway.report.results import Cell, Provenance
from headway.report.sweep_result import Point, SweepResult, latency_measure
from headway.report.tables import front_grid, points_grid, refused_grid, sweep_headlines


def front(result: SweepResult) -> list[tuple[str, float | None]]:
    return [(point.topology.pools, point.cell.load) for point in result.front()]


def test_goodput_is_per_gpu_in_use(swept: SweepResult):
    assert [point.goodput_per_gpu.mean for point in swept.points] == [1.0, 2.0, 4.0, 0.5, 2.5, 1.5]


def test_the_front_is_what_nothing_beats_among_those_that_keep_the_targets(swept: SweepResult):
    assert front(swept) == [("3×EP8 + 1×EP32", 0.8), ("4×EP8 + 4×EP8", 0.8), ("4×EP8 + 4×EP8", 0.4)]


def test_with_a_lower_bar_the_swamped_one_is_on_it(swept: SweepResult):
    assert front(replace(swept, attainment=0.8))[0] == ("4×EP8 + 4×EP8", 1.2)


def test_another_latency_is_another_front(swept: SweepResult):
    assert front(replace(swept, latency="tpot_s.p99")) == [("3×EP8 + 1×EP32", 0.8)]  # equal TPOT everywhere


def test_equal_points_are_on_the_front_once(swept: SweepResult):
    doubled = replace(swept, points=[*swept.points, *swept.points])
    assert front(doubled) == front(swept)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_the_front_beats_all_others_and_none_of_its_own(pairs: list[tuple[int, int]]):
    def beats(one: Point, other: Point) -> bool:
        (more, sooner), (less, later) = place(one), place(other)
        return more >= less and sooner <= later and (more, sooner) != (less, later)

    result = swept_at(pairs)
    on_front = result.front()
    for point in result.points:
        beaten = any(beats(other, point) for other in result.points)
        assert beaten or place(point) in [place(other) for other in on_front]
    assert not any(beats(one, other) for one in on_front for other in on_front)


def place(point: Point) -> tuple[float, float]:
    return point.goodput_per_gpu.mean, point.cell.mean("ttft_s.p99")


def swept_at(pairs: list[tuple[int, int]]) -> SweepResult:
    topology = Topology("h200", 1, 8, 1, 8, 4096)
    points = [
        Point(topology, Cell("p", "b", None, float(number), (make_run(16.0 * goodput, float(ttft_s)),)))
        for number, (goodput, ttft_s) in enumerate(pairs)
    ]
    return SweepResult("made-up", points, PROVENANCE)


def make_run(goodput_rps: float, ttft_s: float) -> Run:
    """A run of which the front sees only these."""
    spread = {"p99": ttft_s}
    return Run(
        "p",
        "b",
        None,
        1.0,
        0,
        1,
        1,
        0,
        0,
        spread,
        spread,
        spread,
        1.0,
        1.0,
        goodput_rps,
        1.0,
        1.0,
        0.0,
        0.0,
        1,
        0.0,
    )


PROVENANCE = Provenance("0", "c", "k", "w", "poisson", 1, (0,), 2.0, 0.05, 1.0, 1.0, 1.0)


def test_the_table_reads_from_most_goodput_to_least_latency(swept: SweepResult):
    grid = front_grid(swept)
    assert [column.head for column in grid.columns][:6] == [
        "topology",
        "GPUs",
        "load",
        "rate",
        "goodput per GPU",
        "TTFT p99",
    ]
    assert [row[:6] for row in grid.rows] == [
        ("3×EP8 + 1×EP32", "56", "0.8", "8", "2.50 ±0.00", "1.20 ±0.000"),
        ("4×EP8 + 4×EP8", "64", "0.8", "8", "2.00 ±0.00", "0.900 ±0.000"),
        ("4×EP8 + 4×EP8", "64", "0.4", "4", "1.00 ±0.00", "0.600 ±0.000"),
    ]
    assert grid.caption.startswith("of 6 points, those that keep 90.0% of requests in both SLOs")


def test_a_latency_that_has_no_column_gets_one(swept: SweepResult):
    grid = front_grid(replace(swept, latency="e2e_s.p95"))
    assert (grid.columns[5].head, grid.columns[5].unit) == ("E2E p95", "s")
    assert len({column.head for column in grid.columns}) == len(grid.columns)


def test_all_points_stand_in_the_order_of_the_sweep_with_the_front_set_off(swept: SweepResult):
    grid = points_grid(swept)
    assert len(grid.rows) == 6
    assert grid.ours == {0, 1, 4}


def test_a_label_says_what_differs(swept: SweepResult):
    first = swept.points[0]
    assert swept.label(first) == "4×EP8 + 4×EP8"
    other = Point(replace(first.topology, system="h100", chunk_tokens=2048), first.cell)
    more = replace(swept, points=[*swept.points, other])
    assert (more.label(first), more.label(other)) == (
        "H200 · 4×EP8 + 4×EP8 · 4,096",
        "H100 · 4×EP8 + 4×EP8 · 2,048",
    )


def test_headlines_are_the_ends_of_the_front(swept: SweepResult):
    assert sweep_headlines(swept) == [
        "most goodput per GPU: 3×EP8 + 1×EP32 at load 0.8, 2.50 req/s per GPU, TTFT p99 1.20 s",
        "least TTFT p99: 4×EP8 + 4×EP8 at load 0.4, 1.00 req/s per GPU, TTFT p99 0.600 s",
    ]


def test_a_front_of_nobody_is_said_to_be(swept: SweepResult):
    nobody = replace(swept, points=swept.points[2:3])
    assert nobody.front() == []
    assert sweep_headlines(nobody) == ["no point keeps 90.0% of requests in both SLOs; the best keeps 85.0%"]
    assert "no point keeps" in render_sweep(nobody, title="t")


def test_what_is_left_out_stands_with_its_reason(swept: SweepResult):
    assert refused_grid(swept).rows == (
        ("dsv3-h200-3xep32-1xep8-c4096", "needs 104 GPUs, there are 64"),
        ("dsv3 · staggered · seed 3", "lost 3 times: <killed>"),
    )


def test_the_figure_draws_the_front_over_the_rest(swept: SweepResult):
    figure = figures.goodput_against_latency(swept)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "beaten",
        "too few in SLO",
        "Pareto front",
    ]
    beaten, swamped, best = figure.axes[0].get_lines()[:3]
    assert list(beaten.get_xdata()) == pytest.approx([0.8, 3.0])
    assert list(swamped.get_ydata()) == [4.0]
    assert list(best.get_xdata()) == pytest.approx([0.6, 0.9, 1.2])
    assert list(best.get_ydata()) == [1.0, 2.0, 2.5]
    assert "3×EP8 + 1×EP32 at load 0.8" in [text.get_text() for text in figure.axes[0].texts]


def test_the_page_holds_figure_tables_and_reasons_escaped(swept: SweepResult):
    page = render_sweep(swept, title="Topologies")
    assert page.startswith("<!doctype html>") and "<svg" in page
    assert "Pareto front" in page and "all points" in page and "left out" in page
    assert "lost 3 times: &lt;killed&gt;" in page and "<killed>" not in page
    assert "Nominal capacity" not in page


def test_the_document_marks_the_front(swept: SweepResult):
    document = json.loads(swept.to_json())
    assert [point["front"] for point in document["points"]] == [True, True, False, False, True, False]
    assert document["points"][4]["goodput_rps_per_gpu"] == 2.5
    assert document["failed"] == [{"name": "dsv3 · staggered · seed 3", "why": "lost 3 times: <killed>"}]


def test_latencies_by_name():
    assert latency_measure("ttft-p50") == "ttft_s.p50"
    assert latency_measure("e2e-mean") == "e2e_s.mean"
    for wrong in ("ttft", "ttft-p42", "p99", ""):
        with pytest.raises(ConfigError, match="such as ttft-p99"):
            latency_measure(wrong)
