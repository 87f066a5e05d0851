"""The last few values of a measurement, kept sorted: what robust means and quantiles are read from."""

from bisect import bisect_left, insort
from collections import deque

from headway.core.errors import ConfigError

__all__ = ["Window"]


class Window:
    """A sliding window over the last `size` values. Adding one costs O(size) moves of a small list."""

    __slots__ = ("_order", "_sorted")

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ConfigError(f"a window must hold at least 1 value, got {size}")
        self._order: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        """Take in a value; the oldest leaves a full window."""
        if len(self._order) == self._order.maxlen:
            del self._sorted[bisect_left(self._sorted, self._order[0])]
        self._order.append(value)
        insort(self._sorted, value)

    def values(self) -> list[float]:
        """Return the values, oldest first."""
        return list(self._order)

    def quantile(self, share: float) -> float | None:
        """Return the smallest value that at least `share` of the window does not exceed; None when empty."""
        if not self._sorted:
            return None
        rank = -int(-share * len(self._sorted) // 1)  # ceiling
        return self._sorted[min(max(rank, 1), len(self._sorted)) - 1]

    def trimmed_mean(self, trim: float) -> float | None:
        """Return the mean without the lowest and the highest `trim` share of the window; None when empty."""
        if not self._sorted:
            return None
        cut = int(trim * len(self._sorted))
        kept = self._sorted[cut : len(self._sorted) - cut]
        return sum(kept) / len(kept)
