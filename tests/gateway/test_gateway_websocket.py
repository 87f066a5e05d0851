"""`/v1/realtime` is tunnelled to an engine; everywhere else an offer of another protocol changes nothing."""

import asyncio

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from standins import CHAT, StandIn, chat, error_of, gateway, run, until

HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


class Realtime(StandIn):
    """An engine with a WebSocket that echoes what it gets."""

    def __init__(self):
        super().__init__()
        self.handshakes = []
        self.sockets = []
        self.ends = []
        self.refuses = 0

    async def _handle(self, request):
        if request.path != "/v1/realtime":
            return await super()._handle(request)
        self.handshakes.append((request.path_qs, request.headers.copy()))
        if self.refuses:
            return web.Response(status=self.refuses)
        socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=1 << 26)
        await socket.prepare(request)
        self.sockets.append(socket)
        try:
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await socket.send_str(f"echo {message.data}")
                elif message.data == b"flood":
                    for _ in range(400):
                        await socket.send_bytes(bytes(100_000))
                else:
                    await socket.send_bytes(message.data)
        finally:
            self.ends.append(socket.close_code)
        return socket


def test_messages_go_both_ways_and_the_tunnel_counts_as_a_request_in_flight():
    async def check():
        async with Realtime() as engine, gateway([engine]) as (front, client):
            async with client.ws_connect("/v1/realtime?intent=a%20b", protocols=("realtime",)) as socket:
                assert socket.protocol == "realtime"
                for said in ("one", "two", "x" * 500_000):
                    await socket.send_str(said)
                    assert await socket.receive_str() == f"echo {said}"
                await socket.send_bytes(bytes(3_000_000))
                assert await socket.receive_bytes() == bytes(3_000_000)
                assert front.serving.buffer.in_flight == 1
                assert len(front.workers.get("engine-0").legs) == 1
            await until(lambda: engine.ends)
            assert engine.ends == [1000]
            await until(lambda: front.serving.buffer.in_flight == 0)
            assert engine.handshakes[0][0] == "/v1/realtime?intent=a%20b"
            assert not front.workers.get("engine-0").legs

    run(check())


def test_a_clients_credentials_and_what_steers_engines_do_not_reach_the_engine():
    headers = {"Cookie": "a=b", "x-api-key": "k", "X-data-parallel-rank": "3", "x-headway-dispatch": "1"}

    async def check():
        async with Realtime() as engine, gateway([engine]) as (front, client):
            async with client.ws_connect("/v1/realtime", headers=headers) as socket:
                await socket.send_str("hi")
                await socket.receive_str()
            seen = {name.lower() for name in engine.handshakes[0][1]}
            assert not seen & {name.lower() for name in headers}
            assert "x-request-id" in seen
            await until(lambda: front.serving.buffer.in_flight == 0)
            async with client.get("/v1/realtime?kv_transfer_params=1", headers=HANDSHAKE) as answer:
                assert (answer.status, error_of(await answer.read())) == (400, "invalid_request")
            assert len(engine.handshakes) == 1

    run(check())


@pytest.mark.parametrize(
    ("left_out", "more", "status", "code"),
    [
        ("Upgrade", {}, 426, "upgrade_required"),
        ("", {"Upgrade": "h2c"}, 426, "upgrade_required"),
        ("Sec-WebSocket-Key", {}, 400, "invalid_request"),
        ("", {"Sec-WebSocket-Key": "short"}, 400, "invalid_request"),
        ("", {"Sec-WebSocket-Version": "8"}, 400, "invalid_request"),
        ("", {"Origin": "http://elsewhere"}, 403, "origin_not_allowed"),
    ],
)
def test_a_handshake_that_is_none_or_of_another_site_is_refused(left_out, more, status, code):
    async def check():
        async with Realtime() as engine, gateway([engine]) as (_, client):
            headers = {name: value for name, value in HANDSHAKE.items() if name != left_out} | more
            async with client.get("/v1/realtime", headers=headers) as answer:
                assert (answer.status, error_of(await answer.read())) == (status, code)
                assert ("Upgrade" in answer.headers) == (status == 426)
            assert not engine.handshakes

    run(check())


def test_an_origin_that_cors_allows_may(monkeypatch):
    monkeypatch.setenv("KEYS", "one")
    tables = {"cors": {"allowed_origins": ["http://here"]}, "auth": {"api_keys_env": "KEYS"}}

    async def check():
        async with Realtime() as engine, gateway([engine], **tables) as (front, client):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await client.ws_connect("/v1/realtime", origin="http://here")
            assert refused.value.status == 401 and not engine.handshakes
            key = {"Authorization": "Bearer one"}
            async with client.ws_connect("/v1/realtime", origin="http://here", headers=key) as socket:
                await socket.send_str("hi")
                assert await socket.receive_str() == "echo hi"
            assert "Authorization" not in engine.handshakes[0][1]
            await until(lambda: front.serving.buffer.in_flight == 0)

    run(check())


@pytest.mark.parametrize(("refuses", "status"), [(403, 403), (404, 404), (500, 502), (503, 503)])
def test_an_engines_refusal_is_the_clients(refuses, status):
    async def check():
        async with Realtime() as engine, gateway([engine]) as (front, client):
            engine.refuses = refuses
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await client.ws_connect("/v1/realtime")
            assert refused.value.status == status
            assert front.serving.buffer.in_flight == 0

    run(check())


def test_a_tunnel_ends_with_the_engine_and_when_the_gateway_drains():
    async def check():
        async with Realtime() as engine, gateway([engine]) as (front, client):
            socket = await client.ws_connect("/v1/realtime")
            await until(lambda: engine.sockets)
            await engine.sockets[0].close(code=1001)
            assert (await socket.receive()).type is WSMsgType.CLOSE
            await socket.close()
            await until(lambda: front.serving.buffer.in_flight == 0)
            socket = await client.ws_connect("/v1/realtime")
            await until(lambda: len(engine.sockets) == 2)
            assert await front.drain()
            assert (await socket.receive()).type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR)
            await socket.close()

    run(check())


def test_a_tunnel_ends_when_nothing_moves():
    async def check():
        limits = {"idle_timeout_s": 0.05}
        async with Realtime() as engine, gateway([engine], limits=limits) as (front, client):
            socket = await client.ws_connect("/v1/realtime")
            await socket.send_str("hi")
            assert await socket.receive_str() == "echo hi"
            assert (await socket.receive()).type in (WSMsgType.CLOSED, WSMsgType.CLOSING, WSMsgType.CLOSE)
            await until(lambda: front.serving.buffer.in_flight == 0)

    run(check())


def test_a_client_that_does_not_read_holds_up_the_engine():
    async def check():
        async with Realtime() as engine, gateway([engine]) as (front, client):
            host, _, port = front.url.removeprefix("http://").partition(":")
            reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
            head = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items())
            writer.write(f"GET /v1/realtime HTTP/1.1\r\nHost: here\r\n{head}\r\n".encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            writer.write(b"\x82\x85\0\0\0\0flood")  # a masked binary frame; the answer is 40 MB
            (connection,) = front._listeners[0].connections
            await until(lambda: connection._writable is not None)
            assert connection._transport.get_write_buffer_size() < 1 << 20
            writer.transport.abort()
            await until(lambda: front.serving.buffer.in_flight == 0)
            assert (await chat(client))[0] == 200

    run(check())


def test_elsewhere_an_offer_of_a_websocket_is_ignored():
    async def check():
        async with Realtime() as engine, gateway([engine]) as (_, client):
            async with client.post("/v1/chat/completions", json=CHAT, headers=HANDSHAKE) as answer:
                assert answer.status == 200
            async with client.get("/v1/models", headers=HANDSHAKE) as answer:
                assert answer.status == 200
            assert "Upgrade" not in engine.requests[0][1]

    run(check())
