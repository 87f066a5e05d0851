"""Ends streams in which nothing moves."""

import asyncio
from collections.abc import Callable

__all__ = ["Idle"]


class Idle:
    """Calls `silent` when an engine sent nothing for `timeout_s` to twice that, and `behind` when the client
    read nothing. One timer a period, none per piece.

    `active`: something came (a token, where tokens are known); `writing`: it waits for the client. The owner
    of the stream sets both.
    """

    def __init__(self, timeout_s: float, silent: Callable[[], None], behind: Callable[[], None]) -> None:
        self.active = self.writing = False
        self._timeout_s = timeout_s
        self._silent = silent
        self._behind = behind
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch, unless it is begun."""
        if self._timer is None:
            self._watch()

    def _watch(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._look)

    def stop(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        if not self.active:
            (self._behind if self.writing else self._silent)()
            return
        self.active = False
        self._watch()
