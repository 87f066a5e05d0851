"""Runs a front door as a process: logs, signals, the drain, and an end that comes even where a stop hangs."""

import asyncio
import faulthandler
import gc
import os
import resource
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from typing import Any, Protocol

from headway.front.config import LogsSpec
from headway.front.logs import logging_as_json

__all__ = ["Door", "raise_file_limit", "run"]

#: A stop may take this much longer than the drain.
STOP_PATIENCE_S = 15.0
#: New objects, and younger collections, before the cycle collector runs; Python's own are 700, 10 and 10.
COLLECTOR_THRESHOLDS = (20_000, 20, 20)


class Door(AbstractAsyncContextManager[Any], Protocol):
    """What serves while its context lasts."""

    async def drain(self) -> bool:
        """Accept nothing more and wait for what is under way; whether all of it came to its end."""


def raise_file_limit() -> None:
    """Take all the open files we may have: a stream takes two, and the usual soft limit is 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _spare_the_collector() -> None:
    """Keep the cycle collector from pausing the event loop.

    What a request holds is freed by reference counting, so the collector has little to find. What was loaded
    by now stays: it need not be walked again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def _give_up() -> None:
    """End the process and say where it hangs; an error output that nobody reads must not block that."""
    os.set_blocking(2, False)
    with suppress(OSError):
        faulthandler.dump_traceback()
    os._exit(1)


async def run(door: Door, logs: LogsSpec, drain_timeout_s: float, on_ready: Callable[[], None]) -> None:
    """Run until SIGTERM or SIGINT, then drain. A second signal ends it at once.

    A stop that hangs is a bug; it is cut with a trace of where, for nobody should have to kill a front door.
    """
    loop = asyncio.get_running_loop()
    raise_file_limit()
    stop, now = asyncio.Event(), asyncio.Event()

    def ask() -> None:
        (now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    async with AsyncExitStack() as stack:
        watchdog = threading.Timer(drain_timeout_s + STOP_PATIENCE_S, _give_up)
        watchdog.daemon = True
        stack.callback(watchdog.cancel)  # the last to be done
        stack.enter_context(logging_as_json(logs))
        await stack.enter_async_context(door)
        _spare_the_collector()
        on_ready()
        await stop.wait()
        watchdog.start()
        draining = asyncio.ensure_future(door.drain())
        hurried = asyncio.ensure_future(now.wait())
        await asyncio.wait((draining, hurried), return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, hurried):
            task.cancel()
