"""Where a request ends: RFC 9112 §6, §7 and §11.2, on the reader alone."""

import httptools
import pytest

from headway.front.errors import Refusal
from headway.front.framing import SLICE_BYTES, RequestReader

HEAD = b"POST /a HTTP/1.1\r\nHost: here\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: here\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"


class Seen:
    """What a reader has read: (method, target, body, complete) of each request."""

    def __init__(self):
        self.requests = []
        self.heads = []
        self.full = False

    def on_head_begins(self):
        pass

    def on_head(self, method, target, fields, keep_alive, old, upgrades):
        self.heads.append((target, fields, upgrades))
        self.requests.append([method, target.text, b"", False])

    def on_piece(self, piece):
        self.requests[-1][2] += piece

    def on_end(self):
        self.requests[-1][3] = True

    def is_full(self):
        return self.full


def read(data, step=None):
    """Read bytes, `step` at a time; return what was seen and the refusal, if there was one."""
    seen = Seen()
    reader = RequestReader(seen)
    try:
        for start in range(0, len(data), step or len(data)):
            rest = data[start : start + (step or len(data))]
            while rest:
                rest = reader.feed(rest)
    except Refusal as refusal:
        return seen, refusal
    finally:
        reader.close()
    return seen, None


def requests(data, step=None):
    seen, refusal = read(data, step)
    assert refusal is None, refusal
    assert all(complete for *_, complete in seen.requests)
    return [tuple(request[:3]) for request in seen.requests]


OFFERS = [
    b"Connection: Upgrade\r\nUpgrade: x\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAA\r\n",
    b"Connection: keep-alive, upgrade\r\nUpgrade: websocket\r\n",
    b"Proxy-Connection: upgrade\r\nUpgrade: x\r\n",
    b"Upgrade: h2c\r\n",
]


@pytest.mark.parametrize("step", [None, 1, 7])
@pytest.mark.parametrize("offer", OFFERS)
def test_a_body_behind_an_offer_of_another_protocol_is_a_body(offer, step):
    """Read as the next request, it would be one that a proxy before us has not seen."""
    inner = b"POST /add_worker HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    by_length = HEAD + offer + b"Content-Length: %d\r\n\r\n" % len(inner) + inner
    in_chunks = HEAD + offer + CHUNKED + b"\r\n%x\r\n" % len(inner) + inner + b"\r\n0\r\n\r\n"
    bare = b"GET /b HTTP/1.1\r\nHost: here\r\n" + offer + b"\r\n"
    expected = [("POST", "/a", inner), ("POST", "/a", inner), ("GET", "/b", b""), ("GET", "/next", b"")]
    assert requests(by_length + in_chunks + bare + NEXT, step) == expected


def test_an_offer_is_told_to_the_one_who_answers():
    seen, _ = read(
        b"GET / HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + NEXT
    )
    assert [upgrades for _, _, upgrades in seen.heads] == [True, False]


def test_nothing_is_read_behind_a_request_that_closes_the_connection():
    for close in (b"Connection: close\r\n", b"Connection: close, Upgrade\r\nUpgrade: x\r\n"):
        data = HEAD + close + b"Content-Length: 2\r\n\r\nhi"
        assert requests(data + NEXT) == requests(data + NEXT, 1) == [("POST", "/a", b"hi")]
    assert requests(b"GET /old HTTP/1.0\r\n\r\n" + NEXT) == [("GET", "/old", b"")]


REFUSED = {
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    "two Hosts in one": (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    "a Host that is a path": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "HTTP/0.9 without a version": (b"GET /\r\n\r\n", 505),
    "HTTP/0.9": (b"GET / HTTP/0.9\r\n\r\n", 505),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a version that is none": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 400),
    "CONNECT": (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 400),
    "CONNECT with a path": (b"CONNECT /a HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", 405),
    "TRACE": (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "a coding beside chunked": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "a coding after chunked": (HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n", 400),
    "a coding without chunked": (HEAD + b"Transfer-Encoding: identity\r\n\r\n", 501),
    "a coding like chunked": (HEAD + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
    "chunked twice": (HEAD + CHUNKED + CHUNKED + b"\r\n", 400),
    "chunked on HTTP/1.0": (b"POST / HTTP/1.0\r\n" + CHUNKED + b"\r\n0\r\n\r\n", 400),
    "chunked and a length": (HEAD + CHUNKED + b"Content-Length: 2\r\n\r\n0\r\n\r\n", 400),
    "a length and chunked": (HEAD + b"Content-Length: 2\r\n" + CHUNKED + b"\r\n0\r\n\r\n", 400),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi", 400),
    "one length twice": (HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 400),
    "a list of lengths": (HEAD + b"Content-Length: 2, 2\r\n\r\nhi", 400),
    "a signed length": (HEAD + b"Content-Length: +2\r\n\r\nhi", 400),
    "no length": (HEAD + b"Content-Length:\r\n\r\nhi", 400),
    "a length beyond 64 bits": (HEAD + b"Content-Length: 18446744073709551618\r\n\r\nhi", 400),
    "a folded header": (HEAD + b"X: a\r\n b\r\n\r\n", 400),
    "a folded coding": (HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n", 400),
    "a bare LF after the request line": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    "a bare LF in the head": (HEAD + b"X: a\nY: b\r\n\r\n", 400),
    "a bare CR in the head": (HEAD + b"X: a\rY: b\r\n\r\n", 400),
    "a NUL in the head": (HEAD + b"X: a\0b\r\n\r\n", 400),
    "white space before a colon": (HEAD + b"Content-Length : 2\r\n\r\nhi", 400),
    "a header without a name": (HEAD + b": a\r\n\r\n", 400),
    "a line without a colon": (HEAD + b"X\r\n\r\n", 400),
    "white space before the first header": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "a chunk size in C's words": (HEAD + CHUNKED + b"\r\n0x2\r\nhi\r\n0\r\n\r\n", 400),
    "a chunk size beyond 64 bits": (HEAD + CHUNKED + b"\r\n10000000000000002\r\nhi\r\n", 400),
    "a bare LF after a chunk size": (HEAD + CHUNKED + b"\r\n2\nhi\r\n0\r\n\r\n", 400),
    "white space after a chunk size": (HEAD + CHUNKED + b"\r\n2 \r\nhi\r\n0\r\n\r\n", 400),
    "a chunk longer than its size": (HEAD + CHUNKED + b"\r\n2\r\nhi!\r\n0\r\n\r\n", 400),
    "a length in a trailer": (HEAD + CHUNKED + b"\r\n0\r\nContent-Length: 5\r\n\r\n", 400),
    "a target with a fragment": (b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a target of another scheme": (b"GET ftp://a/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a target with a user": (b"GET http://u@a/b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a target with a space": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "a method in lower case": (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
}


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize("name", REFUSED)
def test_what_others_may_read_differently_is_refused_with_all_behind_it(name, step):
    data, status = REFUSED[name]
    seen, refusal = read(data + NEXT, step)
    assert refusal is not None and refusal.status == status
    assert not any(complete for *_, complete in seen.requests)


def test_the_targets_authority_takes_the_place_of_the_host_header():
    seen, _ = read(b"GET http://there:81/a?b HTTP/1.1\r\nHost: here\r\n\r\n")
    assert (seen.heads[0][1]["host"], seen.heads[0][0].text) == ("there:81", "/a?b")
    seen, _ = read(b"GET http://[::1]/ HTTP/1.1\r\nHost: here\r\n\r\n")
    assert seen.heads[0][1]["host"] == "[::1]"


def test_chunk_extensions_are_skipped_and_bounded():
    chunk = b"2;name=value\r\nhi\r\n"
    assert requests(HEAD + CHUNKED + b"\r\n" + chunk * 100 + b"0\r\n\r\n")[0][2] == b"hi" * 100
    for step in (None, 4096):
        _, refusal = read(HEAD + CHUNKED + b"\r\n2;" + b"x" * 200_000, step)
        assert refusal.status == 400
    _, refusal = read(HEAD + CHUNKED + b"\r\n" + (b"2;" + b"x" * 1000 + b"\r\nhi\r\n") * 200)
    assert refusal.status == 400


def test_one_turn_of_the_loop_parses_few_small_requests_and_chunks_and_leaves_the_rest():
    data = NEXT * 20_000
    seen = Seen()
    reader = RequestReader(seen)
    rest = reader.feed(data)
    assert len(data) - len(rest) <= 2 * SLICE_BYTES
    seen.full = True
    assert len(rest) - len(reader.feed(rest)) == SLICE_BYTES
    reader.close()
    chunks = HEAD + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 20_000
    reader = RequestReader(Seen())
    assert len(chunks) - len(reader.feed(chunks)) <= 2 * SLICE_BYTES
    reader.close()


def test_a_large_body_by_its_length_is_parsed_in_one_turn():
    seen = Seen()
    reader = RequestReader(seen)
    assert reader.feed(HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000 + NEXT) == b""
    assert [len(body) for _, _, body, _ in seen.requests] == [1_000_000, 0]
    reader.close()


def test_the_parser_is_as_strict_as_these_rules_need():
    """Older llhttp took bare line feeds, folded headers and white space after chunk sizes."""
    assert tuple(map(int, httptools.__version__.split(".")[:2])) >= (0, 9)
