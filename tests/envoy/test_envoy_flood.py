"""One client's upload in tiny frames costs other clients nothing: Envoy counts frames per connection."""

import asyncio
import struct

from envoys import front, run

FRAMES = 12_000  # Envoy's own limit is 10,000 frames that wait for a connection
HEADERS, DATA, SETTINGS = 1, 0, 4
END_STREAM, END_HEADERS = 1, 4


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    """Return a header as HPACK has it without an index."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def upload_in_single_bytes(body):
    """Return an HTTP/2 connection's bytes: one POST, its body in DATA frames of one byte."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/v1/chat/completions",
        ":authority": "a",
        "content-type": "application/json",
    }
    block = b"".join(literal(name, value) for name, value in headers.items())
    frames = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        frame(SETTINGS, 0, 0),
        frame(HEADERS, END_HEADERS, 1, block),
    ]
    frames += [frame(DATA, 0, 1, body[at : at + 1]) for at in range(len(body) - 1)]
    return b"".join([*frames, frame(DATA, END_STREAM, 1, body[-1:])])


async def half_uploaded(front, go):
    """Send half a request, and the rest when told; return the status line."""
    host, port = front.envoy.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "%s"}]}' % (b"x" * 2000)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    writer.write(head + body[:1000])
    await writer.drain()
    await go.wait()
    writer.write(body[1000:])
    line = await reader.readline()
    writer.transport.abort()
    return line.decode().strip()


def test_ten_thousand_frames_of_one_byte_cut_no_other_client_off():
    async def test():
        async with front(name="original-dst") as f:
            go = asyncio.Event()
            others = [asyncio.create_task(half_uploaded(f, go)) for _ in range(10)]
            while f.picker.processor.open < 10:
                await asyncio.sleep(0.01)
            host, port = f.envoy.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            chat = b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "padding": "%s"}'
            writer.write(upload_in_single_bytes(chat % (b"x" * FRAMES)))
            answered = b""
            while b"choices" not in answered:
                piece = await reader.read(65536)
                assert piece, answered
                answered += piece
            go.set()
            assert [await other for other in others] == ["HTTP/1.1 200 OK"] * 10
            numbers = await f.envoy.numbers()
            assert numbers["cluster.picker.http2.outbound_flood"] == 0
            writer.transport.abort()

    run(test())
