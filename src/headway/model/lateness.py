"""Decides how late a decode's worst token was, without looking at every token.

FairBatching's line says output token j is due at `arrival + ttft_slo + j·tpot_slo`. A decode that runs in
every pass delivers one token per pass, so with `clock` the number of passes ended and `end(s)` the time pass
s ended,

    lateness(token of pass s) = end(s) − s·tpot  +  (terms fixed for the request)

and its worst token is a maximum of `x(s) = end(s) − s·tpot` over the passes since it joined. That range
always reaches up to now, so a stack of decreasing x answers it by bisection; one stack serves every decode
with the same tpot.
"""

from bisect import bisect_right

__all__ = ["PeakLateness"]

_NONE = float("-inf")


class PeakLateness:
    """The peaks of `x(s)` for one `tpot_s`. Amortised O(1) per pass, O(log passes) per question.

    `live` counts the decodes that will still ask; its owner keeps it.
    """

    __slots__ = ("_clocks", "_peaks", "live", "tpot_s")

    def __init__(self, tpot_s: float) -> None:
        self.tpot_s = tpot_s
        self.live = 0
        self._clocks: list[int] = []
        self._peaks: list[float] = []

    def __len__(self) -> int:
        return len(self._clocks)

    def push(self, clock: int, end_s: float) -> None:
        """Note that pass `clock` (growing) ended at `end_s`."""
        x = end_s - clock * self.tpot_s
        peaks = self._peaks
        while peaks and peaks[-1] <= x:  # an earlier, lower x can never again be a maximum up to now
            peaks.pop()
            self._clocks.pop()
        peaks.append(x)
        self._clocks.append(clock)

    def since(self, clock: int) -> float:
        """Return the greatest x over the passes after `clock`; minus infinity when there was none."""
        first = bisect_right(self._clocks, clock)
        return self._peaks[first] if first < len(self._peaks) else _NONE

    def forget(self, clock: int) -> None:
        """Drop the passes up to `clock`: nobody will ask about them any more."""
        stale = bisect_right(self._clocks, clock)
        del self._clocks[:stale]
        del self._peaks[:stale]
