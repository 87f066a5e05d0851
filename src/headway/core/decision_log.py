"""The decision log: one line of JSON per action, the same from every host.

    {"at": 12.25, "on": "PassEnded", "do": "Dispatch", "request_id": "r7", "instance": "prefill-0", …}

Metrics, reports, timelines and dashboards are made from it; equal inputs give equal bytes.
"""

import json
from collections.abc import Iterable
from dataclasses import fields

from headway.core.actions import Action
from headway.core.events import Event

__all__ = ["DecisionLog", "encode"]


def encode(now: float, event: Event, action: Action) -> str:
    """Return one line, without the newline. Times are rounded to the microsecond."""
    record: dict[str, object] = {"at": round(now, 6), "on": type(event).__name__, "do": type(action).__name__}
    for field in fields(action):
        value = getattr(action, field.name)
        record[field.name] = round(value, 6) if isinstance(value, float) else value
    return json.dumps(record, separators=(",", ":"))


class DecisionLog:
    """An observer that keeps every decision as text."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, now: float, event: Event, actions: Iterable[Action]) -> None:
        """Note the actions that `event` led to at `now`."""
        self.lines.extend(encode(now, event, action) for action in actions)

    def text(self) -> str:
        """Return the whole log."""
        return "".join(line + "\n" for line in self.lines)
