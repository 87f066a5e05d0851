"""What runs jobs: the verbs that every backend has, and what it says of a job that has ended.

A job ends in one of three ways: it returned something, it raised something, or its worker was lost while it
ran. The first two are the job's own doing and the same wherever it runs; the third is the machine's, and only
that is worth another try (`jobs.py` decides).
"""

import pickle
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headway.core.errors import HeadwayError

__all__ = ["Ended", "Work", "Workers", "attempt"]

#: What is run: called as (shared, call). A module-level function, so that another process can import it.
Work = Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of job `number`: a `result`, or the `error` it raised, or why its worker was `lost`."""

    number: int
    result: Any = None
    error: BaseException | None = None
    lost: str | None = None


class Workers(ABC):
    """Somewhere to run jobs: started one by one, waited for in whatever order they end."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many jobs may be under way at a time; may change while jobs run."""

    @abstractmethod
    def start(self, number: int, call: Any) -> None:
        """Start a job. `number` is what it will be called when it has ended."""

    @abstractmethod
    def wait(self) -> list[Ended]:
        """Wait until at least one job has ended, and return those that have."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; what still runs is killed."""


def attempt(work: Work, shared: Any, call: Any) -> tuple[Any, BaseException | None]:
    """Return (result, None), or (None, error) with the error fit to be sent to another process."""
    try:
        return work(shared, call), None
    except Exception as error:
        return None, _portable(error)


def _portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or where it cannot be sent, one that reads the same."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = HeadwayError(f"{type(error).__name__}: {error}")
    error.add_note(f"in a worker:\n{trace}")
    return error
