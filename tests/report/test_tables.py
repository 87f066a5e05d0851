"""What a person reads first."""

from dataclasses import replace

import pytest
from rich.console import Console

from headway.report.results import CapacityResult, Comparison
from headway.report.tables import Grid, capacity_grid, compare_grids, headlines, percent, seconds, to_rich


def column(grid: Grid, head: str) -> dict[str, str]:
    index = [c.head for c in grid.columns].index(head)
    return {row[0]: row[index] for row in grid.rows}


def drawn(grid: Grid, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    with console.capture() as capture:
        console.print(to_rich(grid, width=width))
    console.file.close()
    return capture.get()


def test_a_table_per_load_with_policies_in_rows(comparison: Comparison):
    grids = compare_grids(comparison)
    assert [grid.title for grid in grids] == ["load 0.4 · 4 req/s", "load 0.8 · 8 req/s"]
    assert [row[0] for row in grids[0].rows] == ["staggered", "least-tokens", "round-robin"]


def test_the_change_is_against_the_best_baseline_of_that_load(comparison: Comparison):
    change = column(compare_grids(comparison)[1], "vs best baseline")
    assert change["least-tokens"] == "best"
    assert change["staggered"].startswith("−40%")
    assert change["round-robin"].startswith("+50%")


def test_the_change_is_paired_by_seed(comparison: Comparison):
    """Seed 1 takes twice as long under every policy: the mean is uncertain, the gain is not."""
    grid = compare_grids(comparison)[1]
    assert column(grid, "vs best baseline")["staggered"] == "−40% ±0"
    assert "±" in column(grid, "TTFT mean")["staggered"]


def test_a_single_seed_shows_no_interval(comparison: Comparison):
    single = replace(comparison, runs=[run for run in comparison.runs if run.seed == 0])
    assert column(compare_grids(single)[1], "TTFT mean")["staggered"] == "1.20"


def test_the_best_of_a_column_is_marked(comparison: Comparison):
    grid = compare_grids(comparison)[1]
    mean = [c.head for c in grid.columns].index("TTFT mean")
    assert {row for row, col in grid.best if col == mean} == {0}


def test_equal_columns_mark_nothing(comparison: Comparison):
    grid = compare_grids(comparison)[1]
    use = [c.head for c in grid.columns].index("chunk used")
    assert not [row for row, col in grid.best if col == use]


def test_losses_show_up_as_soon_as_there_are_any(comparison: Comparison):
    assert "lost" not in [c.head for c in compare_grids(comparison)[0].columns]
    comparison.runs[0] = replace(comparison.runs[0], lost=2, completed=998)
    assert "lost" in [c.head for c in compare_grids(comparison)[0].columns]


def test_what_is_not_known_is_a_dash(one_run: Comparison):
    one_run.runs[0] = replace(one_run.runs[0], tpot_s={})
    assert column(compare_grids(one_run)[0], "TPOT p99")["Own"] == "–"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_narrow_terminal_loses_columns_never_text(comparison: Comparison, width: int):
    text = drawn(compare_grids(comparison)[1], width)
    assert "…" not in text
    assert "least-tokens" in text and "mean" in text
    assert ("chunk" in text) == (width == 140)


def test_percentages_never_round_up_to_all():
    assert percent(0.9996) == "99.9%"
    assert percent(1.0) == "100%"


def test_seconds_have_three_digits():
    assert [seconds(x) for x in (0.0421, 1.234, 250.4)] == ["0.042", "1.23", "250"]


def test_headlines_say_the_largest_gain_and_the_attainment(comparison: Comparison):
    lines = headlines(comparison)
    assert lines[0] == "staggered: mean TTFT −40% against the best baseline (least-tokens) at load 0.8"
    assert lines[1] == "staggered: 100% of requests meet both SLOs at load 0.8, 90.0% under the best baseline"


def test_headlines_do_not_hide_a_loss(comparison: Comparison):
    worse = [
        replace(run, ttft_s=run.ttft_s | {"mean": 3 * run.ttft_s["mean"]})
        if (run.policy, run.load) == ("staggered", 0.4)
        else run
        for run in comparison.runs
    ]
    assert headlines(replace(comparison, runs=worse))[0].endswith("worse at load 0.4: +170%")


def test_capacity_is_set_against_the_best_baseline(capacities: CapacityResult):
    grid = capacity_grid(capacities)
    assert column(grid, "vs best baseline") == {"pab": "+20.0%", "round-robin": "0%"}
    assert column(grid, "95% interval")["pab"] == "11.00 … 13.00"
    assert "TTFT ≤ 1 s and mean TPOT ≤ 50 ms" in grid.caption


def test_headlines_do_not_make_a_gain_of_none(comparison: Comparison):
    slower = [
        replace(run, ttft_s=run.ttft_s | {"mean": 3 * run.ttft_s["mean"]})
        if run.policy == "staggered"
        else run
        for run in comparison.runs
    ]
    line = headlines(replace(comparison, runs=slower))[0]
    assert line == "staggered: mean TTFT never under the best baseline's; +170% at load 0.4"
