"""Runs jobs in processes of this machine, one job to a process at a time.

Each process has a pipe of its own, so that the loss of one (killed by hand or for lack of memory) is the loss
of exactly the job it ran: `concurrent.futures` would give up the whole pool and could not say which job it
was. A process ends by itself when its pipe does, so none outlives this one.
"""

import multiprocessing
import signal
import threading
import warnings
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from headway.hosts.sim.workers.contract import Ended, Work, Workers, attempt

__all__ = ["Processes"]

#: How long a process that was told to end may take before it is made to.
_PATIENCE_S = 5.0


class Processes(Workers):
    """`count` processes, started as they are needed and replaced when they are lost."""

    def __init__(self, work: Work, shared: Any, count: int) -> None:
        self._work = work
        self._shared = shared
        self._count = count
        self._idle: list[tuple[BaseProcess, Connection]] = []
        self._busy: dict[Connection, tuple[BaseProcess, int]] = {}

    @property
    def slots(self) -> int:
        """One job to a process."""
        return self._count

    def start(self, number: int, call: Any) -> None:
        """Hand the job to an idle process, or to a new one."""
        process, pipe = self._idle.pop() if self._idle else self._new()
        with suppress(OSError):  # one that was lost while it was idle: `wait` will say so
            pipe.send(call)
        self._busy[pipe] = (process, number)

    def wait(self) -> list[Ended]:
        """Wait for an answer, or for the end of a pipe: then its process is gone."""
        return [
            self._ended(pipe) for pipe in connection.wait(list(self._busy)) if isinstance(pipe, Connection)
        ]

    def close(self) -> None:
        """Terminate all processes."""
        workers = [*self._idle, *((process, pipe) for pipe, (process, _) in self._busy.items())]
        for process, pipe in workers:
            process.terminate()
            pipe.close()
        for process, _ in workers:
            process.join(_PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
        self._idle.clear()
        self._busy.clear()

    def _ended(self, pipe: Connection) -> Ended:
        process, number = self._busy.pop(pipe)
        try:
            result, error = pipe.recv()
        except (EOFError, OSError):
            pipe.close()
            process.join()
            return Ended(number, lost=_how(process.exitcode))
        self._idle.append((process, pipe))
        return Ended(number, result, error)

    def _new(self) -> tuple[BaseProcess, Connection]:
        context = _context()
        ours, theirs = context.Pipe()
        arguments = (theirs, self._work, self._shared)
        process = context.Process(target=_serve, args=arguments, daemon=True)  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            # The threads it warns of are a linear algebra library's, idle, with fork handlers of their own.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            process.start()
        theirs.close()
        return process, ours


def _context() -> BaseContext:
    """Fork where that is safe: a script then needs no `__main__` guard, and workers share its memory."""
    if "fork" in multiprocessing.get_all_start_methods() and threading.active_count() == 1:
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("spawn")


def _how(exitcode: int | None) -> str:
    """Say how a process ended."""
    if exitcode is None or exitcode >= 0:
        return f"its process ended with status {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    return f"its process was killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def _serve(pipe: Connection, work: Work, shared: Any) -> None:
    """Answer calls until the pipe ends."""
    # Ctrl-C reaches the whole group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(attempt(work, shared, pipe.recv()))
