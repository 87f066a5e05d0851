"""Bodies that take long are read in other processes, which are bounded, supervised and ended."""

import asyncio
import json
import weakref

import pytest
from standins import run

from headway.core.errors import ConfigError
from headway.front import body_reader
from headway.front.body_reader import BodyReader
from headway.front.errors import Refusal
from headway.front.requests import read_call

CHAT = "/v1/chat/completions"
LARGE = json.dumps({"model": "m", "messages": [{"role": "user", "content": "word " * 40_000}]}).encode()


def reading(check):
    async def run_it():
        reader = BodyReader(processes=2)
        try:
            await check(reader)
        finally:
            await reader.close()

    run(run_it())


def processes(reader):
    return [process._process.pid for process in reader._idle]


def test_a_large_body_is_read_elsewhere_as_it_would_be_here():
    async def check(reader):
        call = await reader.read(CHAT, LARGE)
        assert call == read_call(CHAT, LARGE) and call.body is LARGE and len(call.prefix) > 100
        assert len(processes(reader)) == 1
        pieces = [LARGE[at : at + 1000] for at in range(0, len(LARGE), 1000)]
        in_pieces = await reader.read(CHAT, pieces)
        assert in_pieces.body == b"" and in_pieces.prefix == call.prefix
        assert (await reader.read(CHAT, LARGE, prefixes=False)).prefix == ()
        assert len(processes(reader)) == 1

    reading(check)


def test_a_small_body_is_read_at_once_unless_it_has_many_objects_or_strings():
    async def check(reader):
        await reader.read(CHAT, b'{"messages":[{"role":"user","content":"hi"}]}')
        assert not processes(reader)
        await reader.read(CHAT, b'{"messages":[' + b'{"role":"u"},' * 600 + b'{"role":"u"}]}')
        assert len(processes(reader)) == 1

    reading(check)


def test_what_is_refused_elsewhere_is_refused_as_here():
    async def check(reader):
        body = LARGE[:-1] + b',"stream":"maybe"}'
        with pytest.raises(Refusal) as there:
            await reader.read(CHAT, body)
        with pytest.raises(Refusal) as here:
            read_call(CHAT, body)
        assert there.value.body() == here.value.body()
        with pytest.raises(Refusal, match="'bootstrap_room' is the gateway's"):
            await reader.check_passed_on([b" " * 70_000, b'{"bootstrap_room":1}'])
        with pytest.raises(Refusal, match="'bootstrap_room' is the gateway's"):
            await reader.read(CHAT, LARGE[:-1] + b',"bootstrap_room":1}')
        await reader.read(CHAT, LARGE[:-1] + b',"bootstrap_room":1}', steered=True)
        assert len(processes(reader)) == 1  # refusing costs no process

    reading(check)


def test_no_more_processes_than_allowed_and_one_of_them_is_not_for_large_bodies():
    async def check(reader):
        bodies = [LARGE[:-1] + b" " * body_reader.LARGE_BYTES + b"}"] * 4 + [LARGE] * 4
        calls = await asyncio.gather(*(reader.read(CHAT, body) for body in bodies))
        assert {call.text_bytes for call in calls} == {200_000}
        assert len(processes(reader)) == 2

    reading(check)


def test_a_process_that_is_killed_is_started_again():
    async def check(reader):
        await reader.read(CHAT, LARGE)
        (process,) = reader._idle
        process._process.kill()
        while not process.lost:
            await asyncio.sleep(0.005)
        assert (await reader.read(CHAT, LARGE)).text_bytes == 200_000
        assert processes(reader) != [process._process.pid]

    reading(check)


def test_one_that_is_killed_while_it_reads_fails_that_request_alone():
    async def check(reader):
        await reader.read(CHAT, LARGE)
        (process,) = reader._idle
        asking = asyncio.create_task(reader.read(CHAT, LARGE))
        while reader._idle:
            await asyncio.sleep(0)
        process._transport.abort()
        with pytest.raises(Refusal) as refusal:
            await asking
        assert (refusal.value.status, refusal.value.code) == (503, "body_reader_failed")
        assert (await reader.read(CHAT, LARGE)).text_bytes == 200_000

    reading(check)


def test_a_body_that_takes_too_long_is_refused_and_its_process_ended(monkeypatch):
    async def check(reader):
        await reader.read(CHAT, LARGE)
        before = processes(reader)
        monkeypatch.setattr(body_reader, "MOST_S", 0.0)
        with pytest.raises(Refusal) as refusal:
            await reader.read(CHAT, LARGE)
        assert (refusal.value.status, refusal.value.code) == (413, "body_too_complex")
        monkeypatch.setattr(body_reader, "MOST_S", 30.0)
        await reader.read(CHAT, LARGE)
        assert processes(reader) != before

    reading(check)


def test_a_client_that_goes_away_costs_no_process():
    async def check(reader):
        await reader.read(CHAT, LARGE)
        before = processes(reader)
        asking = asyncio.create_task(reader.read(CHAT, LARGE))
        while reader._idle:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        while not reader._idle:
            await asyncio.sleep(0.005)
        assert processes(reader) == before

    reading(check)


def test_a_tokenizer_counts_here_and_elsewhere(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    async def check():
        reader = BodyReader(tmp_path / "tokenizer.json")
        try:
            small = await reader.read(CHAT, b'{"messages":[{"role":"user","content":"word\\nword"}]}')
            assert (small.counted, small.truncates) == (2, False)
            assert (await reader.read(CHAT, LARGE)).counted == 40_000
        finally:
            await reader.close()

    run(check())
    with pytest.raises(ConfigError, match="cannot use"):
        BodyReader(tmp_path / "missing.json")


class Body(bytearray):
    """A body that can be watched."""


def test_a_client_that_goes_takes_a_body_that_waits_with_it(monkeypatch):
    async def check(reader):
        begun, never = asyncio.Event(), asyncio.Event()

        async def start(tokenizer):
            begun.set()
            await never.wait()

        monkeypatch.setattr(body_reader._Process, "start", start)
        huge = b'{"prompt":"' + b"x" * body_reader.LARGE_BYTES + b'"}'
        first = asyncio.create_task(reader.read("/v1/completions", huge))  # takes the one place there is
        await begun.wait()
        waiting = [Body(huge) for _ in range(3)]
        watched = [weakref.ref(body) for body in waiting]
        clients = [asyncio.create_task(reader.read("/v1/completions", body)) for body in waiting]
        await asyncio.sleep(0)
        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
        del client, clients, waiting  # whose exceptions refer to the bodies
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(body() is not None for body in watched)
        first.cancel()

    reading(check)
