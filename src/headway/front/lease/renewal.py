"""Asks the store for the lease in a thread of its own, so that a busy event loop does not lose it.

Rule 1. Everything the store is asked, and every decision when to ask, is made in the thread's own event loop.
        The host reads the outcome under a lock, by the clock of the moment: what the thread renewed holds
        though the host's loop was blocked, and what ran out meanwhile is over at once.
Rule 2. A host whose loop has not turned for `STALL_S` does not lead: the lease is not renewed for it, and
        another replica takes over.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from headway.core.leadership import Claim, Leadership
from headway.front.lease.contract import Granted, Store, StoreError

__all__ = ["Renewal"]

log = logging.getLogger("headway.leader")

_T = TypeVar("_T")

#: A host's loop that has not turned for so long is stuck.
STALL_S = 10.0
#: How often the loop shows that it turns.
BEAT_S = 0.25


class Renewal:
    """The thread that runs for the lease. `changed()` is called in the host's loop when something may have
    changed. Use `leadership` under `lock` only.
    """

    def __init__(
        self,
        pool: str,
        store: Store,
        leadership: Leadership,
        *,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self.lock = threading.Lock()
        self.why = "it has not asked for the lease yet"
        self._pool = pool
        self._store = store
        self._leadership = leadership
        self._clock = clock
        self._changed = changed
        self._problem: str | None = None  # of the store
        self._host: asyncio.AbstractEventLoop | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._beating: asyncio.Task[None] | None = None
        self._beat_s = 0.0
        self._running: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

    # Of the host's loop

    async def start(self) -> None:
        """Begin to ask."""
        self._host = asyncio.get_running_loop()
        self._beat_s = self._clock()
        self._beating = asyncio.create_task(self._beat())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, args=(self._loop,), name="lease", daemon=True)
        self._thread.start()
        await self._call(self._begin())

    def ask_again(self) -> None:
        """Look at once whether it is time to ask."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._news.set)

    async def end(self) -> None:
        """Ask no more."""
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
            self._beating = None
        if self._loop is not None:
            await self._call(self._end())

    async def release(self, token: int) -> None:
        """Give the lease back. Raises StoreError, and TimeoutError."""
        await self._call(self._release(token))

    async def stop(self) -> None:
        """Disconnect, and end the thread."""
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            await self._store.close()
            return
        await self.end()
        await self._call(self._store.close())
        self._loop = self._thread = None
        loop.call_soon_threadsafe(loop.stop)
        await asyncio.to_thread(thread.join)
        loop.close()

    async def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        assert self._loop is not None
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    async def _beat(self) -> None:
        while True:
            self._beat_s = self._clock()
            await asyncio.sleep(BEAT_S)

    # Of the thread

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()

    async def _begin(self) -> None:
        self._running = asyncio.create_task(self._run())

    async def _end(self) -> None:
        tasks = [task for task in (self._running, self._asking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._running = self._asking = None

    async def _release(self, token: int) -> None:
        async with asyncio.timeout(self._leadership.patience_s):
            await self._store.release(token)

    async def _run(self) -> None:
        while True:
            self._news.clear()
            now = self._clock()
            stalled = now - self._beat_s > STALL_S
            with self.lock:
                claim = None if stalled else self._leadership.claim(now)
                wake_s, until_s = self._leadership.wake_at(), self._leadership.until_s
            if claim is not None:
                if self._asking is not None:
                    self._asking.cancel()
                self._asking = asyncio.create_task(self._ask(claim))
            self._tell()
            if stalled:
                wake_s = now + BEAT_S
            if until_s > now:  # when it ends the host has to know
                wake_s = min(wake_s, until_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wake_s - self._clock())):
                    await self._news.wait()

    async def _ask(self, claim: Claim) -> None:
        lead = self._leadership
        try:
            async with asyncio.timeout(lead.patience_s):
                answer = await self._store.claim(claim)
        except TimeoutError:
            self._silent(claim, f"no answer in {lead.patience_s:g} s")
        except StoreError as error:
            self._silent(claim, str(error))
        except Exception as error:  # a bug of ours must not end the run
            log.exception("the store of leases could not be asked")
            self._silent(claim, str(error))
        else:
            if self._problem is not None:
                log.info("the store of leases answers again", extra={"pool": self._pool})
                self._problem = None
            with self.lock:
                if isinstance(answer, Granted):
                    lead.granted(claim, answer.token, self._clock())
                else:
                    self.why = f"{answer.leader} leads"
                    lead.refused(claim, answer.leader, answer.free_in_s, self._clock())
        self._tell()
        self._news.set()

    def _silent(self, claim: Claim, problem: str) -> None:
        with self.lock:
            self._leadership.failed(claim, self._clock())
        self.why = f"the store of leases does not answer: {problem}"
        if self._problem is None:  # once, until it answers again
            log.warning("the store of leases does not answer", extra={"pool": self._pool, "reason": problem})
        self._problem = problem

    def _tell(self) -> None:
        assert self._host is not None
        with suppress(RuntimeError):  # the host's loop is closed
            self._host.call_soon_threadsafe(self._changed)
