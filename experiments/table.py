"""What the experiments share: where lengths come from, and a Markdown table of a comparison."""

import argparse
from pathlib import Path
from typing import Any

import headway

__all__ = ["CAPACITY_COLUMNS", "head", "print_capacity", "print_comparison", "row", "sources"]

COLUMNS = (
    "load",
    "policy",
    "mean TTFT s",
    "vs best baseline",
    "p99 TTFT s",
    "p99 TPOT ms",
    "in SLO",
    "in envelope",
    "goodput/s",
    "late TTFT p50/p99 s",
    "chunk used",
    "bubble",
)
CAPACITY_COLUMNS = ("cluster", "policy", "batch", "req/s", "95% interval")


def sources(*names: str) -> list[tuple[str, dict[str, Any]]]:
    """Read `--traces DIR` from the command line: pairs of a name and the workload arguments of `compare`.

    With a directory, real traces (`azure2023_code.csv.gz`, …); without, the fitted workloads of the same
    names.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=Path, help="directory of published traces; fitted workloads else")
    folder = parser.parse_args().traces
    files = {
        "azure-code": "azure2023_code.csv.gz",
        "azure-conv": "azure2023_conv.csv.gz",
        "deepseek-r1": "servegen_deepseek-r1_1800s_20rps.csv.gz",
        "mooncake-conversation": "mooncake_conversation.jsonl.gz",
    }
    if folder is None:
        return [(name, {"workload": name}) for name in names]
    return [(name, {"trace": folder / files[name]}) for name in names]


def row(*values: object) -> None:
    """Print one row of a Markdown table."""
    print("| " + " | ".join(str(value) for value in values) + " |", flush=True)


def head(title: str, *columns: str) -> None:
    """Print a title and the head of a Markdown table."""
    print(f"\n{title}\n")
    row(*columns)
    row(*["---"] * len(columns))


def print_comparison(comparison: headway.Comparison) -> None:
    """Print one row per policy and load: means over seeds, TTFT with the half-width of its 95% interval."""
    seeds = len({run.seed for run in comparison.runs})
    head(f"{comparison.cluster}, {comparison.workload}, {seeds} seeds", *COLUMNS)
    for cell in comparison.cells():
        best = comparison.best_baseline(cell.rps)
        ttft, half = cell.estimate("ttft_s.mean")
        row(
            f"{cell.load:g}",
            comparison.label(cell.policy, cell.batch),
            f"{ttft:.3f}" if half is None else f"{ttft:.3f} ±{half:.3f}",
            "" if best is None else f"{100 * (ttft / best.mean('ttft_s.mean') - 1):+.1f}%",
            f"{cell.mean('ttft_s.p99'):.2f}",
            f"{1e3 * cell.mean('tpot_s.p99'):.1f}",
            f"{cell.mean('slo_attainment'):.3f}",
            f"{cell.mean('envelope_attainment'):.3f}",
            f"{cell.mean('goodput_rps'):.1f}",
            "/".join(f"{cell.mean(f'missed_ttft_s.{q}'):.1f}" for q in ("p50", "p99")),
            f"{cell.mean('chunk_utilisation'):.3f}",
            f"{cell.mean('bubble'):.3f}",
        )


def print_capacity(result: headway.CapacityResult) -> None:
    """Print one row per policy: the rate it carries and the 95% interval of its mean over seeds."""
    for run in result.runs:
        low, high = run.ci95 or (run.capacity_rps, run.capacity_rps)
        row(result.cluster, run.policy, run.batch, f"{run.capacity_rps:.2f}", f"{low:.2f}–{high:.2f}")
