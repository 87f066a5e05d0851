"""How long a forward pass takes: a sliding mean that a stray slow pass does not move (SBS, the `T_hat` of
§2).

The trimmed mean follows a lasting change within half a window and ignores a garbage collection or a lost
report.
"""

from headway.core.errors import ConfigError
from headway.core.estimate.window import Window

__all__ = ["PassTime"]


class PassTime:
    """Belief about the pass time of one instance.

    `window`: passes remembered (SBS: 16 to 64). `trim`: share left out at either end. Raises ConfigError
    for a window under 1 or a trim that leaves nothing.
    """

    __slots__ = ("_trim", "_window")

    def __init__(self, window: int = 32, trim: float = 0.125) -> None:
        if not 0.0 <= trim < 0.5:
            raise ConfigError(f"trim must be at least 0 and less than 0.5, got {trim!r}")
        self._window = Window(window)
        self._trim = trim

    def observe(self, duration_s: float) -> None:
        """Take in a measured pass. Clocks that ran backwards are no measurement and are left out."""
        if duration_s > 0.0:
            self._window.add(duration_s)

    @property
    def mean_s(self) -> float | None:
        """Trimmed mean in seconds; None before the first pass."""
        return self._window.trimmed_mean(self._trim)

    def quantile_s(self, share: float) -> float | None:
        """Seconds that at least `share` of the remembered passes stayed within; None before the first."""
        return self._window.quantile(share)
