"""Keeps the workers those that a source finds.

Rule 1. The newest set counts. One that comes while another is being brought about waits; of several that
        wait, all but the last are skipped.
Rule 2. What drains gets nothing new in the very call that tells of it; who drains no more is taken back, but
        not from an operator's own drain.
Rule 3. An engine of the set that cannot be added is said in one line, and keeps no other out.
"""

import asyncio
import logging
from contextlib import suppress

from headway.core.errors import ConfigError
from headway.front.discovery.contract import Found, Source
from headway.front.worker import Worker
from headway.front.workers import Workers

__all__ = ["Discovery"]

log = logging.getLogger("headway.discovery")

#: So long the start waits for the first set.
FIRST_S = 5.0
#: After a failure nobody thought of, it begins anew.
AGAIN_S = 1.0


class Discovery:
    """Follows a source while it runs; without one it does nothing. `timeout_s`: an engine that is found no
    more is drained for so long.
    """

    def __init__(self, source: Source | None, workers: Workers, *, timeout_s: float) -> None:
        self._source = source
        self._workers = workers
        self._timeout_s = timeout_s
        self._found = Found(())
        self._news = asyncio.Event()
        self._settled = asyncio.Event()
        self._drained: dict[str, Worker] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to follow, and wait a moment for the first set to be workers."""
        if self._source is None:
            return
        self._tasks = [asyncio.create_task(self._follow(self._source)), asyncio.create_task(self._run())]
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_S):
                await self._settled.wait()

    async def stop(self) -> None:
        """Follow no more; the workers stay as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _follow(self, source: Source) -> None:
        while True:
            try:
                await source.follow(self._tell)
            except Exception:  # a bug of ours must not end it
                log.exception("discovery failed")
            await asyncio.sleep(AGAIN_S)

    def _tell(self, found: Found) -> None:
        if found == self._found and self._settled.is_set():
            return
        self._found = found
        self._mark()
        self._news.set()

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            await self._bring_about(self._found)
            self._settled.set()

    async def _bring_about(self, found: Found) -> None:
        try:
            await self._workers.reconcile(found.instances, timeout_s=self._timeout_s)
        except ConfigError as error:
            log.error("an engine that was found cannot be added: %s", error)
        except Exception:
            log.exception("engines that were found could not be added")
        self._mark()  # those that came just now

    def _mark(self) -> None:
        """Drain the workers that are to drain, and take back those that were drained here and need not."""
        draining = self._found.draining
        for name, drained in list(self._drained.items()):
            worker = self._workers.get(name)
            if worker is not drained:  # another of its name, if any
                del self._drained[name]
            elif name not in draining and any(each == drained.spec for each in self._found.instances):
                del self._drained[name]
                self._workers.undrain(name)
        for name in draining - self._drained.keys():
            worker = self._workers.get(name)
            if worker is not None and not worker.draining:
                self._drained[name] = self._workers.drain(name)
