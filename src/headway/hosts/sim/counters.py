"""What is counted over passes as they end, so that no pass needs to be kept."""

from headway.model.engine import PassOutcome

__all__ = ["PassCounters"]


class PassCounters:
    """Sums over the passes of one simulation.

    Chunk utilisation `Σ used / Σ D·C` and bubble `1 − mean_d(used) / max_d(used)` are over the passes that
    computed prompt tokens (algorithms §3); decode imbalance `max_d(B) / mean_d(B) − 1` is over those that
    decoded. NaN when there was no such pass.
    """

    __slots__ = ("_bubbles", "_decode_passes", "_imbalances", "_offered", "_prefill_passes", "_used", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self._used = self._offered = self._prefill_passes = self._decode_passes = 0
        self._bubbles = self._imbalances = 0.0

    def add(self, passed: PassOutcome, chunk_tokens: int) -> None:
        """Count a pass of ranks that take `chunk_tokens` each."""
        self.steps += 1
        used = sum(passed.ran_tokens)
        if used:
            ranks = len(passed.ran_tokens)
            self._used += used
            self._offered += ranks * chunk_tokens
            self._prefill_passes += 1
            self._bubbles += 1.0 - used / (ranks * max(passed.ran_tokens))
        decoded = sum(passed.decodes)
        if decoded:
            self._decode_passes += 1
            self._imbalances += max(passed.decodes) * len(passed.decodes) / decoded - 1.0

    @property
    def chunk_utilisation(self) -> float:
        """Share of the prompt tokens that prefill-bearing passes could have computed and did."""
        return _ratio(self._used, self._offered)

    @property
    def bubble(self) -> float:
        """Mean share of a prefill-bearing pass that ranks waited for the most loaded one."""
        return _ratio(self._bubbles, self._prefill_passes)

    @property
    def decode_batch_imbalance(self) -> float:
        """By how much the largest decode batch of a group exceeded the mean one, on average."""
        return _ratio(self._imbalances, self._decode_passes)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
