"""Runs jobs in this process, one after the other: nothing to start, and a debugger sees everything."""

from typing import Any

from headway.hosts.sim.workers.contract import Ended, Work, Workers

__all__ = ["Here"]


class Here(Workers):
    """This process as its own worker. An error keeps its own traceback."""

    def __init__(self, work: Work, shared: Any) -> None:
        self._work = work
        self._shared = shared
        self._next: tuple[int, Any] | None = None

    @property
    def slots(self) -> int:
        """One job at a time."""
        return 1

    def start(self, number: int, call: Any) -> None:
        """Note the job; `wait` runs it."""
        self._next = (number, call)

    def wait(self) -> list[Ended]:
        """Run the job."""
        assert self._next is not None, "no job was started"
        number, call = self._next
        try:
            return [Ended(number, self._work(self._shared, call))]
        except Exception as error:
            return [Ended(number, error=error)]

    def close(self) -> None:
        """There is nothing to let go of."""
