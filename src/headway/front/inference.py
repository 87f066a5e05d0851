"""Works out when passes end where an engine does not say so, from what passes by anyway.

Rule 1. A first byte is the end of the pass that computed the prompt's last chunk; so is the answer of a
        prefill leg. First bytes within `gather_s` of each other are of one pass, which lasted since the
        pass before it, or since the first of its prompts was sent.
Rule 2. A prompt longer than the chunk took several passes: time and tokens are shared out over them.
Rule 3. An answer that does not stream shows no first byte. Its prefill is taken as done after the time
        that prompts of its length have taken; else the policy would think the instance busy until the
        last token.
Rule 4. Queues, KV and seats stay unknown (`None`): the policy counts what it dispatched itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from headway.core.events import PassEnded, Snapshot
from headway.front.driver import CallAt

__all__ = ["Inference", "Instance"]

#: What is believed of an unknown engine: a pass takes this long, and this much more per prompt token.
FIRST_PASS_S, FIRST_TOKEN_S = 0.05, 1e-4
#: Weight of a new pass in the learned time per token.
NEWS = 0.2
#: A dispatch is in what a scrape shows when it was sent this long before.
SETTLED_S = 0.05


class Instance(Protocol):
    """Whose passes are worked out."""

    name: str
    ranks: int
    epoch: int

    @property
    def chunk_tokens(self) -> int:
        """Most prompt tokens of one pass."""

    def next_sequence(self) -> int:
        """Return the number of its next report."""


@dataclass(slots=True)
class _Sent:
    rank: int
    number: int
    tokens: int
    at_s: float


class Inference:
    """The passes of one instance. `emit` takes the events, `assume(request_id)` a prefill taken as done."""

    def __init__(
        self,
        instance: Instance,
        emit: Callable[[PassEnded], None],
        assume: Callable[[str], None],
        *,
        clock: Callable[[], float],
        call_at: CallAt,
        gather_s: float,
    ) -> None:
        self._instance = instance
        self._emit = emit
        self._assume = assume
        self._clock = clock
        self._call_at = call_at
        self._gather_s = gather_s
        self._token_s: float | None = None
        self.clear()

    def clear(self) -> None:
        """Forget what was sent: the instance went down."""
        self._sent: dict[str, _Sent] = {}
        self._done: list[_Sent] = []
        self._ended_s = -math.inf
        self._first_s = 0.0
        self.acknowledged = 0
        self._gathering = False

    def sent(self, request_id: str, rank: int, number: int, tokens: int, *, streams: bool) -> None:
        """Note that a prompt is on its way."""
        now = self._clock()
        sent = self._sent[request_id] = _Sent(rank, number, tokens, now)
        if not streams:
            self._call_at(now + self.expected_s(tokens), self._assume_done, request_id, sent)

    def prefilled(self, request_id: str) -> None:
        """Note that its first byte is there."""
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self._done.append(sent)
            self._gather(sent)

    def gone(self, request_id: str) -> None:
        """Note that it is over, or withdrawn: if its first byte never came, nothing is learned from it."""
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self._gather(sent)

    def expected_s(self, tokens: int) -> float:
        """Guess how long a prefill takes from sending it: a pass to wait for, and its own passes."""
        return FIRST_PASS_S + tokens * (FIRST_TOKEN_S if self._token_s is None else 2.0 * self._token_s)

    def snapshot(
        self,
        sent_before_s: float,
        *,
        kv_blocks: tuple[int, ...] | None = None,
        running: tuple[int, ...] | None = None,
        waiting: tuple[int, ...] | None = None,
    ) -> Snapshot:
        """Return what is known, with what was scraped; it accounts for what was sent well before the
        scrape.
        """
        settled = [s.number for s in self._sent.values() if s.at_s <= sent_before_s - SETTLED_S]
        own = self._instance
        return Snapshot(
            own.name,
            own.epoch,
            own.next_sequence(),
            max([*settled, self.acknowledged]),
            busy=bool(self._sent),
            kv_blocks=kv_blocks,
            running=running,
            waiting=waiting,
        )

    def _assume_done(self, request_id: str, sent: _Sent) -> None:
        if self._sent.get(request_id) is sent:
            del self._sent[request_id]
            self._assume(request_id)
            self._gather(sent)

    def _gather(self, sent: _Sent) -> None:
        """Wait for the others of the pass, unless there are none."""
        self.acknowledged = max(self.acknowledged, sent.number)
        if self._gathering:
            return
        now = self._clock()
        self._first_s, self._gathering = now, True
        self._call_at(now + (self._gather_s if self._sent else 0.0), self._end_pass)

    def _end_pass(self) -> None:
        if not self._gathering:
            return
        done, self._done, self._gathering = self._done, [], False
        own = self._instance
        ran = [0] * own.ranks
        for sent in done:
            ran[sent.rank] += sent.tokens
        passes = max(1, -(-max(ran) // own.chunk_tokens))
        duration_s = self._duration_s(done) / passes
        ran_tokens = tuple(-(-tokens // passes) for tokens in ran)
        self._emit(
            PassEnded(own.name, own.epoch, own.next_sequence(), self.acknowledged, duration_s, ran_tokens)
        )

    def _duration_s(self, done: list[_Sent]) -> float:
        if not done:
            return 0.0
        began_s = max(self._ended_s, min(sent.at_s for sent in done))
        self._ended_s = self._first_s
        lasted_s = max(0.0, self._first_s - began_s)
        per_token_s = lasted_s / max(1, sum(sent.tokens for sent in done))
        self._token_s = (
            per_token_s if self._token_s is None else self._token_s + NEWS * (per_token_s - self._token_s)
        )
        return lasted_s
