"""Compressed bodies: engines get the plain body; their own compressed answers stay as they are."""

import gzip

import orjson
import pytest
import zstandard
from aiohttp import web
from standins import ANSWER, CHAT, StandIn, error_of, gateway, run

BODY = orjson.dumps(CHAT)


def compress(coding):
    return gzip.compress(BODY) if coding == "gzip" else zstandard.ZstdCompressor().compress(BODY)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
@pytest.mark.parametrize("coding", ["gzip", "zstd", "identity"])
def test_an_engine_gets_the_plain_body(coding, path):
    async def check():
        async with StandIn() as engine, gateway([engine]) as (_, client):
            data = BODY if coding == "identity" else compress(coding)
            async with client.post(path, data=data, headers={"Content-Encoding": coding}) as answer:
                assert answer.status == 200
            assert engine.bodies == [BODY]
            assert "Content-Encoding" not in engine.requests[0][1]

    run(check())


def test_other_codings_are_a_415_and_a_bomb_a_413():
    async def check():
        async with StandIn() as engine, gateway([engine], limits={"max_body_bytes": 10_000}) as (_, client):
            for coding, data, status in (("br", BODY, 415), ("gzip", gzip.compress(bytes(1 << 24)), 413)):
                for path in ("/v1/chat/completions", "/v1/embeddings"):
                    async with client.post(path, data=data, headers={"Content-Encoding": coding}) as answer:
                        assert answer.status == status
                        code = error_of(await answer.read())
                        assert code == {415: "content_encoding", 413: "body_too_large"}[status]
            assert not engine.requests

    run(check())


class Compressing(StandIn):
    """Answers in gzip, whatever the client accepts."""

    async def _generate(self, request):
        await request.read()
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        return web.Response(body=gzip.compress(orjson.dumps(ANSWER)), headers=headers)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
def test_a_compressed_answer_keeps_the_header_that_says_so(path):
    async def check():
        async with (
            Compressing() as engine,
            gateway([engine]) as (_, client),
            client.post(path, json=CHAT) as answer,
        ):
            assert answer.headers["Content-Encoding"] == "gzip"
            assert await answer.json() == ANSWER  # the client decodes it

    run(check())
