"""Keeps a request's body while it arrives: every byte counts at once, and tiny pieces cost little."""

from headway.front.buffer import ByteBudget, ReceivedBytes
from headway.front.errors import Refusal
from headway.hosts.envoy.config import EppConfig

__all__ = ["Upload", "budget_of"]

#: So many pieces go back as they came. Later ones are joined, for a piece costs more than its bytes.
PIECES = 64
JOINED_BYTES = 64 << 10


class Upload:
    """One body. Release it when nothing of it is kept any more; more than once does no harm."""

    def __init__(self, budget: ByteBudget, most_bytes: int) -> None:
        self.pieces: list[bytes] = []
        self.size = 0
        self._most_bytes = most_bytes
        self._received = ReceivedBytes(budget)
        self._tail = bytearray()  # pieces that are being joined

    def add(self, piece: bytes) -> None:
        """Take in a piece. Raises Refusal: 413 for a body that is too large, 429 where memory is short."""
        self.size += len(piece)
        if self.size > self._most_bytes:
            raise Refusal(413, "body_too_large", f"The body is larger than {self._most_bytes} bytes.")
        self._received.add(len(piece))
        if len(self.pieces) < PIECES:
            if piece:
                self.pieces.append(piece)
            return
        self._tail += piece
        if len(self._tail) >= JOINED_BYTES:
            self.finish()

    def finish(self) -> list[bytes]:
        """Return the pieces of what has come."""
        if self._tail:
            self.pieces.append(bytes(self._tail))
            self._tail = bytearray()
        return self.pieces

    def release(self) -> None:
        """Keep nothing of it, and count it out."""
        self.pieces.clear()
        self._tail = bytearray()
        self._received.release()


def budget_of(config: EppConfig) -> ByteBudget:
    """Return the bytes that bodies may take in one process: its share of the bound, and room for one body."""
    limits = config.limits
    share = limits.buffer_bytes // config.server.processors
    return ByteBudget(max(share, min(limits.max_body_bytes, limits.buffer_bytes)))
