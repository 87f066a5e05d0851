"""Tells the policy, and whoever asks, whether this replica leads its pool.

The decisions are in `core/leadership.py`. A thread asks the store (`renewal.py`).
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from headway.core.errors import InvariantError
from headway.core.events import Event, LeaseHeld, LeaseLost
from headway.core.leadership import FENCE_HEADER, FENCED, Leadership, read_token
from headway.front.lease.contract import Store, StoreError
from headway.front.lease.renewal import Renewal

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
        self._leadership = leadership
        self._clock = clock
        self._feed = feed
        self._on_lead = on_lead
        self._renewal: Renewal | None = None
        if store is not None:
            self._renewal = Renewal(pool, store, leadership, clock=clock, changed=self._tell)
        self._runs = False
        self._until_s: float | None = None  # as the policy was told; None: it does not lead
        self._followed: str | None = None

    # What hosts ask

    @property
    def shared(self) -> bool:
        """Whether there may be other replicas."""
        return self._renewal is not None

    def leads(self) -> bool:
        """Whether this replica may act at this instant."""
        return self._renewal is None or self._token(self._renewal) is not None

    def headers(self) -> dict[str, str]:
        """Return what goes with whatever this replica sends to engines; nothing while it does not lead."""
        token = None if self._renewal is None else self._token(self._renewal)
        return {} if token is None else {FENCE_HEADER: str(token)}

    def fenced(self, status: int, headers: Mapping[str, str]) -> bool:
        """Whether an engine's answer refuses an old term; step down if so."""
        token = read_token(headers.get(FENCE_HEADER))
        renewal = self._renewal
        if status != FENCED or token is None or renewal is None:
            return False
        with renewal.lock:
            news = self._leadership.fenced(token)
        if news:
            renewal.why = "an engine has seen a newer leader"
            self._tell()
            renewal.ask_again()
        return True

    def standing(self) -> dict[str, object]:
        """Return how it stands, for people and probes."""
        renewal = self._renewal
        token = None if renewal is None else self._token(renewal)
        leads = renewal is None or token is not None
        return {
            "pool": self.pool,
            "leads": leads,
            "token": token,
            "leader": None if leads else self._leadership.leader,
            "why": None if renewal is None or leads else renewal.why,
        }

    def _token(self, renewal: Renewal) -> int | None:
        with renewal.lock:
            return self._leadership.token(self._clock())

    # Running

    async def start(self) -> None:
        """Begin to run for it."""
        if self._renewal is None:
            self.terms = 1
        else:
            self._runs = True
            await self._renewal.start()

    async def release(self) -> None:
        """Lead no more, and let the next one know."""
        renewal = self._renewal
        if renewal is None or not self._runs:
            return
        self._runs = False
        await renewal.end()
        with renewal.lock:
            token = self._leadership.give_up()
        renewal.why = "it is shutting down"
        self._tell()
        if token is None:
            return
        try:
            await renewal.release(token)
        except (StoreError, TimeoutError) as error:
            log.warning("the lease was not given back, it runs out by itself", extra={"reason": str(error)})

    async def stop(self) -> None:
        """Give the lease back and disconnect."""
        await self.release()
        if self._renewal is not None:
            await self._renewal.stop()

    # Telling

    def _tell(self) -> None:
        """Let the policy and the log know what has changed."""
        renewal = self._renewal
        assert renewal is not None
        with renewal.lock:
            now = self._clock()
            token, until_s = self._leadership.token(now), self._leadership.until_s
            leader = self._leadership.leader
        if token is None:
            self._tell_lost(renewal.why, leader)
        elif self._until_s != until_s:
            begins, self._until_s = self._until_s is None, until_s
            if begins:
                self.terms += 1
                self._followed = None
                log.info("this replica leads", extra={"pool": self.pool, "token": token})
                self._on_lead()
            # By the loop's clock, which stands still while a callback runs: never later than it is.
            self._hand_in(LeaseHeld(asyncio.get_running_loop().time() + until_s - now))

    def _tell_lost(self, why: str, leader: str | None) -> None:
        if self._until_s is not None:
            self._until_s = None
            level = logging.WARNING if self._runs else logging.INFO  # not as it should be, or as it should
            log.log(level, "this replica leads no more", extra={"pool": self.pool, "reason": why})
            self._hand_in(LeaseLost())
        if leader is not None and leader != self._followed:
            self._followed = leader
            log.info("another replica leads", extra={"pool": self.pool, "leader": leader})

    def _hand_in(self, event: Event) -> None:
        """Feed an event. A bug in a policy must not end the run."""
        try:
            self._feed(event)
        except InvariantError:
            log.exception("the policy contradicts itself")
