"""Decides what an instance reports: its engines as they truly are, and what it has received.

Shared by the simulator and the emulator, which keep its time. Ranks in lockstep are one engine; independent
ranks are one engine of one rank each, which start and report one by one.
"""

import random
from collections.abc import Callable

from headway.core.batch.contract import BatchPolicy
from headway.core.events import InstanceUp, PassEnded, Snapshot
from headway.model.cluster import PoolSpec
from headway.model.engine import Engine, PassOutcome, Work

__all__ = ["Group", "Inbox", "Instance"]


class Inbox:
    """Which dispatches of an epoch have been received.

    `acknowledged` is the highest number such that it and all lower ones were received: KV transfers of
    different lengths overtake each other.
    """

    __slots__ = ("_ahead", "_numbered", "acknowledged")

    def __init__(self) -> None:
        self.acknowledged = 0
        self._numbered = False
        self._ahead: set[int] = set()

    def expect(self, number: int) -> None:
        """Note that this number is on its way; the first one says where an epoch begins to count."""
        if not self._numbered:
            self._numbered = True
            self.acknowledged = number - 1

    def receive(self, number: int) -> None:
        """Note that this number is there."""
        self._ahead.add(number)
        while self.acknowledged + 1 in self._ahead:
            self.acknowledged += 1
            self._ahead.remove(self.acknowledged)


class Group:
    """Ranks that run passes together.

    `generation` grows when the instance dies: what was scheduled before is void.
    """

    __slots__ = ("engine", "first_rank", "generation", "instance", "overdue", "started_s", "starting")

    def __init__(self, instance: "Instance", engine: Engine, first_rank: int) -> None:
        self.instance = instance
        self.engine = engine
        self.first_rank = first_rank
        self.generation = 0
        self.started_s = 0.0
        self.starting = False
        self.overdue = False  # the pass should have ended, but the instance hangs

    def report(self, passed: PassOutcome, now: float) -> PassEnded:
        """Tell what a pass did and how the ranks stand after it."""
        instance = self.instance
        instance.sequence += 1
        return PassEnded(
            instance.name,
            instance.epoch,
            instance.sequence,
            instance.inbox.acknowledged,
            now - self.started_s,
            passed.ran_tokens,
            *self.engine.state(now, pab=instance.tells_pab),
            self.first_rank,
        )


class Instance:
    """One instance of a pool.

    `told_epoch` is the epoch the policy has heard of: its dispatches are meant for that one.
    """

    __slots__ = (
        "alive",
        "epoch",
        "groups",
        "hung",
        "inbox",
        "name",
        "pool",
        "sequence",
        "tells_pab",
        "told_epoch",
    )

    def __init__(
        self,
        name: str,
        pool: PoolSpec,
        make_batch: Callable[[str], BatchPolicy],
        make_rng: Callable[[str], random.Random],
        *,
        tells_pab: bool = True,
    ) -> None:
        """Build its engines; batch policies and random numbers are asked for by name, as "decode-0/3".

        `tells_pab`: whether its reports have admission budgets, if its batch policies work them out.
        """
        self.name = name
        self.pool = pool
        self.tells_pab = tells_pab
        self.alive = True
        self.hung = False
        self.epoch = self.told_epoch = self.sequence = 0
        self.inbox = Inbox()
        self.groups: list[Group] = []
        for ranks in [range(pool.ranks)] if pool.lockstep else [range(r, r + 1) for r in range(pool.ranks)]:
            batches = [make_batch(f"{name}/{rank}") for rank in ranks]
            engine = Engine(pool, batches, make_rng(f"{name}/{ranks[0]}"))
            self.groups.append(Group(self, engine, ranks[0]))

    @property
    def works(self) -> bool:
        """Whether it runs passes and answers."""
        return self.alive and not self.hung

    def up(self) -> InstanceUp:
        """Announce the instance in its present epoch."""
        return self.pool.instance_up(self.name, self.epoch)

    def locate(self, rank: int) -> tuple[Group, int]:
        """Return the group of a rank and its place there."""
        return (self.groups[0], rank) if self.pool.lockstep else (self.groups[rank], 0)

    def die(self) -> list[Work]:
        """Lose everything; return the requests that were there."""
        self.alive = self.hung = False
        lost = []
        for group in self.groups:
            lost.extend(group.engine.drop_all())
            group.generation += 1
            group.starting = group.overdue = False
        return lost

    def restart(self) -> None:
        """Come back from death, empty."""
        self.alive = True
        self.epoch += 1
        self.sequence = 0
        self.inbox = Inbox()

    def slow_down(self, factor: float) -> None:
        """Multiply the time of its passes from the next one on."""
        for group in self.groups:
            group.engine.slowdown = factor

    def snapshot(self, now: float) -> Snapshot:
        """Tell how all ranks stand."""
        self.sequence += 1
        states = [group.engine.state(now, pab=self.tells_pab) for group in self.groups]
        return Snapshot(
            self.name,
            self.epoch,
            self.sequence,
            self.inbox.acknowledged,
            busy=any(group.engine.busy for group in self.groups),
            queued_tokens=_join([state.queued_tokens for state in states]),
            kv_blocks=_join([state.kv_blocks for state in states]),
            running=_join([state.running for state in states]),
            waiting=_join([state.waiting for state in states]),
            pab_tokens=_join([state.pab_tokens for state in states]),
        )


def _join(parts: list[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Ranks of all groups in one tuple; None when any group does not say."""
    whole: list[int] = []
    for part in parts:
        if part is None:
            return None
        whole.extend(part)
    return tuple(whole)
