"""Find where each request of a connection begins and ends (RFC 9112 §6, §7 and §11.2).

httptools' parser (llhttp, strict) reads the bytes. It leaves some rules to its user, and where a request
offers another protocol it stops at the head and takes the body for that protocol. The rules here:

Rule 1. The framing headers alone say where a body ends. `Upgrade` changes nothing about it.
Rule 2. What another server could read differently is refused, and nothing behind it is read: several or no
        Hosts, versions other than 1.0 and 1.1, codings other than `chunked`, CONNECT and TRACE.
Rule 3. The parser does a bounded amount of work in one turn of the event loop, and keeps a bounded amount.
"""

import re
from functools import lru_cache
from typing import NamedTuple, NoReturn, Protocol
from urllib.parse import unquote

import httptools

from headway.front.errors import Refusal

__all__ = ["Receiver", "RequestReader", "split_target"]

#: Bytes of one header field, and fields of one request; of all together with the request line.
MOST_FIELD_BYTES, MOST_FIELDS, MOST_HEAD_BYTES = 16_384, 100, 65_536
#: The parser gets so many bytes at a time.
SLICE_BYTES = 16_384
#: After so many heads and chunks the event loop gets its turn.
MOST_STEPS = 256
#: A chunk's size line and its line ends; what is longer counts as extension.
CHUNK_FRAME_BYTES = 16
#: A Host is a name or an address with a port; empty where the target has no authority.
_HOST = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
#: Names of headers in lower case, so many of them. A dict is faster than a cached function.
_LOWER: dict[bytes, str] = {}
MOST_NAMES = 256
_REFUSED_METHODS = ("CONNECT", "TRACE")


class Target(NamedTuple):
    """The target of a request: its path, decoded; its query; both as they came; its authority, if any."""

    path: str
    query: str
    text: str
    authority: str | None


class Receiver(Protocol):
    """Takes what a `RequestReader` reads. What these raise comes out of `RequestReader.feed`."""

    def on_head_begins(self) -> None:
        """Called at the first byte of a request."""

    def on_head(
        self, method: str, target: Target, fields: dict[str, str], keep_alive: bool, old: bool, upgrades: bool
    ) -> None:
        """Called when the head is complete and sound.

        Names of header `fields` are in lower case, values of equal names are joined. `old`: HTTP/1.0.
        `upgrades`: another protocol is offered.
        """

    def on_piece(self, piece: bytes) -> None:
        """Called with each piece of the body."""

    def on_end(self) -> None:
        """Called when the body is complete."""

    def is_full(self) -> bool:
        """Return whether no further request should be read yet."""


class RequestReader:
    """Read requests off one connection's bytes. `in_head`: a head has begun and is not complete.

    `close` it: the parser and its owner refer to each other.
    """

    def __init__(self, receiver: Receiver) -> None:
        self.in_head = False
        self._receiver = receiver
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._fields: dict[str, str] = {}
        self._repeated = self._head_bytes = 0
        self._in_trailer = self._mixed = False  # mixed: the last bytes held more than a part of one head
        self._is_last = False  # no request can follow
        self._chunked = False
        self._left = 0  # bytes of a body by its length
        self._chunks = self._frame_bytes = 0  # of the chunked body under way
        self._offers_upgrade = self._resumes = False
        self._steps = 0
        self._problem: Refusal | None = None

    def close(self) -> None:
        """Drop the parser, so that reference counting frees it and the connection."""
        del self._parser, self._receiver

    def feed(self, data: bytes) -> bytes:
        """Parse bytes; return those that are left for a later turn. Raises Refusal when they are no HTTP."""
        self._steps = 0
        if len(data) <= SLICE_BYTES:
            self._parse(data)
            return b""
        start = 0
        while start < len(data):
            if start and (self._steps > MOST_STEPS or self._receiver.is_full()):
                return data[start:]
            end = start + max(SLICE_BYTES, self._left)  # a body by its length is no work
            self._parse(data[start:end])
            start = end
        return b""

    def _parse(self, data: bytes) -> None:
        self._mixed = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._read_on()
            self._parse(data[offer.args[0] :])
            return
        except httptools.HttpParserError as error:
            if self._is_last:
                return  # bytes behind `Connection: close`
            problem, self._problem = self._problem, None
            raise problem or Refusal(400, "bad_http", f"Not an HTTP request: {error}.") from None
        self._measure(len(data))

    def _read_on(self) -> None:
        """Go on with the body of a request whose offer of another protocol is ignored (rule 1).

        The parser has given up its framing: a new one gets a head that frames the body in the same way.
        """
        fields = self._fields
        if "transfer-encoding" in fields:
            framing = "Transfer-Encoding: chunked"
        else:
            framing = f"Content-Length: {fields.get('content-length', '0').strip()}"
        keep = "" if not self._is_last else "Connection: close\r\n"
        self._parser = httptools.HttpRequestParser(self)
        self._resumes = True
        self._offers_upgrade = False
        self._parser.feed_data(f"POST / HTTP/1.1\r\nHost: x\r\n{keep}{framing}\r\n\r\n".encode("latin-1"))
        self._resumes = False

    def _measure(self, size: int) -> None:
        """Bound what the parser keeps of an unfinished field, and what a chunked body is wrapped in."""
        if (self.in_head or self._in_trailer) and not self._mixed:
            self._head_bytes += size
        if self._head_bytes > MOST_HEAD_BYTES:
            raise _head_too_large()
        if self._chunked:
            self._frame_bytes += size
            if self._frame_bytes > 2 * MOST_HEAD_BYTES + CHUNK_FRAME_BYTES * self._chunks:
                raise _bad("The chunk extensions are too large.")

    # What the parser calls

    def on_message_begin(self) -> None:
        """Expect a complete head, soon."""
        if self._resumes:
            return
        self.in_head = True
        self._url, self._fields = b"", {}
        self._repeated = self._head_bytes = 0
        self._steps += 1
        self._receiver.on_head_begins()

    def on_url(self, url: bytes) -> None:
        """Keep the target, or a piece of it."""
        if self._resumes:
            return
        self._url += url
        if len(self._url) > MOST_FIELD_BYTES:
            self._stop(_head_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; of equal ones, all. Trailers are read and not kept."""
        if not self.in_head:
            return
        fields = self._fields
        count = len(fields)
        if len(name) + len(value) > MOST_FIELD_BYTES or count + self._repeated >= MOST_FIELDS:
            self._stop(_head_too_large())
        key, text = _LOWER.get(name) or _lower(name), value.decode("latin-1")
        known = fields.setdefault(key, text)
        if len(fields) == count:
            self._repeated += 1
            if key == "host":
                self._stop(_bad("The request has several Host headers."))
            fields[key] = f"{known}, {text}"

    def on_headers_complete(self) -> None:
        """Check the head and hand it over."""
        if self._resumes:
            return
        self.in_head = False
        parser, fields = self._parser, self._fields
        version = parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._stop(Refusal(505, "bad_http", "HTTP/1.1 is spoken here."))
        try:
            target = split_target(self._url)
        except httptools.HttpParserInvalidURLError:
            self._stop(_bad("The request's target is no path."))
        method = parser.get_method().decode("latin-1")
        self._check(method, version)
        if target.authority is not None:
            fields["host"] = target.authority  # RFC 9112 §3.2.2: it takes the place of the header's
        keep_alive = parser.should_keep_alive()
        self._is_last = not keep_alive
        self._chunked = "transfer-encoding" in fields
        self._left = int(fields.get("content-length", 0))
        self._chunks = self._frame_bytes = 0
        self._offers_upgrade = "upgrade" in fields and parser.should_upgrade()
        self._receiver.on_head(method, target, fields, keep_alive, version == "1.0", self._offers_upgrade)

    def _check(self, method: str, version: str) -> None:
        """Refuse what others may read in another way (rule 2)."""
        fields = self._fields
        host = fields.get("host")
        if host is None:
            if version == "1.1":
                self._stop(_bad("The request has no Host header."))
        elif not _is_host(host):
            self._stop(_bad("The Host header is no host."))
        coding = fields.get("transfer-encoding")
        if coding is not None:
            if version == "1.0" or "content-length" in fields:
                self._stop(_bad("Transfer-Encoding goes with neither HTTP/1.0 nor Content-Length."))
            if coding.strip().lower() != "chunked":
                self._stop(Refusal(501, "bad_http", "The only transfer coding taken is chunked."))
        if method in _REFUSED_METHODS:
            self._stop(Refusal(405, "method_not_allowed", f"{method} is not served."))

    def on_chunk_header(self) -> None:
        """Expect a chunk, or after the last one a trailer."""
        self._in_trailer = self._mixed = True
        self._head_bytes = 0
        self._chunks += 1
        self._steps += 1

    def on_body(self, piece: bytes) -> None:
        """Hand a piece of the body over."""
        self._in_trailer = False
        size = len(piece)
        self._frame_bytes -= size
        self._left -= size
        self._receiver.on_piece(piece)

    def on_message_complete(self) -> None:
        """Hand over that the request is complete, unless its body is still to come (`_read_on`)."""
        if self._offers_upgrade:
            return
        self._in_trailer, self._mixed, self._chunked = False, True, False
        self._left = 0
        self._receiver.on_end()

    def _stop(self, problem: Refusal) -> NoReturn:
        """Stop parsing: what a callback raises ends `feed_data`."""
        self._problem = problem
        raise problem


@lru_cache(maxsize=256)
def _is_host(text: str) -> bool:
    return _HOST.fullmatch(text.strip()) is not None


@lru_cache(maxsize=256)
def split_target(url: bytes) -> Target:
    """Split a request's target. Raises HttpParserInvalidURLError."""
    parts = httptools.parse_url(url)
    authority = None
    if parts.schema is not None:
        if parts.schema.lower() not in (b"http", b"https") or parts.userinfo is not None or not parts.host:
            raise httptools.HttpParserInvalidURLError("no HTTP URL")
        host = parts.host.decode("latin-1")
        authority = f"[{host}]" if ":" in host else host
        authority += f":{parts.port}" if parts.port else ""
    if parts.fragment is not None:
        raise httptools.HttpParserInvalidURLError("a fragment in a target")
    path = (parts.path or b"/").decode("latin-1")
    query = "" if parts.query is None else parts.query.decode("latin-1")
    decoded = unquote(path) if "%" in path else path
    return Target(decoded, query, f"{path}?{query}" if query else path, authority)


def _lower(name: bytes) -> str:
    """Return a header's name in lower case."""
    text = name.decode("latin-1").lower()
    if len(_LOWER) < MOST_NAMES:
        _LOWER[name] = text
    return text


def _bad(message: str) -> Refusal:
    return Refusal(400, "bad_http", message)


def _head_too_large() -> Refusal:
    message = f"The headers are too large: {MOST_FIELDS} fields of {MOST_FIELD_BYTES} bytes, 64 KiB in all."
    return Refusal(431, "headers_too_large", message)
