"""Decides what time it is in the engine model: wall time since the start, times `speed`."""

import asyncio

__all__ = ["Clock"]


class Clock:
    """Model seconds, from 0 at its making. Needs a running event loop."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self._wall_s = asyncio.get_running_loop().time
        self._origin_s = self._wall_s()

    def now(self) -> float:
        """Return the model's time."""
        return (self._wall_s() - self._origin_s) * self.speed

    def wall_s(self, model_s: float) -> float:
        """Return how long a span of the model's time takes."""
        return model_s / self.speed

    async def until(self, model_s: float) -> None:
        """Sleep until the model's time is `model_s`; let others run even when that is past."""
        await asyncio.sleep(max(0.0, (model_s - self.now()) / self.speed))
