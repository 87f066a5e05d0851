"""Decides which prompts begin alike, so that one can go where its beginning is computed already.

Chained hashes over blocks of the prompt's bytes, each with all before it (as vLLM's block hashes are over
tokens): equal beginnings give equal hashes. Before the text comes what the engine puts before it: the model,
then a chat's tools; each message begins with its role. Bytes stand for tokens: a block counts as its share of
the prompt's tokens. The hashes are those of one start (`hash` is salted), as the policy is that compares
them; processes that share a policy share the salt.
"""

from collections.abc import Iterator, Sequence

from headway.front.requests import OTHER_PART, Call

__all__ = ["prefix_of"]

#: About 256 tokens: what a finer block would find besides is little beside the thousands a pass takes.
BLOCK_BYTES, BLOCK_IDS = 1024, 256
#: Of a huge prompt the beginning is enough (256 KiB of text), which bounds the time.
MOST_BLOCKS = 256


def prefix_of(call: Call, tokens: int) -> tuple[tuple[int, ...], int]:
    """Return the hashes of the prompt's full blocks, and the tokens of one block. `tokens`: the prompt's."""
    if call.ids:
        return tuple(_chain(call.model, call.ids, BLOCK_IDS)), BLOCK_IDS
    hashes = tuple(_chain(call.model, _beginning(call), BLOCK_BYTES))
    return hashes, max(1, tokens * BLOCK_BYTES // max(BLOCK_BYTES, call.prompt_bytes))


def _chain(model: str | None, prompt: Sequence[int], size: int) -> Iterator[int]:
    so_far = hash(model or "")  # that of None is an address before Python 3.12
    for end in range(size, min(len(prompt), MOST_BLOCKS * size) + 1, size):
        so_far = hash((so_far, prompt[end - size : end]))
        yield so_far


def _beginning(call: Call) -> bytes:
    """Join the texts, each after its role, up to an image or where it is enough."""
    pieces: list[bytes] = []
    left = BLOCK_BYTES * MOST_BLOCKS
    for role, text in zip(call.roles, call.texts, strict=False):
        if left <= 0 or text is OTHER_PART:
            break
        pieces += (role.encode(), b"\0", text[:left], b"\0")
        left -= len(text)
    return b"".join(pieces)
