"""What the experiments share: where lengths come from, and a Markdown table of a comparison."""

import argparse
from pathlib import Path
from typing import Any

import headway

__all__ = ["print_comparison", "sources"]


def sources(*names: str) -> list[tuple[str, dict[str, Any]]]:
    """Read `--traces DIR` from the command line: pairs of a name and the workload arguments of `compare`.

    With a directory, real traces (`azure2023_code.csv.gz`, …); without, the fitted workloads of the same names.
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


def print_comparison(comparison: headway.Comparison, *, against: str = "") -> None:
    """Print one row per policy and load: means over seeds with the half-width of their 95% interval."""
    print(f"\n{comparison.cluster}, {comparison.workload}, {len({r.seed for r in comparison.runs})} seeds\n")
    print("| load | policy | mean TTFT s | vs best baseline | p99 TTFT s | TPOT p99 ms | in SLO | envelope | goodput/s", end="")
    print(" | late p50/p99 s | chunk used | bubble |\n|" + "---|" * 12)
    for cell in comparison.cells():
        best = comparison.best_baseline(cell.rps)
        change = "" if best is None else f"{100 * (cell.mean('ttft_s.mean') / best.mean('ttft_s.mean') - 1):+.1f}%"
        ttft, half = cell.estimate("ttft_s.mean")
        spread = "" if half is None else f" ±{half:.3f}"
        late = "/".join(f"{cell.mean(f'missed_ttft_s.{q}'):.1f}" for q in ("p50", "p99"))
        print(
            f"| {cell.load if cell.load is not None else cell.rps:g} | {comparison.label(cell.policy, cell.batch)} "
            f"| {ttft:.3f}{spread} | {change} | {cell.mean('ttft_s.p99'):.2f} | {1e3 * cell.mean('tpot_s.p99'):.1f} "
            f"| {cell.mean('slo_attainment'):.3f} | {cell.mean('envelope_attainment'):.3f} "
            f"| {cell.mean('goodput_rps'):.1f} | {late} | {cell.mean('chunk_utilisation'):.3f} "
            f"| {cell.mean('bubble'):.3f} |",
            flush=True,
        )
