"""Hashes the beginning of a prompt in blocks, so that a request can go where that beginning is in the cache.

Each hash covers its block and all before it (as vLLM's block hashes do over tokens): equal beginnings have
equal hashes. The text begins with what the engine puts before it: the model, then a chat's tools; each
message begins with its role. Bytes stand for tokens: a block counts as its share of the prompt's tokens.

The hash is BLAKE2b without a key, not Python's salted `hash`: the processes that read bodies and the one that
compares the hashes must agree. A client that finds a collision misplaces its own request, no more.
"""

from collections.abc import Iterable, Iterator
from hashlib import blake2b

__all__ = ["BLOCK_BYTES", "BLOCK_IDS", "MOST_BLOCKS", "hash_ids", "hash_texts"]

#: About 256 tokens: what a finer block would find besides is little beside the thousands a pass takes.
BLOCK_BYTES, BLOCK_IDS = 1024, 256
#: Of a huge prompt the beginning is enough (256 KiB of text), which bounds the time.
MOST_BLOCKS = 256


def hash_texts(model: str | None, pieces: Iterable[tuple[str, bytes]]) -> tuple[int, ...]:
    """Return the hashes of the full blocks of a prompt's texts, given with the role of each."""
    beginning: list[bytes] = []
    left = BLOCK_BYTES * MOST_BLOCKS
    for role, text in pieces:
        if left <= 0:
            break
        beginning += (role.encode(), b"\0", text[:left], b"\0")
        left -= len(text)
    data = b"".join(beginning)
    ends = range(BLOCK_BYTES, min(len(data), MOST_BLOCKS * BLOCK_BYTES) + 1, BLOCK_BYTES)
    return tuple(_chain(model, (data[end - BLOCK_BYTES : end] for end in ends)))


def hash_ids(model: str | None, ids: list[bytes]) -> tuple[int, ...]:
    """Return the hashes of the full blocks of token ids, given as the decimal numbers of the body."""
    ends = range(BLOCK_IDS, min(len(ids), MOST_BLOCKS * BLOCK_IDS) + 1, BLOCK_IDS)
    return tuple(_chain(model, (b",".join(ids[end - BLOCK_IDS : end]) for end in ends)))


def _chain(model: str | None, blocks: Iterator[bytes]) -> Iterator[int]:
    so_far = blake2b((model or "").encode(), digest_size=8).digest()
    for block in blocks:
        so_far = blake2b(so_far + block, digest_size=8).digest()
        yield int.from_bytes(so_far, "little")
