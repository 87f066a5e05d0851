"""Follows the stream of an answer: when its first token comes, how many there are, and whether it failed.

What a token is, for TTFT, TPOT, targets and the policy's "prefill done" alike:

Rule 1. An event is a token when it holds output that a client can see, token ids or log probabilities. SSE
        comments, a role, an empty text, usage and the beginning of an item are none (`usage.py`).
Rule 2. The first token is the first such event; where the output is empty, its end.
Rule 3. The number of tokens is the one in the engine's `usage`. Where there is none, events are counted, and
        each weighs as many tokens as those of this engine did when it reported usage: with speculative
        decoding one event carries several.
Rule 4. An error event makes the answer a failure, whatever its status said.

Before the first token nothing goes to the client, so that the request can still go elsewhere. Comments are
dropped until then; after it they are passed on. After the first token events are not decoded: the end is
looked at once.
"""

from headway.front.usage import EventKind, Usage, event_data, kind_of, usage_of

__all__ = ["TAIL_BYTES", "EventWeights", "TokenStream"]

#: An event that is longer is not held together: it is passed on in pieces, and counts as a token.
MOST_EVENT_BYTES = 256 << 10
#: The end of a stream that is looked at.
TAIL_BYTES = 65_536
#: Weight of what is known of an engine's events when another stream reports its usage.
DECAY = 0.9
#: Engines come and go; of more than these, the one that came first is forgotten.
MOST_ENGINES = 10_000

_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
#: An error event holds one of these. Only events with one are decoded at the end of a stream.
_ERROR_WORDS = (b"error", b"response.failed")


class EventWeights:
    """Tokens in an event, learned from the streams of each engine that report their usage."""

    def __init__(self) -> None:
        self._of_engine: dict[str, float] = {}

    def learn(self, engine: str, tokens: int, events: int) -> None:
        """Learn from a stream with so many tokens in so many events."""
        if tokens >= events > 1:
            weight = tokens / events
            self._of_engine[engine] = DECAY * self._of_engine.get(engine, weight) + (1.0 - DECAY) * weight
            if len(self._of_engine) > MOST_ENGINES:
                del self._of_engine[next(iter(self._of_engine))]

    def tokens(self, engine: str, events: int) -> int:
        """Return how many tokens so many events of an engine hold."""
        weight = self._of_engine.get(engine, 1.0)
        return events if weight < 1.1 else round(events * weight)  # else it is the token that ends the output


class TokenStream:
    """One stream. `started`: the first token came. `events`: how many came from the first token on. `error`:
    the data of an error event; of one after the first token, once the stream is finished.
    """

    __slots__ = ("_before", "_held", "_held_bytes", "_last", "_line", "_open", "error", "events", "started")

    def __init__(self) -> None:
        self.started = False
        self.error: bytes | None = None
        self.events = 0
        self._held: list[bytes] = []  # events before the first token
        self._held_bytes = 0
        self._open = bytearray()  # an event that is not whole yet
        self._before = self._last = b""  # the last pieces with whole events
        self._line = b"\ndata:"

    def add(self, piece: bytes) -> bytes:
        """Take in a piece; return what goes to the client now: nothing before the first token."""
        whole = self._cut(piece) if self._open or not piece.endswith(_ENDS) else piece
        if not self.started:
            return self._begin(whole)
        events = whole.count(self._line) + whole.startswith(b"data:")
        if events:
            self.events += events
            self._before = self._last
            self._last = whole
        return piece

    def finish(self) -> bytes:
        """Note the end of the stream, where errors are; return what is left for the client."""
        if self.error is None:
            last = event_data((self._before + self._last)[-TAIL_BYTES:])
            suspects = (data for data in last if any(word in data for word in _ERROR_WORDS))
            self.error = next((data for data in suspects if kind_of(data) is EventKind.ERROR), None)
        held, self._held = self._held, []
        return b"" if self.started else b"".join((*held, self._open))

    @property
    def complete(self) -> bool:
        """Whether the stream said that it is over."""
        return b"[DONE]" in (self._before + self._last)[-64:]

    def usage(self, weights: EventWeights | None = None, engine: str = "") -> Usage:
        """Return what the engine counted, else the tokens that its events hold, by their weights."""
        last = event_data((self._before + self._last)[-TAIL_BYTES:])
        events = self._with_tokens(last)
        counted = _reported(last)
        if counted is None:
            return Usage(None, events if weights is None else weights.tokens(engine, events))
        if weights is not None and counted.output_tokens is not None:
            weights.learn(engine, counted.output_tokens, events)
        return counted

    def _with_tokens(self, last: list[bytes]) -> int:
        """Return how many events hold a token: those at the end hold none."""
        without = 0
        for data in reversed(last):
            if kind_of(data) in (EventKind.TOKEN, EventKind.EMPTY):
                break
            without += 1
        return max(0, self.events - without)

    def _cut(self, piece: bytes) -> bytes:
        """Put events together that came in pieces; return the whole ones."""
        start = max(0, len(self._open) - 3)  # an end may be split, too
        self._open += piece
        ends = (self._open.rfind(mark, start) + len(mark) for mark in _ENDS if mark in self._open[start:])
        end = max(ends, default=0)
        if not end and len(self._open) > MOST_EVENT_BYTES:
            end = len(self._open)
        whole = bytes(self._open[:end])
        del self._open[:end]
        return whole

    def _begin(self, whole: bytes) -> bytes:
        """Look for the first token; return what was held once it came."""
        found = event_data(whole)
        if not found and len(whole) < MOST_EVENT_BYTES:
            return b""  # comments
        self._before, self._last = self._last, whole
        self._held.append(whole)
        self._held_bytes += len(whole)
        for number, data in enumerate(found):
            kind = kind_of(data)
            if kind is EventKind.ERROR:
                self.error = self.error or data
            if kind in (EventKind.TOKEN, EventKind.END) and not self.started:
                self.events = len(found) - number
                self.started = True
        if self._held_bytes > MOST_EVENT_BYTES:
            self.started = True
        if not self.started:
            return b""
        if b"\n" not in whole:
            self._line = b"\rdata:"
        held, self._held = self._held, []
        return b"".join((*held, self._open))  # what comes next is passed on as it comes


def _reported(last: list[bytes]) -> Usage | None:
    """Return the last usage in these events."""
    for data in reversed(last):
        if b'"usage"' in data or b'"meta_info"' in data:
            counted = usage_of(data)
            if counted.output_tokens is not None:
                return counted
    return None
