"""Decides which requests end with a connection of Envoy's, and who may report that a request is over.

A request is carried by the connection its ext_proc stream came by. An Envoy has several, and reports ends in
an access log on one of them. No IO: `now` is an argument, peers are texts ("ipv4:10.0.0.1:4711").

Rule 1  (proof)   a report that names a request's secret key comes from the Envoy that carries it: nobody else
                  is told the key. From then on the connection it came by speaks for the one that carries the
                  request.
Rule 2  (by id)   a report without a key names a request by its `x-request-id`, which engines and clients know
                  too. It is believed from the connection that carries the request, and from one that speaks
                  for that one; from others it waits for the proof.
Rule 3  (broken)  when a connection is gone, its requests go on under another that speaks for it. Without one
                  they are lost after `grace_s`, unless one proves meanwhile that the Envoy is alive.
"""

from collections import defaultdict

__all__ = ["Carriers"]

#: Claims of one connection on requests of another that are kept for the proof.
MOST_CLAIMS = 10_000


class Carriers:
    """The connections of Envoys and the keys of the requests each carries."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._carrier: dict[str, str] = {}  # of each key
        self._keys: defaultdict[str, set[str]] = defaultdict(set)  # by connection, also a broken one
        self._speakers: defaultdict[str, set[str]] = defaultdict(set)  # connections that speak for one
        self._claims: defaultdict[tuple[str, str], set[str]] = defaultdict(set)  # (by whom, of whom) → keys
        self._broken: dict[str, float] = {}  # connection → when its requests are lost

    def carry(self, key: str, peer: str) -> None:
        """Note which connection carries a request."""
        self._carrier[key] = peer
        self._keys[peer].add(key)

    def over(self, key: str) -> None:
        """Forget a request."""
        peer = self._carrier.pop(key, None)
        if peer is not None:
            self._discard(peer, key)

    def prove(self, key: str, peer: str) -> set[str]:
        """Note that a connection reported a request by its key; return keys whose ends are believed now."""
        carrier = self._carrier.get(key)
        if carrier is None or carrier == peer:
            return set()
        self._speakers[carrier].add(peer)
        believed = self._claims.pop((peer, carrier), set()) & self._keys[carrier]
        if carrier in self._broken:
            self._hand_over(carrier, peer)
        return believed

    def believes(self, key: str, peer: str) -> bool:
        """Whether a connection may end a request by its id. If not, the claim is kept for the proof."""
        carrier = self._carrier.get(key)
        if carrier is None:
            return False
        if peer == carrier or peer in self._speakers.get(carrier, ()):
            return True
        claims = self._claims[peer, carrier]
        if len(claims) < MOST_CLAIMS:
            claims.add(key)
        return False

    def broke(self, peer: str, now: float) -> None:
        """Note that a connection is gone."""
        for speakers in self._speakers.values():
            speakers.discard(peer)
        for claim in [claim for claim in self._claims if claim[0] == peer]:
            del self._claims[claim]
        heir = next(iter(self._speakers.get(peer, ())), None)
        if not self._keys.get(peer):
            self._forget(peer)
        elif heir is not None:
            self._hand_over(peer, heir)
        else:
            self._broken[peer] = now + self._grace_s

    def wake_at(self) -> float | None:
        """When requests are lost next; None: none will be."""
        return min(self._broken.values(), default=None)

    def lost(self, now: float) -> set[str]:
        """Return the keys of requests that are lost by now."""
        due = [peer for peer, at_s in self._broken.items() if at_s <= now]
        keys = {key for peer in due for key in self._keys.get(peer, ())}
        for peer in due:
            self._forget(peer)
        return keys

    def _hand_over(self, peer: str, heir: str) -> None:
        keys = self._keys.pop(peer, set())
        for key in keys:
            self.carry(key, heir)
        for other, speakers in list(self._speakers.items()):  # who spoke for it speaks for its heir
            if other == peer:
                self._speakers[heir] |= speakers - {heir}
        self._forget(peer)

    def _discard(self, peer: str, key: str) -> None:
        for claim in [claim for claim in self._claims if claim[1] == peer]:
            self._claims[claim].discard(key)
            if not self._claims[claim]:
                del self._claims[claim]
        keys = self._keys.get(peer)
        if keys is not None:
            keys.discard(key)
            if not keys and peer in self._broken:
                self._forget(peer)

    def _forget(self, peer: str) -> None:
        for key in self._keys.pop(peer, ()):
            self._carrier.pop(key, None)
        self._speakers.pop(peer, None)
        self._broken.pop(peer, None)
        for claim in [claim for claim in self._claims if claim[1] == peer]:
            del self._claims[claim]
