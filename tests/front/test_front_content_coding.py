"""Compressed request bodies: decoded within bounds, whatever they become."""

import asyncio
import gzip
import tracemalloc
import zlib

import pytest
import zstandard

from headway.front.buffer import ByteBudget, ReceivedBytes
from headway.front.content_coding import MOST_MEMBERS, decode_body
from headway.front.errors import Refusal

TEXT = b'{"prompt": "' + b"hello, world! " * 20_000 + b'"}'
MOST = 1 << 20


def compress(coding, data):
    return gzip.compress(data) if "gzip" in coding else zstandard.ZstdCompressor().compress(data)


def decode(body, coding, most_bytes=MOST, budget_bytes=1 << 30):
    budget = ByteBudget(budget_bytes)
    received = ReceivedBytes(budget)
    received.add(len(body))

    async def check():
        return await decode_body(body, coding, most_bytes, received)

    try:
        decoded = asyncio.run(check())
        assert budget.used == received.size == len(decoded)
    finally:
        received.release()
    assert budget.used == 0
    return decoded


def refusal_of(*args, **more):
    with pytest.raises(Refusal) as caught:
        decode(*args, **more)
    return caught.value.status, caught.value.code


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP ", "zstd"])
@pytest.mark.parametrize("data", [b"", b"hi", TEXT])
def test_a_body_is_decoded(coding, data):
    assert decode(compress(coding.lower(), data), coding) == data


def test_identity_is_the_body_itself_and_no_body_has_no_coding():
    assert decode(b"hi", "identity") == b"hi"
    assert decode(b"", "gzip") == b""


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_members_and_frames_one_after_the_other_are_one_body(coding):
    assert (
        decode(compress(coding, b"one, ") + compress(coding, b"") + compress(coding, b"two"), coding)
        == b"one, two"
    )


@pytest.mark.parametrize("coding", ["br", "deflate", "gzip, zstd", "compress", "x" * 100])
def test_other_codings_are_refused(coding):
    assert refusal_of(b"x", coding) == (415, "content_encoding")


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_what_is_not_of_its_coding_or_ends_too_early_is_refused(coding):
    whole = compress(coding, TEXT)
    for body in (b"nonsense", TEXT, whole[: len(whole) // 2], whole[:-1], whole[:3], whole + b"nonsense"):
        assert refusal_of(body, coding) == (400, "content_encoding"), body[:20]


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_a_bomb_is_refused_when_it_passes_the_bound_and_takes_no_more_memory_than_it(coding):
    bomb = compress(coding, bytes(100 << 20))
    tracemalloc.start()
    try:
        assert refusal_of(bomb, coding) == (413, "body_too_large")
        assert tracemalloc.get_traced_memory()[1] < 8 * MOST
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
def test_every_decoded_byte_counts_against_the_budget(coding):
    assert refusal_of(compress(coding, TEXT), coding, budget_bytes=100_000) == (429, "buffer_bytes")


def test_a_body_of_empty_members_is_refused():
    assert refusal_of(gzip.compress(b"") * (MOST_MEMBERS + 1), "gzip") == (400, "content_encoding")


def test_a_zstd_frame_with_a_window_larger_than_8_mib_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    assert refusal_of(compressor.compress(bytes(20 << 20)), "zstd") == (400, "content_encoding")


def test_raw_deflate_is_not_gzip():
    assert refusal_of(zlib.compress(TEXT), "gzip") == (400, "content_encoding")
