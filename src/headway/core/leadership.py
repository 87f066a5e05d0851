"""Decides whether this replica leads its pool: when to ask for the lease, how long to believe in it.

The lease is a record in a store that all replicas reach (`front/lease`): who holds it, with which token,
until when. Only one holds it at a time, by the store's clock. Here is what a replica makes of that by its
own clock.

Rule 1  (margin)    a granted lease is believed in from the moment it was *asked* for, and for `BELIEF` of its
                    length only. So the leader has stepped down before the store gives the lease away, however
                    slow the answer was and though the clocks run up to `DRIFT` too slow or too fast.
Rule 2  (renewal)   the leader asks again after a third of the lease, and soon again when it gets no answer.
                    Of an answer it did not get it believes nothing.
Rule 3  (takeover)  a follower asks when the lease runs out, and every third of it in case it was given back:
                    of a leader that died it knows after `takeover_s` at the latest.
Rule 4  (token)     every term has a token larger than all before. It goes with each dispatch, and an engine
                    that has seen a larger one refuses: a process may stand still between the look at its
                    clock and the dispatch, for as long as it likes.
Rule 5  (fenced)    a leader that is refused by an engine steps down at once, and asks for a token above the
                    one it was shown: a store that lost its memory is overruled by what the engines know.
Rule 6  (rank)      a replica that is not the first choice for the pool (`core/sharding.py`) asks a little
                    later for a lease that is free. It is a preference: who leads goes on leading.
"""

import math
from dataclasses import dataclass

from headway.core.errors import ConfigError

__all__ = [
    "BELIEF",
    "DRIFT",
    "FENCED",
    "FENCE_HEADER",
    "MOST_TOKEN",
    "Claim",
    "Fence",
    "Leadership",
    "read_token",
]

#: With this header a leader's token goes to engines. One that has seen a newer one answers with this status,
#: and with the newest token in the same header.
FENCE_HEADER = "x-headway-fence"
FENCED = 409

#: The share of a lease in which its holder believes.
BELIEF = 0.9
#: How much too slow or too fast a clock may run; (1 + DRIFT) / (1 − DRIFT) must not pass 1 / BELIEF.
DRIFT = 0.05
#: Shares of the lease: from one renewal to the next, patience with an answer, after no answer, per rank.
_RENEW, _PATIENCE, _AGAIN, _RANK_GAP = 1 / 3, 1 / 4, 1 / 10, 1 / 10
#: Larger ones are nobody's: stores count in floats with 53 bits.
MOST_TOKEN = 10**15


@dataclass(frozen=True, slots=True)
class Claim:
    """Ask the store for the lease now, to get or to keep it, with a token larger than `above`."""

    number: int
    asked_s: float
    above: int


class Leadership:
    """One replica's view of the lease of one pool. It leads while `token(now)` is not None.

    `lease_s`: how long the store grants it for. `rank`: how many replicas are preferred to this one. Raises
    ConfigError for a lease of no length.
    """

    def __init__(self, lease_s: float, *, rank: int = 0) -> None:
        if not 0.0 < lease_s < math.inf:
            raise ConfigError(f"lease_s must be a positive number, got {lease_s!r}")
        self.lease_s = lease_s
        self.leader: str | None = None  # of others; None: nobody, or unknown
        self.until_s = -math.inf
        self.patience_s = lease_s * _PATIENCE
        self._rank_s = rank * lease_s * _RANK_GAP
        self._token = 0
        self._above = 0
        self._next_s: float | None = None  # None: at once, or when this rank may begin
        self._claim: Claim | None = None
        self._claims = 0

    @property
    def takeover_s(self) -> float:
        """How long a leader's death can stay unnoticed, but for the time of a round trip."""
        return self.lease_s + self._rank_s

    def token(self, now: float) -> int | None:
        """Return the token of the term this replica leads in; None when it does not lead."""
        return self._token if now < self.until_s else None

    def wake_at(self) -> float:
        """When to call `claim` next: -inf is at once."""
        if self._claim is not None:
            return self._claim.asked_s + self.patience_s
        return -math.inf if self._next_s is None else self._next_s

    def claim(self, now: float) -> Claim | None:
        """Return what to ask the store, if it is time to. Any claim before it is given up."""
        if self._next_s is None:
            self._next_s = now + self._rank_s
        if now < self.wake_at():
            return None
        self._claims += 1
        self._claim = Claim(self._claims, now, self._above)
        return self._claim

    # What the store answered. Answers to a claim that was given up are not listened to.

    def granted(self, claim: Claim, token: int, now: float) -> None:
        """Hold the lease, with this token."""
        if self._over(claim):
            self._token, self.leader = token, None
            self.until_s = claim.asked_s + BELIEF * self.lease_s
            self._next_s = max(now, claim.asked_s + _RENEW * self.lease_s)

    def refused(self, claim: Claim, leader: str, free_in_s: float, now: float) -> None:
        """Another replica holds it, for `free_in_s` at most if it does not ask again."""
        if self._over(claim):
            self.until_s, self.leader = -math.inf, leader
            soon = free_in_s <= _RENEW * self.lease_s
            self._next_s = now + (free_in_s + self._rank_s if soon else _RENEW * self.lease_s)

    def failed(self, claim: Claim, now: float) -> None:
        """The store did not answer, or not well."""
        if self._over(claim):
            self.leader = None
            self._next_s = now + _AGAIN * self.lease_s

    def _over(self, claim: Claim) -> bool:
        if self._claim is not claim:
            return False
        self._claim = None
        return True

    # What else is heard

    def fenced(self, token: int) -> bool:
        """An engine has seen this token; whether that is news, and ends the term (rule 5)."""
        if token <= max(self._token, self._above):
            return False
        self._above = token
        self.until_s = -math.inf
        self._claim, self._next_s = None, -math.inf
        return True

    def give_up(self) -> int | None:
        """Lead no more, and never again; return the token to give back, None when there is none."""
        had = self._token if self.until_s > -math.inf else None
        self.until_s, self._claim, self._next_s = -math.inf, None, math.inf
        return had


class Fence:
    """An engine's end: it serves who leads, and nobody who led before. `newest`: the largest token seen."""

    def __init__(self) -> None:
        self.newest = 0

    def admits(self, token: int | None) -> bool:
        """Whether to serve a request with this token; one without any is nobody's to refuse."""
        if token is None:
            return True
        self.newest = max(self.newest, token)
        return token == self.newest


def read_token(text: str | None) -> int | None:
    """Read the token in a header; None when there is none, or nonsense."""
    if text is None or len(text) > 16 or not (text.isascii() and text.isdigit()):
        return None
    token = int(text)
    return token if 0 < token <= MOST_TOKEN else None
