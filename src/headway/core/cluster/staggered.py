"""Staggered Batch Scheduling, prefill (SBS, arXiv 2512.16134): hold, then give each instance its batch.

Theory of operation. An instance in lockstep is a batch server that cannot be interrupted: what is sent while
a pass runs waits in the engine, where it can be neither moved nor ordered. So requests wait *here*, and every
instance has a **slot** at which it is given a batch:

Rule 1  (idle bypass)  an instance known to be idle has its slot now.
Rule 2  (pass end)     a busy instance has its slot when its pass ends, which its reports tell.
Rule 3  (lead)         an instance whose queue outlasts its pass will not wait for us: its slot comes a little
                       before the predicted end of the pass. Nor will one that decodes too (aggregated): what
                       is sent upon the report of a pass end waits there for a pass of decodes. Its slot comes
                       earlier still, by the time from a decision to its effect and back, which is learned.
                       Where it is the only one, no other could be free sooner: its slot is always open, for
                       one pass and no more.
                       One that will have nothing to do then has its slot a little before, too: a batch is
                       some milliseconds under way, the pass begins with the first of it that arrives, and
                       the rest would wait for the pass after.
Rule 4  (spacing)      slots follow one another by at least `spacing · I`, `I = (T̂ + L_net) / N_active`, so
                       that passes do not bunch; a batch that fills the instance does not wait for that. It
                       pays where passes are of one length; where their length follows the batch, rules 1 and
                       2 stagger the instances by themselves and it is off by default (measured:
                       experiments/LOG.md).
Rule 5  (deadline)     nor does a batch with a request that would miss its TTFT target by waiting.
Rule 6  (saturation)   when the buffer holds more than a few passes of every instance, holding only wastes
                       ranks: every instance is filled to its chunk, one pass deep.
Rule 7  (watchdog)     an instance that is silent for long is polled, then suspected: it gets nothing more,
                       and what has no first token is recalled. A snapshot brings it back.

At a slot the batch is poured over the ranks (`allocation.py`): carried-over requests first, oldest first,
then the new ones, longest first. Where ranks decode too, of those with equal room the one with the fewest
requests comes first: else lone requests, one after another, would all decode on rank 0.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter, sub

from headway.core.actions import Poll, Recall, Reject
from headway.core.batch.contract import StepReport
from headway.core.cluster.allocation import Bin, pour
from headway.core.cluster.buffer import Waiting
from headway.core.cluster.contract import Held
from headway.core.cluster.ledger import InstanceLoad
from headway.core.cluster.pool import PoolPolicy, PoolSettings, cluster_policies
from headway.core.estimate.pass_time import PassTime
from headway.core.estimate.prefix_index import PrefixIndex
from headway.core.estimate.step_time import StepTime
from headway.core.estimate.window import Window
from headway.core.events import (
    Cancelled,
    Failed,
    Finished,
    InstanceDown,
    InstanceUp,
    PassEnded,
    PassStarted,
    Role,
    Snapshot,
    TimerFired,
)
from headway.core.registry import Rng
from headway.core.request import Request
from headway.core.settings import setting

__all__ = ["Staggered", "StaggeredSettings"]

#: Share of the round trips seen that the lead of rule 3 takes for undelayed.
_QUICK = 0.1


@dataclass(frozen=True, slots=True)
class StaggeredSettings(PoolSettings):
    """Settings of `staggered`. The defaults are safe unturned: times are learned from reports."""

    spacing: float = setting(
        0.0,
        "least gap between slots, as a share of (T̂ + L_net)/N; 0 leaves spacing to chance",
        at_least=0.0,
        at_most=1.0,
    )
    network_s: float = setting(
        0.002, "time from a decision to its effect in the engine, L_net", unit="s", at_least=0.0
    )
    window: int = setting(32, "passes over which the pass time is averaged", unit="passes", at_least=4)
    lead: float = setting(
        0.1, "how long before a pass end rule 3 opens the slot, as a share of T̂", at_least=0.0
    )
    lead_decoding: float = setting(
        0.25, "the same of an instance that decodes too: to be late costs more there", at_least=0.0
    )
    lead_idle: float = setting(
        0.1,
        "the same of one that will be idle: its batch is there in time; 0: it waits for the report",
        at_least=0.0,
    )
    saturation_passes: float = setting(
        3.0, "buffered work, in full passes of the pool, from which rule 6 holds", unit="passes", at_least=0.0
    )
    max_backlog_passes: float = setting(
        1000.0,
        "buffered work from which new requests are refused (flow control)",
        unit="passes",
        at_least=1.0,
    )
    watchdog_factor: float = setting(8.0, "silence, in T̂, after which an instance is polled", at_least=1.0)
    watchdog_floor_s: float = setting(5.0, "but never sooner than this", unit="s", at_least=0.0)


@dataclass(slots=True)
class PassClock:
    """What is believed of an instance's pass: when it ends, and the tokens of each rank in it."""

    ends_s: float | None = None  # None: no pass is under way
    predicted_s: float = 0.0  # how long it takes from start to end
    running: list[int] = field(default_factory=list)
    outlasts: bool = False  # some rank has more queued than the pass takes
    slot_s: float = -math.inf  # when its next slot opens (rules 1, 2 and 3); infinity: a report will tell
    woken_s: float | None = None  # when it was last given a batch while idle, until that has run
    woken_by: int = 0  # the last dispatch of that batch
    silent_s: float = math.inf  # when the watchdog bites
    polled: bool = False


@cluster_policies.register("staggered")
class Staggered(PoolPolicy):
    """See the module's docstring."""

    Settings = StaggeredSettings
    settings: StaggeredSettings
    summary = "SBS: hold requests, give each instance an even batch just as its pass ends"
    roles = frozenset({Role.PREFILL, Role.AGGREGATED})
    partner = "iqr-lexicographic"
    reads_prefixes = True

    def __init__(self, settings: StaggeredSettings, rng: Rng) -> None:
        super().__init__(settings, rng)
        self._clocks: dict[str, PassClock] = {}
        self._pass_time = PassTime(settings.window)
        self._round_trips_s = Window(settings.window)
        self._prefixes: PrefixIndex[tuple[str, int]] = PrefixIndex()
        self._prefixes_known = False
        self._silent_s: float | None = None  # the least of the clocks'; None: one was set, look again
        self._fired_s = -math.inf
        self._slot_s = math.inf  # the next slot that time alone opens
        self._why = "no slot is open"  # what keeps those that are held
        self._step_time = StepTime()

    # What reports tell of time.

    def _instance_up(self, event: InstanceUp, now: float) -> None:
        known = self.ledger.instances.get(event.instance)
        if known is None or known.suspect or event.epoch > known.info.epoch:
            self._clocks[event.instance] = PassClock()
            self._silent_s = None
            self._forget_prefixes(event.instance, event.ranks)
        super()._instance_up(event, now)

    def _instance_down(self, event: InstanceDown, now: float) -> None:
        load = self.ledger.instances.get(event.instance)
        if load is not None:
            self._forget_prefixes(event.instance, load.info.ranks)
            del self._clocks[event.instance]
            self._silent_s = None
        super()._instance_down(event, now)

    def _forget_prefixes(self, instance: str, ranks: int) -> None:
        for index in range(ranks):
            self._prefixes.forget((instance, index))

    def _pass_started(self, event: PassStarted, now: float) -> None:
        if self.ledger.is_news(event):
            self._begin_pass(self.ledger.instances[event.instance], now, now)

    def _pass_ended(self, event: PassEnded, now: float) -> None:
        if not self.ledger.report(event):
            return
        if any(event.ran_tokens):
            self._learn(event)
            self._learn_round_trip(event, now)
        if self.ledger.instances[event.instance].suspect:
            self._actions.append(Poll(event.instance))  # it lives: a snapshot may bring it back
        self._after_report(event.instance, now)

    def _snapshot(self, event: Snapshot, now: float) -> None:
        if not self.ledger.report(event):
            return
        load = self.ledger.instances[event.instance]
        if load.suspect:
            load.suspect = False
            self._instances_changed()
        clock = self._clocks[event.instance]
        if event.busy and clock.ends_s is not None and not clock.polled:
            self._place(now)  # nobody asked, and the pass goes on: what is believed of its end still holds
        else:
            self._after_report(event.instance, now)

    def _learn(self, event: PassEnded) -> None:
        """Pass time from its fullest rank and the sum over ranks: the local and the shared part of a pass."""
        self._pass_time.observe(event.duration_s)
        step = StepReport(max(event.ran_tokens), 0, sum(event.ran_tokens), 0.0, event.duration_s)
        self._step_time.observe(step)

    def _learn_round_trip(self, event: PassEnded, now: float) -> None:
        """Of a batch for an idle instance: what the time until its report has beyond the pass itself."""
        clock = self._clocks[event.instance]
        if clock.woken_s is None or event.acknowledged < clock.woken_by:
            return
        if now - clock.woken_s >= event.duration_s:  # else the pass began before
            self._round_trips_s.add(now - clock.woken_s - event.duration_s)
        clock.woken_s = None

    def _after_report(self, instance: str, now: float) -> None:
        load = self.ledger.instances[instance]
        clock = self._clocks[instance]
        clock.polled = False
        if any(load.queued()):
            self._begin_pass(load, now, now)
        else:
            self._idle(clock, load)
        self._place(now)

    def _idle(self, clock: PassClock, load: InstanceLoad) -> None:
        """Believe that nothing runs or waits there."""
        clock.ends_s, clock.running, clock.silent_s = None, [0] * load.info.ranks, math.inf
        self._set_slot(clock, load)
        self._silent_s = None

    def _cancelled(self, event: Cancelled, now: float) -> None:
        instance = self._instance_of(event.request_id)
        super()._cancelled(event, now)
        self._freed(instance, now)

    def _finished(self, event: Finished, now: float) -> None:
        instance = self._instance_of(event.request_id)
        super()._finished(event, now)
        self._freed(instance, now)

    def _failed(self, event: Failed, now: float) -> None:
        instance = self._instance_of(event.request_id)
        super()._failed(event, now)
        self._freed(instance, now)

    def _instance_of(self, request_id: str) -> InstanceLoad | None:
        placement = self.ledger.placements.get(request_id)
        return placement.rank.instance if placement is not None else None

    def _freed(self, load: InstanceLoad | None, now: float) -> None:
        """Open the slot of an instance that lost the last of its prompts: no report may come to say so."""
        if load is None or self.ledger.instances.get(load.info.instance) is not load:
            return  # it was never placed, or its instance is gone or new
        clock = self._clocks[load.info.instance]
        if clock.ends_s is not None and not any(load.queued()):
            self._idle(clock, load)
            self._place(now)

    def _begin_pass(self, load: InstanceLoad, starts_s: float, now: float) -> None:
        """Believe that a pass over what is queued begins at `starts_s`, and set the watchdog by it.

        What was sent while the pass before ran is in it, though no report has acknowledged it: an engine
        takes in what came when it forms its next step.
        """
        clock = self._clocks[load.info.instance]
        chunk = load.info.chunk_tokens
        queued = load.queued()
        clock.outlasts = max(queued) > chunk
        clock.running = [min(tokens, chunk) for tokens in queued] if clock.outlasts else queued
        clock.predicted_s = self._predict_s(clock.running)
        clock.ends_s = starts_s + clock.predicted_s
        self._set_slot(clock, load)
        patience = self.settings.watchdog_factor * (self._pass_time.mean_s or 0.0)
        clock.silent_s = now + max(self.settings.watchdog_floor_s, patience)
        self._silent_s = None

    def _set_slot(self, clock: PassClock, load: InstanceLoad) -> None:
        aggregated = load.info.role is Role.AGGREGATED
        if clock.ends_s is None or (aggregated and self.ledger.eligible == 1):
            clock.slot_s = -math.inf
        elif aggregated and any(rank.running != 0 for rank in load.ranks):  # None: it does not say
            lead_s = self.settings.lead_decoding * clock.predicted_s + self._round_trip_s()
            clock.slot_s = clock.ends_s - lead_s
        elif clock.outlasts:
            clock.slot_s = clock.ends_s - self.settings.lead * clock.predicted_s
        elif self.settings.lead_idle and clock.predicted_s:
            lead_s = self.settings.lead_idle * clock.predicted_s + self._round_trip_s()
            clock.slot_s = clock.ends_s - lead_s
        else:
            clock.slot_s = math.inf

    def _round_trip_s(self) -> float:
        """Return the time from a decision to its effect and back, at least L_net.

        Low among those seen: others waited for a pass of decodes.
        """
        return max(self.settings.network_s, self._round_trips_s.quantile(_QUICK) or 0.0)

    def _predict_s(self, tokens: list[int]) -> float:
        """Guess how long a pass with these tokens per rank takes; 0 before anything is known."""
        if not self._step_time.trained("mixed"):
            return self._pass_time.mean_s or 0.0
        return self._step_time.predict(max(tokens), 0, sum(tokens))

    # When.

    def wake_at(self) -> float | None:
        """Return the next slot, watchdog or end of a hold."""
        if self._silent_s is None:
            self._silent_s = min([clock.silent_s for clock in self._clocks.values()], default=math.inf)
        first = self._silent_s
        if self.buffer or self.stranded:
            first = min(first, self._slot_s, super().wake_at() or math.inf)
        return None if first == math.inf else first

    def _timer_fired(self, event: TimerFired, now: float) -> None:
        self._watch(now)
        super()._timer_fired(event, now)

    def _place(self, now: float) -> None:
        """Give a batch to every instance whose slot has come."""
        self._slot_s, self._why = math.inf, "no slot is open"
        if not self.buffer:
            return
        saturated = self._saturated()
        slots = self._slots(self.ledger.active, saturated, now)
        while slots and self.buffer:
            if saturated and not self._saturated():  # the rest of the slots open later than was thought
                saturated, slots = False, self._slots([load for *_, load in slots], False, now)
                continue
            opens_s, _, load = slots.popleft()
            opens_s = self._spaced(opens_s, load, now)
            if opens_s > now:
                self._slot_s = opens_s
                break
            self._why = "every rank is full"
            if self._fire(load, saturated, now):
                self._fired_s = now

    def _slots(
        self, loads: Iterable[InstanceLoad], saturated: bool, now: float
    ) -> deque[tuple[float, int, InstanceLoad]]:
        """Return (when it opens, when the instance was last chosen, the instance) of each slot, in order.

        The earliest first, of equals that of the instance that has had no batch for longest. Slots that only
        a report can open are left out.
        """
        if saturated:  # rule 6
            slots = [(now, load.chosen, load) for load in loads]
        else:
            times = [(self._clocks[load.info.instance].slot_s, load) for load in loads]
            slots = [(max(now, slot_s), load.chosen, load) for slot_s, load in times if slot_s < math.inf]
        slots.sort(key=itemgetter(0, 1))
        return deque(slots)

    def _spaced(self, opens_s: float, load: InstanceLoad, now: float) -> float:
        """Keep the spacing between slots, unless the batch is full or urgent (rules 4 and 5)."""
        if not self.settings.spacing:
            return opens_s
        pass_s = self._pass_time.mean_s or 0.0
        gap_s = self.settings.spacing * (pass_s + self.settings.network_s) / len(self.ledger.active)
        spaced_s = max(opens_s, self._fired_s + gap_s)
        if spaced_s <= now or self.buffer.tokens >= load.info.ranks * load.info.chunk_tokens:
            return opens_s
        tightest_s = min(w.request.arrival_s + w.request.slo.ttft_s for w in self.buffer.values())
        latest_s = tightest_s - self.settings.network_s - pass_s
        return max(opens_s, min(spaced_s, latest_s))

    def _backlog_passes(self) -> float:
        """Buffered work in full passes of every active instance."""
        room = self.ledger.chunk_room_tokens
        return self.buffer.tokens / room if room else 0.0

    def _saturated(self) -> bool:
        return self._backlog_passes() >= self.settings.saturation_passes

    def held(self) -> list[Held]:
        """See `ClusterPolicy.held`. What keeps one request keeps them all."""
        why = self._why if self.ledger.active else self._why_nowhere() or "no instance is up"
        return [Held(w.request.id, w.since_s, why) for w in self.buffer.values()] + self._held_stranded()

    # Where.

    def _order(self, starts_s: float, now: float) -> Iterable[Waiting]:
        """Order the buffer for a pass that starts at `starts_s`.

        Carried-over requests first, oldest first; then the new ones, longest first [P].
        """
        return sorted(
            self.buffer.values(), key=lambda w: (0, w.since_s) if w.rounds else (1, -w.request.prompt_tokens)
        )

    def _fire(self, load: InstanceLoad, saturated: bool, now: float) -> bool:
        """Pour a batch into the instance; False if nothing fits."""
        clock = self._clocks[load.info.instance]
        chunk = load.info.chunk_tokens
        running = clock.running or [0] * load.info.ranks
        left = list(map(sub, load.queued(), running))  # after the pass under way
        if not self._may_fit(chunk - max(0, min(left)), chunk, saturated):
            return False
        ranks = load.ranks
        if load.info.role is Role.AGGREGATED:
            ranks = sorted(ranks, key=attrgetter("requests"))
        bins = [Bin(rank.index, chunk - max(0, left[rank.index]), chunk) for rank in ranks]
        starts_s = now + self.settings.network_s if clock.ends_s is None else clock.ends_s
        ordered = [waiting.request for waiting in self._order(starts_s, now)]
        if not self.ledger.alike:
            ordered = [request for request in ordered if load.info.serves(request.model)]
        hits = self._hits(load) if self._prefixes_known else None
        placed = pour(ordered, bins, hits=hits, overflow=saturated)
        why = "saturated" if saturated else "slot" if clock.ends_s is not None else "idle"
        placed = placed[: load.room(len(placed))]
        for request, index in placed:
            if request.prefix:
                self._prefixes_known = True
                self._prefixes.note((load.info.instance, index), request.prefix)
            self._dispatch(self.buffer[request.id], load.ranks[index], now, why)
        if placed:
            for waiting in self.buffer.values():
                waiting.rounds += 1
            if clock.ends_s is None:
                clock.woken_s, clock.woken_by = now, load.number
                self._begin_pass(load, starts_s, now)
            else:
                opened_s = clock.slot_s
                clock.outlasts = True
                self._set_slot(clock, load)
                clock.slot_s = min(clock.slot_s, opened_s)  # once open it is, until the pass ends
        return bool(placed)

    def _may_fit(self, room: int, chunk: int, saturated: bool) -> bool:
        """Whether the emptiest rank, with this room, could take any held request: most slots end here."""
        return room > 0 and (saturated or min(self.buffer.least_tokens(), chunk) <= room)

    def _hits(self, load: InstanceLoad) -> Callable[[Request], Iterable[tuple[int, int]]]:
        name = load.info.instance

        def hits(request: Request) -> Iterable[tuple[int, int]]:
            if not request.prefix:
                return ()
            return (
                (index, hit) for (instance, index), hit in self._prefixes.best(request) if instance == name
            )

        return hits

    # Flow control and watchdog.

    def _admit(self, request: Request, now: float) -> bool:
        if not super()._admit(request, now):
            return False
        if self._backlog_passes() < self.settings.max_backlog_passes:
            return True
        self._actions.append(Reject(request.id, "backlog-full", self._retry_after_s(now)))
        return False

    def _watch(self, now: float) -> None:
        """Poll an instance that is silent; suspect one that does not answer (rule 7)."""
        self._silent_s = None
        for name, clock in self._clocks.items():
            if now < clock.silent_s:
                continue
            if not clock.polled:
                clock.polled = True
                clock.silent_s = now + self.settings.watchdog_floor_s
                self._actions.append(Poll(name))
            else:
                clock.silent_s = math.inf
                self._suspect(name, now)

    def _suspect(self, name: str, now: float) -> None:
        load = self.ledger.instances[name]
        load.suspect = True
        self._instances_changed()
        for placement in reversed(self.ledger.on(name)):
            if not placement.prefilled:
                self.ledger.release(placement.request.id)
                self._actions.append(Recall(placement.request.id, name, "silent"))
                self._take_back(placement.request, now)
