"""Decides which replica is the first choice to lead a pool, so that many pools spread over few replicas.

Rendezvous hashing (Thaler and Ravishankar, 1998), a form of consistent hashing that needs no ring: each
replica is scored against the pool's name, the highest score is the first choice. When a replica goes, its
pools alone move, each to its next choice; when one comes, it takes its share from all.
"""

from collections.abc import Iterable
from hashlib import blake2b

__all__ = ["preference"]


def preference(pool: str, replicas: Iterable[str]) -> list[str]:
    """Return the replicas in the order in which they should lead a pool, the same in every process.

    >>> preference("llama", ["a", "b", "c"])[0] in ("a", "b", "c")
    True
    """
    return sorted(set(replicas), key=lambda replica: (_score(pool, replica), replica), reverse=True)


def _score(pool: str, replica: str) -> bytes:
    # A length in front: ("ab", "c") must not be ("a", "bc").
    return blake2b(f"{len(pool)}:{pool}{replica}".encode(), digest_size=8).digest()
