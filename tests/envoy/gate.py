"""A policy for tests: it holds every request until it is let go."""

from dataclasses import dataclass
from weakref import WeakSet

from headway.core.cluster import PoolPolicy, PoolSettings
from headway.core.settings import setting

#: Those that there are: a scheduler makes one for each group of engines.
GATES = WeakSet()


@dataclass(frozen=True, slots=True)
class GateSettings(PoolSettings):
    hold_s: float = setting(1e9, "how long it holds", unit="s", at_least=0.0)


class Gate(PoolPolicy):
    Settings = GateSettings
    settings: GateSettings
    summary = "hold until told otherwise"
    shut = True

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        GATES.add(self)

    def _place(self, now):
        for waiting in list(self.buffer.values()):
            if not self.ledger.ranks or (self.shut and now < waiting.since_s + self.settings.hold_s):
                return
            rank = min(self.ledger.ranks, key=lambda r: r.requests)
            self._dispatch(waiting, rank, now, "let go")

    def wake_at(self):
        ends_s, first = super().wake_at(), self.buffer.first()
        if first is None or not self.shut or not self.ledger.ranks:
            return ends_s
        return min(ends_s, first.since_s + self.settings.hold_s)
