"""How long a step will take: FairBatching's step-time model, learned from the steps themselves.

    t = a + b·new + c·context + q·attention

Rule 1. `a + b·new + c·context` is the paper's [P]. The term for long prompts' attention, the two regimes
   (decode-only, mixed), refitting online and the quantile margin are ours [+] (algorithms.md §5): a
   replication of the bare three terms on production logs was 56% off per step.
Rule 2. Errors count relative to the step (each row is weighted by 1/t²): a plan that is 5 ms off spoils a
   step of 10 ms, not one of 200 ms. It also keeps a stray slow step from bending the fit.
Rule 3. No coefficient is negative: a negative one pays for a longer batch.
Rule 4. Recursive least squares is kept in information form: the weighted sums XᵀX and Xᵀt with forgetting,
   over a constant ridge towards zero. Where the data say nothing (steps of one size do not tell a from b)
   the ridge decides; nothing winds up, for the ridge is never forgotten.
"""

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Literal, NamedTuple

from headway.core.errors import ConfigError
from headway.core.estimate.window import Window

if TYPE_CHECKING:  # the batch policies import this module
    from headway.core.batch.contract import StepReport

__all__ = ["Coefficients", "Regime", "StepTime"]

Regime = Literal["decode", "mixed"]

#: Typical sizes of (1, new, context, attention). Features divided by them are of one order, so that the 4×4
#: normal equations are well conditioned.
_SCALES = (1.0, 512.0, 131_072.0, 8e6)
_TERMS = range(4)
#: Against it a step of 10 ms weighs 10,000 (1/t²): enough to make the equations solvable, too little to be
#: felt.
_RIDGE = 1.0
#: Solve after every step at first, then after every 8th: the sums are cheap, the solution is not.
_SOLVE_EVERY = 8
#: Steps before a regime's predictions are worth planning with: four for each coefficient.
_TRAINED_AFTER = 16
#: Steps over which errors and the margin are taken.
_RECENT = 64


class Coefficients(NamedTuple):
    """Seconds; per new token; per token of context; per token² of prompt attention."""

    a_s: float = 0.0
    b_s: float = 0.0
    c_s: float = 0.0
    q_s: float = 0.0

    def predict(self, new_tokens: float, context_tokens: float, attention: float = 0.0) -> float:
        """Seconds of such a step."""
        return self.a_s + self.b_s * new_tokens + self.c_s * context_tokens + self.q_s * attention

    def prefill_s(self, chunk_tokens: float, context_tokens: float) -> float:
        """Seconds that a chunk of a prompt adds to a step, behind `context_tokens` of it computed before."""
        slope = self.b_s + self.q_s * (context_tokens + 0.5 * chunk_tokens)
        return self.c_s * context_tokens + slope * chunk_tokens

    def chunk_for(self, left_s: float, context_tokens: int, most: int) -> int:
        """Return the largest chunk, at most `most`, that adds at most `left_s`: the inverse of
        `prefill_s`."""
        left_s -= self.c_s * context_tokens
        if left_s <= 0.0:
            return 0
        slope = self.b_s + self.q_s * context_tokens
        # The root of q/2·n² + slope·n = left, in the form that stays exact as q goes to 0.
        below = slope + sqrt(slope * slope + 2.0 * self.q_s * left_s)
        if below * most <= 2.0 * left_s:
            return most
        return min(most, int(2.0 * left_s / below + 1e-9))


class StepTime:
    """Belief about the step time of one rank.

    `forgetting`: weight of the past at each step (0.99: the last hundred count). `margin_quantile`: share
    of steps that are to stay within `predict_with_margin`. Raises ConfigError when either is out of range.
    """

    __slots__ = ("_decode", "_mixed")

    def __init__(self, forgetting: float = 0.99, margin_quantile: float = 0.9) -> None:
        if not 0.5 <= forgetting <= 1.0:
            raise ConfigError(f"forgetting must be in [0.5, 1], got {forgetting!r}")
        if not 0.0 <= margin_quantile <= 1.0:
            raise ConfigError(f"margin_quantile must be in [0, 1], got {margin_quantile!r}")
        self._decode = _RegimeModel(forgetting, margin_quantile)
        self._mixed = _RegimeModel(forgetting, margin_quantile)

    def observe(self, step: "StepReport") -> None:
        """Learn from one step, online. A step without work or time is none."""
        if step.duration_s > 0.0 and step.new_tokens > 0:
            self._of(step).observe(step)

    def fit(self, rows: Iterable["StepReport"]) -> None:
        """Learn from a table of measured steps, all of one weight (offline least squares)."""
        kept = [row for row in rows if row.duration_s > 0.0 and row.new_tokens > 0]
        for regime in (self._decode, self._mixed):
            regime.fit([row for row in kept if self._of(row) is regime])

    def trained(self, regime: Regime) -> bool:
        """Whether enough steps of the regime were seen to plan with."""
        return self._model(regime).steps >= _TRAINED_AFTER

    def steps(self, regime: Regime) -> int:
        """How many steps of the regime were learned from."""
        return self._model(regime).steps

    def coefficients(self, regime: Regime) -> Coefficients:
        """The present fit; all 0 before the first step."""
        return self._model(regime).coefficients

    def margin(self, regime: Regime) -> float:
        """Factor, at least 1, that keeps the chosen quantile of recent steps within their prediction."""
        return self._model(regime).margin

    def predict(self, new_tokens: int, decodes: int, context_tokens: int, attention: float = 0.0) -> float:
        """Seconds of a step (fields as in `StepReport`); 0 when its regime was never seen."""
        regime = self._mixed if new_tokens > decodes else self._decode
        return regime.coefficients.predict(new_tokens, context_tokens, attention)

    def predict_with_margin(
        self, new_tokens: int, decodes: int, context_tokens: int, attention: float = 0.0
    ) -> float:
        """Seconds that the chosen quantile of such steps stays within."""
        regime = self._mixed if new_tokens > decodes else self._decode
        return regime.coefficients.predict(new_tokens, context_tokens, attention) * regime.margin

    def chunk_for(
        self,
        budget_s: float,
        context_tokens: int,
        *,
        most: int,
        decodes: int = 0,
        decode_context_tokens: int = 0,
    ) -> int:
        """Return the largest chunk (0 … `most`) of a prompt with `context_tokens` behind it, that keeps a
        step

        together with these decodes within `budget_s`, margin included.
        """
        model = self._mixed.coefficients
        left_s = budget_s / self._mixed.margin - model.predict(decodes, decode_context_tokens)
        return model.chunk_for(left_s, context_tokens, most)

    def recent_error(self, regime: Regime) -> float | None:
        """Mean absolute error of the last steps, as a share of the step, each predicted before it was
        learned.

        None before the regime is trained.
        """
        return self._model(regime).recent_error()

    def error_on(self, rows: Iterable["StepReport"]) -> dict[Regime, float]:
        """Mean absolute percentage error (as a share, 0.05 is 5%) of the present fit on measured steps, by
        regime."""
        errors: dict[Regime, list[float]] = {}
        for row in rows:
            guess = self.predict(row.new_tokens, row.decodes, row.context_tokens, row.attention)
            regime: Regime = "mixed" if row.new_tokens > row.decodes else "decode"
            errors.setdefault(regime, []).append(abs(guess / row.duration_s - 1.0))
        return {regime: sum(values) / len(values) for regime, values in errors.items()}

    def _model(self, regime: Regime) -> "_RegimeModel":
        return self._mixed if regime == "mixed" else self._decode

    def _of(self, step: "StepReport") -> "_RegimeModel":
        return self._mixed if step.new_tokens > step.decodes else self._decode


class _RegimeModel:
    """The sums, their solution and the recent errors of one regime."""

    __slots__ = ("_errors", "_forgetting", "_quantile", "_xt", "_xx", "coefficients", "margin", "steps")

    def __init__(self, forgetting: float, quantile: float) -> None:
        self.coefficients = Coefficients()
        self.margin = 1.0
        self.steps = 0
        self._forgetting = forgetting
        self._quantile = quantile
        self._errors = Window(_RECENT)  # (measured − predicted) / predicted
        self._xx = [[0.0] * 4 for _ in _TERMS]
        self._xt = [0.0] * 4

    def observe(self, step: "StepReport") -> None:
        if self.steps >= _TRAINED_AFTER:
            self._note_error(step)
        self._add(step, self._forgetting)
        if self.steps <= 2 * _TRAINED_AFTER or self.steps % _SOLVE_EVERY == 0:
            self.coefficients = _solve(self._xx, self._xt)

    def fit(self, steps: Sequence["StepReport"]) -> None:
        for step in steps:
            self._add(step, 1.0)
        self.coefficients = _solve(self._xx, self._xt)
        for step in steps:
            self._note_error(step)

    def recent_error(self) -> float | None:
        errors = self._errors.values()
        return sum(abs(e) / (1.0 + e) for e in errors) / len(errors) if errors else None

    def _note_error(self, step: "StepReport") -> None:
        guess = self.coefficients.predict(step.new_tokens, step.context_tokens, step.attention)
        self._errors.add(step.duration_s / max(guess, 1e-6) - 1.0)
        self.margin = 1.0 + max(0.0, self._errors.quantile(self._quantile) or 0.0)

    def _add(self, step: "StepReport", forgetting: float) -> None:
        one = 1.0 / step.duration_s
        row = (
            one,
            one * step.new_tokens / _SCALES[1],
            one * step.context_tokens / _SCALES[2],
            one * step.attention / _SCALES[3],
        )
        for i in _TERMS:
            line, x = self._xx[i], row[i]
            for j in range(i + 1):
                line[j] = forgetting * line[j] + x * row[j]
            self._xt[i] = forgetting * self._xt[i] + x  # the target of a row divided by t is 1
        self.steps += 1


def _solve(xx: Sequence[Sequence[float]], xt: Sequence[float]) -> Coefficients:
    """Least squares over the terms that come out non-negative: drop the most negative, solve again.

    `xx` holds the lower triangle.
    """
    terms = list(_TERMS)
    while terms:
        rows = [[xx[max(i, j)][min(i, j)] for j in terms] for i in terms]
        for k, row in enumerate(rows):
            row[k] += _RIDGE
        solution = _gauss(rows, [xt[i] for i in terms])
        worst = min(range(len(terms)), key=solution.__getitem__)
        if solution[worst] >= 0.0:
            values = dict(zip(terms, solution, strict=True))
            return Coefficients(*(values.get(i, 0.0) / _SCALES[i] for i in _TERMS))
        del terms[worst]
    return Coefficients()


def _gauss(rows: list[list[float]], right: list[float]) -> list[float]:
    """Solve a symmetric positive definite system in place. Needs no pivoting: the ridge keeps it definite."""
    size = len(right)
    for k in range(size):
        for i in range(k + 1, size):
            factor = rows[i][k] / rows[k][k]
            right[i] -= factor * right[k]
            for j in range(k, size):
                rows[i][j] -= factor * rows[k][j]
    for k in reversed(range(size)):
        right[k] = (right[k] - sum(rows[k][j] * right[j] for j in range(k + 1, size))) / rows[k][k]
    return right
