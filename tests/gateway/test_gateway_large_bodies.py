"""What is put into a large body costs no copy of it, and engines get the same JSON."""

import json

import pytest
from standins import StandIn, chat, gateway, run

from headway.front.transport import pieces_of
from headway.hosts.gateway.dialects import contract
from headway.hosts.gateway.dialects.contract import override, splice


@pytest.mark.parametrize("size", [10, contract.MOST_COPIED_BYTES + 10])
@pytest.mark.parametrize("white", [b"", b" \n" * 1000])
def test_fields_go_in_at_either_end(size, white):
    body = white + b'{"a":1,"text":"' + b"}" * size + b'","b":2}' + white
    spliced = splice(splice(override(override(body, b'"a":3'), b'"b":4'), b'"c":5'), b'"d":{}')
    pieces = pieces_of(spliced)
    expected = {"a": 3, "text": "}" * size, "b": 4, "c": 5, "d": {}}
    assert json.loads(b"".join(pieces)) == expected
    if size > contract.MOST_COPIED_BYTES:
        assert any(isinstance(piece, memoryview) and piece.obj is body for piece in pieces)


def test_a_large_body_in_pieces_reaches_the_engine_whole(monkeypatch):
    monkeypatch.setattr(contract, "MOST_COPIED_BYTES", 10_000)

    async def check():
        async with (
            StandIn() as engine,
            gateway([engine], instance={"dialect": "sglang", "ranks": 2}) as (
                _,
                client,
            ),
        ):
            text = "word " * 100_000
            status, _, _ = await chat(client, {"model": "tiny", "prompt": text}, path="/v1/completions")
            (_, _, body) = engine.requests[0]
            assert status == 200 and body["prompt"] == text and body["routed_dp_rank"] in (0, 1)

    run(check())
