"""What a pool's policy believes of its instances: reports, and what was dispatched since.

**Virtual state.** A rank's load is its last report plus every dispatch that report does not account for. A
dispatch is added at decision time, numbered per instance, and leaves the sum when a report acknowledges its
number: a late or reordered report can never erase load that was dispatched after it (SBS: multi-tier state
synchronisation [P]; the numbering is ours). Values an engine does not report are replaced by the ledger's own
accounting.
"""

from collections import deque
from dataclasses import dataclass

from headway.core.actions import Dispatch
from headway.core.errors import InvariantError
from headway.core.events import InstanceUp, PassEnded, PassStarted, Role, Snapshot
from headway.core.request import Request

__all__ = ["InstanceLoad", "Ledger", "Placement", "RankLoad"]

#: Models whose ranks are remembered. Names may come from clients, so the memory must be bounded.
_MOST_MODELS = 1024


@dataclass(slots=True, eq=False)
class Placement:
    """A request on a rank, from its dispatch until it leaves the pool. `blocks`: KV its prompt needs."""

    request: Request
    rank: "RankLoad"
    number: int
    at_s: float
    blocks: int
    prefilled: bool = False


class RankLoad:
    """The believed load of one rank."""

    __slots__ = (
        "chosen",
        "index",
        "instance",
        "own_blocks",
        "prompt_tokens",
        "requests",
        "told",
        "unacked",
        "unacked_blocks",
        "unacked_tokens",
    )

    def __init__(self, instance: "InstanceLoad", index: int) -> None:
        self.instance = instance
        self.index = index
        self.chosen = 0  # when it was last chosen, as a count of dispatches of the pool: breaks ties
        self.clear()

    def clear(self) -> None:
        """Forget everything: the engine is new."""
        self.requests = 0
        self.prompt_tokens = 0
        self.own_blocks = 0
        self.unacked: deque[Placement] = deque()
        self.unacked_tokens = 0
        self.unacked_blocks = 0
        # The last report, shared by the ranks it tells of: a pass of a thousand ranks copies no values.
        self.told: PassEnded | Snapshot | None = None

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens this rank has still to compute."""
        told = self.told
        if told is None or told.queued_tokens is None:
            return self.prompt_tokens
        return told.queued_tokens[self.index - told.first_rank] + self.unacked_tokens

    @property
    def kv_blocks(self) -> int:
        """KV blocks in use, at least what the prompts placed here hold."""
        told = self.told
        if told is None or told.kv_blocks is None:
            return self.own_blocks
        blocks = told.kv_blocks[self.index - told.first_rank] + self.unacked_blocks
        return blocks if blocks > self.own_blocks else self.own_blocks

    @property
    def running(self) -> int | None:
        """Requests that ran at the last report."""
        told = self.told
        return None if told is None or told.running is None else told.running[self.index - told.first_rank]

    @property
    def waiting(self) -> int:
        """Requests that wait in the engine or are on their way to it."""
        told = self.told
        if told is None or told.waiting is None:
            return self.requests
        return told.waiting[self.index - told.first_rank] + len(self.unacked)

    @property
    def pab_tokens(self) -> int | None:
        """Prefill admission budget left after what was dispatched since it was reported; None: not
        reported."""
        told = self.told
        if told is None or told.pab_tokens is None:
            return None
        return told.pab_tokens[self.index - told.first_rank] - self.unacked_tokens

    def room_blocks(self) -> int | None:
        """KV blocks left; None when the instance did not say how many it has."""
        total = self.instance.info.kv_blocks
        return None if total is None else total - self.kv_blocks

    def acknowledge(self, number: int) -> None:
        """Drop the dispatches up to this number: the last report accounts for them."""
        while self.unacked and self.unacked[0].number <= number:
            self._settle(self.unacked.popleft())

    def add(self, placement: Placement) -> None:
        """Reserve, at decision time."""
        self.instance.changed()
        tokens, blocks = placement.request.prompt_tokens, placement.blocks
        self.requests += 1
        self.own_blocks += blocks
        self.prompt_tokens += tokens
        self.unacked.append(placement)
        self.unacked_tokens += tokens
        self.unacked_blocks += blocks

    def prefilled(self, placement: Placement) -> None:
        """The prompt is computed: no prefill work is left of it."""
        if not placement.prefilled:
            placement.prefilled = True
            self.instance.changed()
            self.prompt_tokens -= placement.request.prompt_tokens

    def remove(self, placement: Placement) -> None:
        """Release everything the placement holds."""
        self.prefilled(placement)
        self.requests -= 1
        self.own_blocks -= placement.blocks
        if self.unacked and placement.number >= self.unacked[0].number:
            try:
                self.unacked.remove(placement)
            except ValueError:
                return
            self._settle(placement)

    def _settle(self, placement: Placement) -> None:
        self.instance.changed()
        self.unacked_tokens -= placement.request.prompt_tokens
        self.unacked_blocks -= placement.blocks


class InstanceLoad:
    """One instance. `active`: may be given work (up, not draining, not suspect, below its limit).

    `requests`: placed here and not released. `limit`: most requests at once (backpressure); None: no limit.
    """

    __slots__ = ("_queued", "chosen", "draining", "info", "limit", "number", "ranks", "requests", "suspect")

    def __init__(self, info: InstanceUp) -> None:
        self.info = info
        self.number = 0
        self.chosen = 0  # as in RankLoad
        self.draining = False
        self.suspect = False
        self.requests = 0
        self.limit: int | None = None
        self.ranks = [RankLoad(self, index) for index in range(info.ranks)]
        self._queued: list[int] | None = None

    @property
    def active(self) -> bool:
        """Whether new work may go there."""
        return self.eligible and not self.full

    @property
    def eligible(self) -> bool:
        """Whether new work may go there once it is below its limit."""
        return not (self.draining or self.suspect)

    @property
    def full(self) -> bool:
        """Whether as many requests are here as its limit allows."""
        return self.limit is not None and self.requests >= self.limit

    def room(self, wanted: int) -> int:
        """Return how many of `wanted` more requests the limit allows."""
        return wanted if self.limit is None else max(0, min(wanted, self.limit - self.requests))

    def queued(self) -> list[int]:
        """Return the `queued_tokens` of every rank (to be read only). Kept until `changed` is called."""
        if self._queued is None:
            self._queued = [rank.queued_tokens for rank in self.ranks]
        return self._queued

    def changed(self) -> None:
        """Note that the load of a rank changed."""
        self._queued = None


class Ledger:
    """The instances of one pool and the requests placed on them. `paused`: none is given work."""

    def __init__(self) -> None:
        self.instances: dict[str, InstanceLoad] = {}
        self.placements: dict[str, Placement] = {}
        self.paused = False
        self.active: list[InstanceLoad] = []  # may be given work, in order of coming up
        self.ranks: list[RankLoad] = []  # theirs, rank by rank
        self.chunk_room_tokens = 0  # what one full pass of them takes
        self.names_models = False  # some instance serves certain models only
        self.alike = True  # the active instances serve the same models, those at their limit too
        self.eligible = 0  # how many instances would be active without concurrency limits
        self._at_limit: list[InstanceLoad] = []  # where no other is active
        self._ranks_for: dict[str, list[RankLoad]] = {}  # by model; kept until an instance changes
        self._dispatches = 0
        self._freed = False  # an instance at its limit has room again
        self._largest_tokens: int | None = None  # KV of the largest rank

    def up(self, info: InstanceUp) -> InstanceLoad:
        """Add an instance, or take it back: with a higher epoch it is new and empty.

        What was placed on it before keeps its old ranks, so that giving it back does not touch the new ones.
        """
        known = self.instances.get(info.instance)
        load = known
        if load is None or info.epoch > load.info.epoch or info.ranks != load.info.ranks:
            load = self.instances[info.instance] = InstanceLoad(info)
            load.number = known.number if known else 0  # it never was down: its dispatches are counted on
            load.limit = known.limit if known else None
        load.info, load.draining, load.suspect = info, False, False
        self.refresh()
        return load

    def down(self, instance: str) -> None:
        """Forget an instance. What was placed there stays known until the host says what became of it."""
        self.instances.pop(instance, None)
        self.refresh()

    def limit(self, instance: str, requests: int | None) -> None:
        """Set the most requests an instance may have at once; None: no limit."""
        load = self.instances.get(instance)
        if load is None or load.limit == requests:
            return
        was_full, load.limit = load.full, requests
        self._freed |= was_full and not load.full

    def take_freed(self) -> bool:
        """Return whether an instance at its limit got room since this was last called."""
        freed, self._freed = self._freed, False
        return freed

    def refresh(self) -> None:
        """Rebuild what follows from the instances: call it when one of them changes."""
        self.active = [] if self.paused else [load for load in self.instances.values() if load.active]
        self.ranks = [rank for load in self.active for rank in load.ranks]
        self.chunk_room_tokens = sum(load.info.ranks * load.info.chunk_tokens for load in self.active)
        self._ranks_for.clear()
        self.names_models = any(load.info.models is not None for load in self.instances.values())
        eligible = [] if self.paused else [load for load in self.instances.values() if load.eligible]
        self.eligible = len(eligible)
        self._at_limit = [] if self.active else eligible
        self.alike = not self.names_models or len({load.info.models for load in eligible}) < 2
        sizes = [(load.info.kv_blocks, load.info.block_tokens) for load in self.instances.values()]
        if sizes:  # else they will be back, as large as they were
            unknown = any(blocks is None for blocks, _ in sizes)
            self._largest_tokens = None if unknown else max((b or 0) * tokens for b, tokens in sizes)

    def ranks_for(self, request: Request) -> list[RankLoad]:
        """Return the active ranks that serve the request's model, in the order of `ranks`.

        It is `ranks` itself when all of them do. Read it only.
        """
        model = request.model
        if model is None or not self.names_models:
            return self.ranks
        found = self._ranks_for.get(model)
        if found is None:
            if len(self._ranks_for) >= _MOST_MODELS:
                self._ranks_for.clear()
            found = self._ranks_for[model] = self._find_ranks(model)
        return found

    def _find_ranks(self, model: str) -> list[RankLoad]:
        loads = [load for load in self.active if load.info.serves(model)]
        return self.ranks if len(loads) == len(self.active) else [r for load in loads for r in load.ranks]

    def is_stranded(self, request: Request) -> bool:
        """Return whether there are active ranks, but none serves the request's model.

        Where every instance is at its limit, those count.
        """
        if self.ranks:
            return not self.ranks_for(request)
        return bool(self._at_limit) and not any(load.info.serves(request.model) for load in self._at_limit)

    def is_news(self, event: PassStarted | PassEnded | Snapshot) -> bool:
        """Whether it is of a known rank, and later than all that was reported of it."""
        load = self.instances.get(event.instance)
        if load is None or event.epoch < load.info.epoch or event.first_rank >= len(load.ranks):
            return False
        told = load.ranks[event.first_rank].told
        return told is None or (event.epoch, event.sequence) > (told.epoch, told.sequence)

    def report(self, event: PassEnded | Snapshot) -> bool:
        """Take in a report; False if it is stale, of an unknown instance, or of the wrong shape."""
        if not self.is_news(event):
            return False
        load = self.instances[event.instance]
        told = load.ranks[event.first_rank :]
        shapes = _shapes(event) or {len(told) if load.info.lockstep else 1}
        if len(shapes) > 1 or max(shapes) > len(told):
            return False
        load.changed()
        for rank in told[: max(shapes)]:
            rank.told = event
            if rank.unacked:
                rank.acknowledge(event.acknowledged)
        return True

    def place(self, request: Request, rank: RankLoad, now: float, why: str) -> Dispatch:
        """Reserve the request's load on the rank and return the action.

        Raises InvariantError if the request is placed already, or the instance does not serve its model.
        """
        if request.id in self.placements:
            raise InvariantError(f"request {request.id} dispatched twice")
        instance, info = rank.instance, rank.instance.info
        if request.model is not None and not info.serves(request.model):
            raise InvariantError(
                f"request {request.id} wants model {request.model!r}, which {info.instance} does not serve"
            )
        instance.number = number = instance.number + 1
        self._dispatches += 1
        rank.chosen = instance.chosen = self._dispatches
        blocks = -(-(request.prompt_tokens + 1) // info.block_tokens)
        self.placements[request.id] = placement = Placement(request, rank, number, now, blocks)
        rank.add(placement)
        instance.requests += 1
        return Dispatch(request.id, info.instance, rank.index, number, why)

    def prefilled(self, request_id: str) -> None:
        """Note that the prompt of a placed request is computed; from a prefill instance it leaves with
        that."""
        placement = self.placements.get(request_id)
        if placement is None:
            return
        if placement.rank.instance.info.role is Role.PREFILL:
            self.release(request_id)
        else:
            placement.rank.prefilled(placement)

    def release(self, request_id: str) -> Placement | None:
        """Give back what a request holds; None if it is not placed here."""
        placement = self.placements.pop(request_id, None)
        if placement is not None:
            instance = placement.rank.instance
            was_full = instance.full
            placement.rank.remove(placement)
            instance.requests -= 1
            self._freed |= was_full and not instance.full
        return placement

    def on(self, instance: str) -> list[Placement]:
        """Return the placements on an instance, in order of dispatch."""
        load = self.instances.get(instance)
        return [p for p in self.placements.values() if p.rank.instance is load]

    def fits(self, request: Request) -> bool:
        """Whether some known instance could hold the prompt and one token (true while nothing is known)."""
        return self._largest_tokens is None or request.prompt_tokens < self._largest_tokens


def _shapes(event: PassEnded | Snapshot) -> set[int]:
    """Of how many ranks the report tells; one number if its values agree."""
    ran = event.ran_tokens if isinstance(event, PassEnded) else None
    values = (ran, event.queued_tokens, event.kv_blocks, event.running, event.waiting, event.pab_tokens)
    return {len(v) for v in values if v is not None}
