"""Decides how a Kubernetes API server is asked: lists, watches as long lines of JSON, and single objects.

Rule 1. Token and CA are read for every request: the kubelet rotates the one, operators the other, and
        requests are few.
Rule 2. A watch is asked to end after `WATCH_S`, and given up when it is silent for longer: a connection that
        died without a word leaves us behind for no longer than that.
Rule 3. What comes back is bounded, as from any peer.
"""

import asyncio
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from headway.core.errors import ConfigError, EngineError

__all__ = ["Api", "ApiError", "own_namespace"]

#: Where a pod finds what it needs to speak for its service account.
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

#: A watch ends after so long and begins anew where it was.
WATCH_S = 60.0
#: Silent for this long beyond its end, it is dead.
PATIENCE_S = 15.0
CONNECT_S = 5.0
ANSWER_S = 30.0

MOST_LINE_BYTES = 8 << 20
MOST_LIST_BYTES = 256 << 20


class ApiError(EngineError):
    """The API server said no, or nothing. `status`: of HTTP; 0 when there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Status(msgspec.Struct):
    """The API's own error."""

    message: str = ""
    code: int = 0


def own_namespace() -> str:
    """Return the namespace of the pod this is, "default" outside of one."""
    if text := os.environ.get("NAMESPACE"):
        return text
    with suppress(OSError):
        return (ACCOUNT / "namespace").read_text(encoding="ascii").strip() or "default"
    return "default"


class Api:
    """One API server. An async context manager.

    `server`: its URL; None: the cluster's this pod runs in. Raises ConfigError, with the `table` that should
    say, when there is none.
    """

    def __init__(
        self, server: str | None, *, token_file: Path | None, ca_file: Path | None, table: str = "discovery"
    ) -> None:
        inside = server is None
        self._server = _in_cluster(table) if server is None else server
        self._token_file = token_file or (ACCOUNT / "token" if inside else None)
        self._ca_file = ca_file or (ACCOUNT / "ca.crt" if inside else None)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def list(self, path: str, params: Mapping[str, str]) -> bytes:
        """Return what a list answers. Raises ApiError."""
        async with self._ask(path, params, silence_s=ANSWER_S) as answer:
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > MOST_LIST_BYTES:
                    raise ApiError(200, f"the list is larger than {MOST_LIST_BYTES} bytes")
            return bytes(body)

    async def send(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Read or write one object; return what is answered. Raises ApiError."""
        async with self._ask(path, {}, silence_s=ANSWER_S, method=method, body=body) as answer:
            return await answer.read()

    async def watch(self, path: str, params: Mapping[str, str], version: str) -> AsyncGenerator[bytes, None]:
        """Yield an empty line when it has begun, then the events after a version, a line of JSON each, until
        the server ends it. Raises ApiError.
        """
        watching = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": f"{WATCH_S:.0f}",
        }
        async with self._ask(path, {**params, **watching}, silence_s=WATCH_S + PATIENCE_S) as answer:
            yield b""
            rest = bytearray()
            async for piece in answer.content.iter_any():
                rest += piece
                *lines, tail = rest.split(b"\n")
                for line in lines:
                    if line.strip():
                        yield bytes(line)
                rest = bytearray(tail)
                if len(rest) > MOST_LINE_BYTES:
                    raise ApiError(200, f"an event is larger than {MOST_LINE_BYTES} bytes")

    @asynccontextmanager
    async def _ask(
        self,
        path: str,
        params: Mapping[str, str],
        *,
        silence_s: float,
        method: str = "GET",
        body: bytes | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence_s)
        try:
            async with self._session.request(
                method,
                self._server + path,
                params=params,
                data=body,
                headers=self._headers() | ({} if body is None else {"Content-Type": "application/json"}),
                ssl=self._tls(),
                timeout=timeout,
                allow_redirects=False,
            ) as answer:
                if answer.status not in (200, 201):
                    raise ApiError(answer.status, await _complaint(answer))
                yield answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiError(0, f"{type(error).__name__}: {error}".rstrip(": ")) from None

    def _headers(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        return {"Authorization": f"Bearer {self._token_file.read_text(encoding='ascii').strip()}"}

    def _tls(self) -> ssl.SSLContext | bool:
        """Return how the server proves itself; True is as the system would have it."""
        if self._ca_file is None or not self._server.startswith("https:"):
            return True
        return ssl.create_default_context(cafile=self._ca_file)


def _in_cluster(table: str) -> str:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise ConfigError(
            f"{table}.api_server: missing, and this is no pod: KUBERNETES_SERVICE_HOST is not set"
        )
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"


async def _complaint(answer: aiohttp.ClientResponse) -> str:
    """Return what is wrong in the server's words, else its status."""
    said = ""
    with suppress(msgspec.MsgspecError, asyncio.IncompleteReadError):
        said = msgspec.json.decode(await answer.content.read(64 << 10), type=_Status).message
    return f"{answer.status} {said or answer.reason or ''}".strip()
