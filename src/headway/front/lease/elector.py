"""Runs for the leadership of a pool: asks the store when it is time to, tells the policy and whoever asks.

The decisions are in `core/leadership.py`; here is what they need of the world: a clock, the store, a log.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress

from headway.core.errors import InvariantError
from headway.core.events import Event, LeaseHeld, LeaseLost
from headway.core.leadership import FENCE_HEADER, FENCED, Claim, Leadership, read_token
from headway.front.lease.contract import Granted, Store, StoreError

__all__ = ["Elector"]

log = logging.getLogger("headway.leader")


class Elector:
    """One replica's run for the leadership of `pool`. Without a `store` it is alone, and always leads.

    `feed` hands the policy an event. `on_lead` is called before the policy hears that it leads. `terms`: how
    often it came to lead.
    """

    def __init__(
        self,
        pool: str,
        store: Store | None,
        leadership: Leadership,
        *,
        clock: Callable[[], float],
        feed: Callable[[Event], object],
        on_lead: Callable[[], None] = lambda: None,
    ) -> None:
        self.pool = pool
        self.terms = 0
        self._store = store
        self._leadership = leadership
        self._clock = clock
        self._feed = feed
        self._on_lead = on_lead
        self._task: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._until_s: float | None = None  # as the policy was told; None: it does not lead
        self._problem: str | None = None  # of the store
        self._followed: str | None = None
        self._why = "it has not asked for the lease yet"

    # What hosts ask

    @property
    def shared(self) -> bool:
        """Whether there may be other replicas."""
        return self._store is not None

    def leads(self) -> bool:
        """Whether this replica may act at this instant."""
        return self._store is None or self._leadership.token(self._clock()) is not None

    def headers(self) -> dict[str, str]:
        """Return what goes with whatever this replica sends to engines; nothing while it does not lead."""
        token = None if self._store is None else self._leadership.token(self._clock())
        return {} if token is None else {FENCE_HEADER: str(token)}

    def fenced(self, status: int, headers: Mapping[str, str]) -> bool:
        """Whether an engine's answer refuses an old term; step down if so."""
        token = read_token(headers.get(FENCE_HEADER))
        if status != FENCED or token is None or self._store is None:
            return False
        if self._leadership.fenced(token):
            self._why = "an engine has seen a newer leader"
            self._tell()
            self._news.set()
        return True

    def standing(self) -> dict[str, object]:
        """Return how it stands, for people and probes."""
        token = self._leadership.token(self._clock())
        leads = self.leads()
        return {
            "pool": self.pool,
            "leads": leads,
            "token": token,
            "leader": None if leads else self._leadership.leader,
            "why": None if leads else self._why,
        }

    # Running

    async def start(self) -> None:
        """Begin to run for it."""
        if self._store is None:
            self.terms = 1
        else:
            self._task = asyncio.create_task(self._run(self._store))

    async def release(self) -> None:
        """Lead no more, and let the next one know."""
        if self._store is None or self._task is None:
            return
        await self._end()
        token = self._leadership.give_up()
        self._why = "it is shutting down"
        self._tell()
        if token is None:
            return
        try:
            async with asyncio.timeout(self._leadership.patience_s):
                await self._store.release(token)
        except (StoreError, TimeoutError) as error:
            log.warning("the lease was not given back, it runs out by itself", extra={"reason": str(error)})

    async def stop(self) -> None:
        """Give the lease back and disconnect."""
        await self.release()
        if self._store is not None:
            await self._store.close()

    async def _end(self) -> None:
        tasks = [task for task in (self._task, self._asking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = self._asking = None

    async def _run(self, store: Store) -> None:
        while True:
            self._news.clear()
            claim = self._leadership.claim(self._clock())
            if claim is not None:
                if self._asking is not None:
                    self._asking.cancel()
                self._asking = asyncio.create_task(self._ask(store, claim))
            self._tell()
            wake_s = self._leadership.wake_at()
            if self._until_s is not None:
                wake_s = min(wake_s, self._until_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wake_s - self._clock())):
                    await self._news.wait()

    async def _ask(self, store: Store, claim: Claim) -> None:
        lead = self._leadership
        try:
            async with asyncio.timeout(lead.patience_s):
                answer = await store.claim(claim)
        except TimeoutError:
            self._silent(claim, f"no answer in {lead.patience_s:g} s")
        except StoreError as error:
            self._silent(claim, str(error))
        except Exception as error:  # a bug of ours must not end the run
            log.exception("the store of leases could not be asked")
            self._silent(claim, str(error))
        else:
            if self._problem is not None:
                log.info("the store of leases answers again", extra={"pool": self.pool})
                self._problem = None
            if isinstance(answer, Granted):
                lead.granted(claim, answer.token, self._clock())
            else:
                self._why = f"{answer.leader} leads"
                lead.refused(claim, answer.leader, answer.free_in_s, self._clock())
        self._tell()
        self._news.set()

    def _silent(self, claim: Claim, problem: str) -> None:
        self._leadership.failed(claim, self._clock())
        self._why = f"the store of leases does not answer: {problem}"
        if self._problem is None:  # once, until it answers again
            log.warning("the store of leases does not answer", extra={"pool": self.pool, "reason": problem})
        self._problem = problem

    # Telling

    def _tell(self) -> None:
        """Let the policy and the log know what has changed."""
        token = self._leadership.token(self._clock())
        if token is None:
            self._tell_lost()
        elif self._until_s != self._leadership.until_s:
            begins, self._until_s = self._until_s is None, self._leadership.until_s
            if begins:
                self.terms += 1
                self._followed = None
                log.info("this replica leads", extra={"pool": self.pool, "token": token})
                self._on_lead()
            self._hand_in(LeaseHeld(self._until_s))

    def _tell_lost(self) -> None:
        if self._until_s is not None:
            self._until_s = None
            level = logging.INFO if self._task is None else logging.WARNING  # as it should, or not
            log.log(level, "this replica leads no more", extra={"pool": self.pool, "reason": self._why})
            self._hand_in(LeaseLost())
        leader = self._leadership.leader
        if leader is not None and leader != self._followed:
            self._followed = leader
            log.info("another replica leads", extra={"pool": self.pool, "leader": leader})

    def _hand_in(self, event: Event) -> None:
        """Feed an event. A bug in a policy must not end the run."""
        try:
            self._feed(event)
        except InvariantError:
            log.exception("the policy contradicts itself")
