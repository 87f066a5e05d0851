"""Decides what to make of pass events that come late, twice, out of order or not at all. No IO.

Rule 1. Of one instance, events are handed on in order of (epoch, sequence), each once; what is older than
        the newest handed on is stale and dropped (a report holds the full state, so nothing is missed).
Rule 2. A number left out is a gap: the event is handed on at once, and a snapshot asked for besides.
Rule 3. An epoch nobody introduced is not handed on. A snapshot is asked for; it comes with the `InstanceUp`.
        If something newer than the snapshot was dropped meanwhile, it is asked for again.
Rule 4. `InstanceUp` is handed on for a new epoch only: told again, it would undo a drain. `Bye` ends an
        epoch; the instance comes back in a higher one.
"""

from dataclasses import dataclass
from typing import NamedTuple

from headway.core.events import InstanceDown, InstanceDraining, InstanceUp, PassEnded, PassStarted, Snapshot
from headway.wire.schema import PassEvent

__all__ = ["Order", "Verdict"]

#: Before an instance was introduced.
_NO_EPOCH = -1


class Verdict(NamedTuple):
    """What to do about an event: hand it on, ask for a snapshot."""

    hand_on: bool
    ask: bool = False


_DROP = Verdict(hand_on=False)
_HAND_ON = Verdict(hand_on=True)


@dataclass(slots=True)
class _Seen:
    """Of an instance: the newest handed on, and the newest dropped because nobody had introduced it."""

    epoch: int = _NO_EPOCH
    sequence: int = 0
    dropped: tuple[int, int] = (0, 0)
    gone: bool = False


class Order:
    """The order of one publisher's events. `gaps` and `stale` count since the start.

    `can_ask`: snapshots can be had. Where not, nobody may ever introduce an instance: its events are handed
    on as they come.
    """

    def __init__(self, *, can_ask: bool) -> None:
        self.gaps = self.stale = 0
        self._can_ask = can_ask
        self._seen: dict[str, _Seen] = {}

    def take(self, event: PassEvent) -> Verdict:
        """Say what to do about an event."""
        seen = self._seen.setdefault(event.instance, _Seen())
        if isinstance(event, InstanceUp):
            return self._introduce(event, seen)
        if isinstance(event, InstanceDown | InstanceDraining):
            return self._leave(event, seen)
        return self._report(event, seen)

    def _introduce(self, event: InstanceUp, seen: _Seen) -> Verdict:
        if event.epoch <= seen.epoch:
            return _DROP
        seen.epoch, seen.sequence, seen.gone = event.epoch, 0, False
        return _HAND_ON

    def _leave(self, event: InstanceDown | InstanceDraining, seen: _Seen) -> Verdict:
        if seen.gone or seen.epoch == _NO_EPOCH:
            return _DROP
        seen.gone = isinstance(event, InstanceDown)
        return _HAND_ON

    def _report(self, event: PassStarted | PassEnded | Snapshot, seen: _Seen) -> Verdict:
        number = (event.epoch, event.sequence)
        if event.epoch > seen.epoch:
            if self._can_ask:
                seen.dropped = max(seen.dropped, number)
                return Verdict(hand_on=False, ask=True)
            seen.epoch, seen.sequence, seen.gone = event.epoch, event.sequence - 1, False
        if seen.gone or number <= (seen.epoch, seen.sequence):
            self.stale += 1
            return _DROP
        left_out = event.sequence - seen.sequence - 1
        seen.sequence = event.sequence
        if isinstance(event, Snapshot):
            return Verdict(hand_on=True, ask=seen.dropped > number)
        self.gaps += bool(left_out)
        return Verdict(hand_on=True, ask=bool(left_out))
