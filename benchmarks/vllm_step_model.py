"""How well a policy knows an engine's step times: recorded steps, replayed one by one through `StepTime`.

    python -m benchmarks.vllm_step_model steps.csv            # recorded with the plug-in's setting `steps`

Every step is predicted before it is learned, as inside the engine; errors are over the steps after the first
200. `within margin`: share of steps no longer than what a policy plans with (its aim: the margin quantile).
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, quantiles
from typing import NamedTuple

from headway.core.batch import StepReport
from headway.core.estimate.step_time import StepTime


class Guess(NamedTuple):
    """A step, and what was believed of it before. Times in s."""

    regime: str
    measured_s: float
    predicted_s: float
    with_margin_s: float


def replayed(steps: Sequence[StepReport], skip: int, margin_quantile: float) -> list[Guess]:
    """Predict, then learn, step by step; return the guesses after the first `skip` steps."""
    model = StepTime(margin_quantile=margin_quantile)
    guesses = []
    for number, step in enumerate(steps):
        shape = (step.new_tokens, step.decodes, step.context_tokens, step.attention)
        regime = "mixed" if step.new_tokens > step.decodes else "decode"
        if number >= skip and model.trained(regime):
            within_s = model.predict_with_margin(*shape)
            guesses.append(Guess(regime, step.duration_s, model.predict(*shape), within_s))
        model.observe(step)
    return guesses


def read(path: Path) -> list[StepReport]:
    """Read recorded steps as an engine reports them: with the context of prompts and decodes together."""
    with path.open(newline="") as file:
        return [
            StepReport(
                int(float(row["new_tokens"])),
                int(float(row["decodes"])),
                int(float(row["context_tokens"]) + float(row["prompt_context_tokens"])),
                float(row["attention"]),
                float(row["duration_s"]),
            )
            for row in csv.DictReader(file)
        ]


def show(name: str, guesses: Sequence[Guess]) -> None:
    """Print a line for each regime."""
    for regime in ("decode", "mixed"):
        own = [guess for guess in guesses if guess.regime == regime]
        if len(own) < 2:
            continue
        errors = [guess.predicted_s / guess.measured_s - 1.0 for guess in own]
        bias = sum(g.predicted_s for g in own) / sum(g.measured_s for g in own) - 1.0
        within = fmean(guess.measured_s <= guess.with_margin_s for guess in own)
        size = quantiles([abs(error) for error in errors], n=20)
        print(
            f"{name:24} {regime:7} {len(own):6} steps  mean error {fmean(map(abs, errors)):6.1%}  "
            f"median {size[9]:6.1%}  p95 {size[18]:6.1%}  bias {bias:+6.1%}  within margin {within:6.1%}"
        )


def main() -> None:
    """Replay every file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_step_model", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--skip", type=int, default=200, help="steps that are only learned from")
    parser.add_argument("--margin", type=float, default=0.9, help="quantile of the margin")
    given = parser.parse_args()
    for path in given.files:
        show(path.name, replayed(read(path), given.skip, given.margin))


if __name__ == "__main__":
    main()
