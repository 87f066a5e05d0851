"""Contenders in alternation: in which order a round has them, and how what they did is shown."""

from collections.abc import Sequence

__all__ = ["spread", "turned"]


def turned(names: Sequence[str], turn: int) -> list[str]:
    """Return the names, begun with another one in each turn."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def spread(values: Sequence[float], form: str) -> str:
    """Write down the mean over rounds ± half of their span; nothing for no values."""
    if not values:
        return ""
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ±{form.format((max(values) - min(values)) / 2).lstrip('+')}"
