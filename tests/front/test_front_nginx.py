"""The same bytes to nginx and to us are read as the same requests, or refused.

A request that a proxy in front reads in one way and we in another is one that it has not seen (request
smuggling). nginx passes what it reads on to a recorder; our reader gets the same bytes.
"""

import asyncio
import contextlib
import random
import shutil
import subprocess
from collections import defaultdict

import pytest
from framing_corpus import CORPUS, WORDS

from headway.front.errors import Refusal
from headway.front.framing import RequestReader

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
#: Behind each case: whoever takes it for a part of the case, or for no request, shows it.
SENTINEL = b"GET /sentinel HTTP/1.1\r\nHost: here\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
FUZZED, AT_ONCE, SEED = 50_000, 64, 0
#: nginx ends connections that do not go on after `HASTE`; what it has not read by then is not compared.
HASTE, PATIENCE = "50ms", "60s"

CONFIG = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  client_header_timeout {timeout}; client_body_timeout {timeout}; keepalive_timeout {timeout};
  lingering_close off;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{recorder}; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_set_header X-Client-Port $remote_port;
    }}
  }}
}}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


class Ours:
    """Takes what our reader reads."""

    def __init__(self):
        self.requests = []
        self.complete = 0

    def on_head_begins(self):
        pass

    def on_head(self, method, target, fields, keep_alive, old, upgrades):
        self.requests.append([method, target.text, b""])

    def on_piece(self, piece):
        self.requests[-1][2] += piece

    def on_end(self):
        self.complete += 1

    def is_full(self):
        return False


def read_by_us(data):
    ours = Ours()
    reader = RequestReader(ours)
    with contextlib.suppress(Refusal):
        while data:
            data = reader.feed(data)
    reader.close()
    return [tuple(request) for request in ours.requests[: ours.complete]]


class Recorder:
    """Keeps what nginx passes on, by the port of nginx's client."""

    def __init__(self):
        self.requests = defaultdict(list)

    async def serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                line, *lines = head.split("\r\n")
                fields = dict(each.lower().split(": ", 1) for each in lines if ": " in each)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                method, target, _ = line.split(" ")
                self.requests[int(fields["x-client-port"])].append((method, target, body))
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        writer.close()


async def read_by_nginx(port, recorder, data):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    own = writer.get_extra_info("sockname")[1]
    recorder.requests.pop(own, None)
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        await reader.read()  # nginx closes what does not go on
    writer.close()
    return recorder.requests.pop(own, [])


@contextlib.asynccontextmanager
async def nginx(folder, timeout):
    recorder = Recorder()
    server = await asyncio.start_server(recorder.serve, "127.0.0.1", 0)
    probe = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = probe.sockets[0].getsockname()[1]
    probe.close()
    await probe.wait_closed()
    config = folder / "nginx.conf"
    upstream = server.sockets[0].getsockname()[1]
    config.write_text(CONFIG.format(folder=folder, port=port, recorder=upstream, timeout=timeout))
    process = subprocess.Popen([NGINX, "-p", folder, "-c", config], stderr=subprocess.DEVNULL)
    try:
        async with asyncio.timeout(10.0):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    break
        yield port, recorder
    finally:
        process.terminate()
        process.wait()
        server.close()


def readings(folder, cases, timeout=HASTE):
    """Return each case with the requests that nginx reads in it, and those that we do."""
    found = []

    async def work(port, recorder, left):
        for case in left:
            found.append((case, await read_by_nginx(port, recorder, case), read_by_us(case)))

    async def check():
        async with nginx(folder, timeout) as (port, recorder):
            left = iter(cases)
            await asyncio.gather(*(work(port, recorder, left) for _ in range(AT_ONCE)))

    asyncio.run(check())
    return found


def differences(found):
    """Return the readings that differ in what both have read."""
    both = ((reading, min(len(reading[1]), len(reading[2]))) for reading in found)
    return [reading for reading, size in both if reading[1][:size] != reading[2][:size]]


def mutated(rng):
    """Return a case of the corpus, or several, with a few changes."""
    data = bytearray(rng.choice(CORPUS))
    if rng.random() < 0.2:
        data += rng.choice(CORPUS)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        match rng.randrange(5):
            case 0:
                data[at:at] = rng.choice(WORDS)
            case 1:
                word = rng.choice(WORDS)
                data[at : at + len(word)] = word
            case 2:
                del data[at : at + rng.randint(1, 8)]
            case 3:
                data[at:at] = data[at : at + rng.randint(1, 40)]
            case _:
                data[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(data)


def test_requests_that_we_read_to_the_last_are_read_by_nginx_too(tmp_path):
    """Without this the other tests could compare nothing with nothing."""
    cases = [case + LAST for case in CORPUS]
    whole = [case for case in cases if [path for _, path, _ in read_by_us(case)][-1:] == ["/last"]]
    assert len(whole) >= 20
    found = readings(tmp_path, whole, PATIENCE)
    read = [(theirs, ours) for _, theirs, ours in found if theirs]  # nginx passes no `OPTIONS *` on
    assert len(read) >= 20
    assert [(theirs, ours) for theirs, ours in read if theirs != ours] == []


def test_a_corpus_is_read_as_the_same_requests_or_refused(tmp_path):
    assert not differences(readings(tmp_path, [case + SENTINEL for case in CORPUS]))


def test_mutations_of_it_are_read_as_the_same_requests_or_refused(tmp_path):
    rng = random.Random(SEED)
    assert not differences(readings(tmp_path, (mutated(rng) + SENTINEL for _ in range(FUZZED))))
