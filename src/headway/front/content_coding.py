"""Decode request bodies that clients send compressed (`Content-Encoding: gzip` or `zstd`), with bounds.

A few kilobytes can become gigabytes. So the size is checked while decoding, every byte counts against the
budget at once, and all but the first small piece is decoded in a thread.
"""

import asyncio
import zlib
from collections.abc import Callable
from typing import Protocol

import zstandard

from headway.front.buffer import ReceivedBytes
from headway.front.errors import Refusal, bad_request

__all__ = ["decode_body"]

#: This much is decoded in the event loop, well within a millisecond; more, in steps of a thread's.
INLINE_BYTES, STEP_BYTES = 1 << 16, 1 << 20
#: What RFC 9659 has decoders support; a frame that wants a larger window is refused.
MOST_WINDOW_BYTES = 8 << 20
#: Compressors write one member, or one for each block of a megabyte.
MOST_MEMBERS = 1024
#: A decoder is given so much of the body at a time.
INPUT_BYTES = 1 << 16
GZIP = 16 + zlib.MAX_WBITS


class _Decoder(Protocol):
    def read(self, most_bytes: int) -> bytes:
        """Return the next decoded bytes; none at the end."""


class _Gzip:
    """Decode the members of a gzip file one after the other."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0
        self._rest = b""  # of the input that was taken out of the body
        self._members = 1
        self._member = zlib.decompressobj(GZIP)

    def read(self, most_bytes: int) -> bytes:
        while True:
            if not self._rest:
                self._rest = self._body[self._at : self._at + INPUT_BYTES]
                self._at += INPUT_BYTES
            if self._member.eof:
                if not self._rest:
                    return b""
                self._begin_member()
            if not self._rest:
                raise zlib.error("the body ends too early")
            piece = self._member.decompress(self._rest, most_bytes)
            self._rest = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
            if piece:
                return piece

    def _begin_member(self) -> None:
        self._members += 1
        if self._members > MOST_MEMBERS:
            raise zlib.error(f"more than {MOST_MEMBERS} members")
        self._member = zlib.decompressobj(GZIP)


class _Zstd:
    """Decode zstd frames one after the other."""

    def __init__(self, body: bytes) -> None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW_BYTES)
        self._reader = decompressor.stream_reader(body, read_across_frames=True)
        self._missing = max(0, zstandard.frame_content_size(body))  # 0: the first frame does not tell

    def read(self, most_bytes: int) -> bytes:
        piece = self._reader.read(most_bytes)
        self._missing -= len(piece)
        if not piece and self._missing > 0:
            raise zstandard.ZstdError("the body ends too early")
        return piece


_DECODERS: dict[str, Callable[[bytes], _Decoder]] = {"gzip": _Gzip, "x-gzip": _Gzip, "zstd": _Zstd}


async def decode_body(body: bytes, coding: str, most_bytes: int, received: ReceivedBytes) -> bytes:
    """Return a body without its content coding; `received` counts the decoded bytes from then on.

    Raises Refusal: 415 for a coding that is not supported, 400 for bytes that are not of it, 413 when
    it decodes to more than `most_bytes`, 429 when there is no room for it.
    """
    coding = coding.strip().lower()
    if coding in ("", "identity") or not body:
        return body
    kind = _DECODERS.get(coding)
    if kind is None:
        message = f"The content coding {coding[:40]!r} is not supported: use gzip, zstd or identity."
        raise Refusal(415, "content_encoding", message, param="content-encoding")
    try:
        decoded = await _decode(kind(body), len(body), most_bytes, received)
    except (zlib.error, zstandard.ZstdError) as error:
        message = f"The body is not {coding}: {error}."
        raise bad_request(message, code="content_encoding", param="content-encoding") from None
    received.release()
    received.add(len(decoded))
    return decoded


async def _decode(decoder: _Decoder, size: int, most_bytes: int, received: ReceivedBytes) -> bytes:
    """Decode to the end. Each piece is counted before the next is made."""
    decoded = bytearray()
    while True:
        if size <= INLINE_BYTES and len(decoded) < INLINE_BYTES:
            piece = decoder.read(INLINE_BYTES)
        else:
            piece = await asyncio.to_thread(decoder.read, STEP_BYTES)
        if not piece:
            return bytes(decoded)
        if len(decoded) + len(piece) > most_bytes:
            raise Refusal(413, "body_too_large", f"The decoded body is larger than {most_bytes} bytes.")
        received.add(len(piece))
        decoded += piece
