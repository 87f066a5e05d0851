"""Decides which of a scheduler's numbered dispatches (`x-headway-dispatch`) a report acknowledges.

Rule 1. A number is acknowledged when it and all lower ones were received, whatever became of them here: one
        that was refused is known to weigh nothing.
Rule 2. A number that stays away for `GAP_S` while a higher one is here never left, or was lost: it is passed
        over. Otherwise one failed connection would leave everything after it unacknowledged for ever.
Rule 3. Number 1, or one far from where the count stands, begins a new count: the scheduler was restarted.
"""

import asyncio

from headway.model.instance import Inbox, Instance

__all__ = ["Dispatches"]

GAP_S = 1.0
_FAR = 10_000


class Dispatches:
    """Keeps the inbox of one instance. `None` for a request without a number."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def expect(self, number: int | None) -> None:
        """Note a request as soon as its headers are read."""
        if number is None:
            return
        if number == 1 or abs(number - self._instance.inbox.acknowledged) > _FAR:
            self._instance.inbox = Inbox()
        self._instance.inbox.expect(number)

    def receive(self, number: int | None) -> None:
        """Note that a request is in its engine, or over. Saying so twice does no harm."""
        inbox = self._instance.inbox
        if number is None or number <= inbox.acknowledged:
            return
        inbox.receive(number)
        if inbox.acknowledged < number <= inbox.acknowledged + _FAR:
            asyncio.get_running_loop().call_later(GAP_S, _pass_over, inbox, number)


def _pass_over(inbox: Inbox, number: int) -> None:
    while inbox.acknowledged < number:
        inbox.receive(inbox.acknowledged + 1)
