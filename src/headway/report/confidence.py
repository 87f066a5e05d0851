"""What several seeds say together: a mean and its 95% confidence interval, by Student's t.

Seeds are few (3 to 10), so the normal 1.96 would promise too much.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Estimate", "estimate"]

# t at 0.975 for 1…30 degrees of freedom; beyond, the normal limit is close enough (2.04 at 31).
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Estimate(NamedTuple):
    """A mean and the half-width of its 95% interval (None: one value says nothing of the spread)."""

    mean: float
    half_width: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval, or None."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent `values` with its interval; NaN for no value at all."""
    if len(values) < 2:
        return Estimate(values[0] if values else math.nan)
    freedom = len(values) - 1
    t = _T975[freedom - 1] if freedom <= len(_T975) else 1.96
    return Estimate(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))
