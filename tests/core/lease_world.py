"""A world in which replicas, a store and an engine live, each with a clock of its own; its time is true time.

Clocks run up to `DRIFT` too fast or too slow and begin anywhere. Every message is late by what the fates
say, or lost; of a replica that is cut off all are. One that is paused does nothing, then goes on as if no
time had passed: with the decision it had taken.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from headway.core.leadership import Claim, Fence, Leadership


@dataclass
class Clock:
    """`rate`: its seconds in a true one."""

    rate: float = 1.0
    begins_s: float = 0.0

    def now(self, true_s: float) -> float:
        return self.begins_s + self.rate * true_s

    def true(self, at_s: float) -> float:
        return (at_s - self.begins_s) / self.rate


@dataclass
class Record:
    """What every store does with a claim, in its own time."""

    clock: Clock
    holder: str = ""
    token: int = 0
    until_s: float = -1e9
    holders: dict[int, set[str]] = field(default_factory=dict)

    def claim(self, holder: str, lease_s: float, above: int, true_s: float) -> tuple[str, float]:
        """Return who holds it then, and for how long."""
        now = self.clock.now(true_s)
        mine = self.holder == holder and self.until_s > now and self.token > above
        if not mine and (self.until_s <= now or self.holder == holder):
            self.holder, self.token = holder, max(self.token, above) + 1
            mine = True
        if mine:
            self.until_s = now + lease_s
            self.holders.setdefault(self.token, set()).add(holder)
        return self.holder, self.until_s - now

    def forget(self) -> None:
        """Lose the memory, as a server without a disk does when it is started again."""
        self.holder, self.token, self.until_s = "", 0, -1e9


class Replica:
    def __init__(self, world: "World", name: str, clock: Clock, lease_s: float) -> None:
        self.world, self.name, self.clock = world, name, clock
        self.lead = Leadership(lease_s)
        self.paused_until_s = 0.0
        self.cut_until_s = 0.0
        self.fates: Iterator[float | None] = iter(())  # of its next messages; then the world's

    def now(self) -> float:
        return self.clock.now(self.world.true_s)

    def wake(self) -> None:
        """Ask when it is time to, and come back when it is again."""
        claim = self.lead.claim(self.now())
        if claim is not None:
            self.world.send(self, lambda: self.world.serve(self, claim))
        at_s = self.clock.true(max(self.lead.wake_at(), self.now() + 1e-6))
        if at_s < 1e9:
            self.world.at(max(at_s, self.world.true_s + 1e-6), self, self.wake)

    def answered(self, claim: Claim, holder: str, free_in_s: float, token: int) -> None:
        if holder == self.name:
            self.lead.granted(claim, token, self.now())
        else:
            self.lead.refused(claim, holder, free_in_s, self.now())
        self.wake()

    def dispatch(self) -> None:
        """Look at the clock and, if it leads, send a request; the way there may be long."""
        token = self.lead.token(self.now())
        if token is not None:
            self.world.send(self, lambda: self.world.arrive(self, token))

    def fenced(self, newest: int) -> None:
        self.lead.fenced(newest)
        self.wake()


class World:
    """`fates`: of each message how late it is, None when it is lost. `forgetful`: the store may be, so that
    two may believe that they lead.
    """

    def __init__(
        self,
        clocks: list[Clock],
        store: Clock,
        lease_s: float,
        fates: Iterator[float | None],
        *,
        forgetful: bool = False,
    ) -> None:
        self.true_s = 0.0
        self.forgetful = forgetful
        self.record = Record(store)
        self.fence = Fence()
        self.accepted: list[tuple[int, str]] = []
        self.refused = 0
        self.lease_s = lease_s
        self._fates = fates
        self._numbers = count()
        self._heap: list[tuple[float, int, Replica | None, object]] = []
        self.replicas = [Replica(self, f"gw-{number}", clock, lease_s) for number, clock in enumerate(clocks)]
        for replica in self.replicas:
            self.at(0.0, replica, replica.wake)

    def at(self, true_s: float, replica: Replica | None, do: object) -> None:
        heapq.heappush(self._heap, (true_s, next(self._numbers), replica, do))

    def send(self, replica: Replica, do: object, *, back: bool = False) -> None:
        """Send from a replica, or `back` to it."""
        late_s = next(replica.fates, -1.0)
        if late_s == -1.0:
            late_s = next(self._fates)
        if late_s is not None and replica.cut_until_s <= self.true_s:
            self.at(self.true_s + late_s, replica if back else None, do)

    def run(self, until_s: float) -> None:
        """Let everything happen until then; what is for a replica that stands still waits for it."""
        while self._heap and self._heap[0][0] <= until_s:
            self.true_s, _, replica, do = heapq.heappop(self._heap)
            if replica is not None and replica.paused_until_s > self.true_s:
                self.at(replica.paused_until_s, replica, do)
                continue
            do()  # type: ignore[operator]
            self.check()
        self.true_s = until_s
        self.check()

    def serve(self, replica: Replica, claim: Claim) -> None:
        holder, free_in_s = self.record.claim(replica.name, self.lease_s, claim.above, self.true_s)
        token = self.record.token
        self.send(replica, lambda: replica.answered(claim, holder, free_in_s, token), back=True)

    def arrive(self, replica: Replica, token: int) -> None:
        if self.fence.admits(token):
            self.accepted.append((token, replica.name))
        else:
            self.refused += 1
            newest = self.fence.newest
            self.send(replica, lambda: replica.fenced(newest), back=True)

    def leaders(self) -> list[str]:
        return [replica.name for replica in self.replicas if replica.lead.token(replica.now()) is not None]

    def check(self) -> None:
        """Never do two lead; the engine never served an older token after a newer one, nor one of two
        replicas.
        """
        assert self.forgetful or len(self.leaders()) <= 1
        tokens = [token for token, _ in self.accepted]
        assert tokens == sorted(tokens)
        assert len(set(tokens)) == len(set(self.accepted))
