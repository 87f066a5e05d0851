"""Takes targets and dispatch numbers in at vLLM's HTTP door: `--middleware headway.hosts.vllm.Middleware`.

vLLM offers this place for additions to its server, and it is where a request can still be refused: nonsense
is answered 400, in the shape of OpenAI's errors, and never reaches the engine. What is understood is said in
`amend.py`. So is refused what comes from a leader of the pool that another has followed
(`core/leadership.py`); each API server of vLLM knows only the tokens that it was shown itself.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from headway.core.errors import ConfigError
from headway.core.leadership import FENCE_HEADER, FENCED, Fence, read_token
from headway.hosts.vllm.amend import amend, from_headers

__all__ = ["Middleware"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Paths whose bodies know `vllm_xargs`.
_PATHS: Final = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
#: Longer bodies pass unread: this runs before vLLM has looked at any key.
_MOST_BYTES: Final = 64 << 20


class Middleware:
    """ASGI middleware."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._fence = Fence()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        raw = scope.get("headers", ())
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in raw}
        admitted = self._fence.admits(read_token(headers.get(FENCE_HEADER)))  # health checks show it, too
        generates = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith(_PATHS)
        if not generates:
            await self._app(scope, receive, send)
            return
        if not admitted:
            newest = (FENCE_HEADER.encode(), b"%d" % self._fence.newest)
            await _refuse(send, "another leader has placed work here since", FENCED, newest)
            return
        body, rest = await _read(receive)
        if rest is None:
            try:
                body = amend(body, from_headers(headers))
            except ConfigError as error:
                await _refuse(send, str(error))
                return
            scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        await self._app(scope, _replay(body, rest, receive), send)


async def _read(receive: Receive) -> tuple[bytes, MutableMapping[str, Any] | None]:
    """Return the body; and if it ended otherwise (it is too long, the client is gone), the message after
    it.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request" or size > _MOST_BYTES:
            return b"".join(parts), message
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if not message.get("more_body", False):
            return b"".join(parts), None


def _replay(body: bytes, rest: MutableMapping[str, Any] | None, receive: Receive) -> Receive:
    """Return a `receive` that tells the body, then `rest`, then goes on with the real one."""
    messages = [{"type": "http.request", "body": body, "more_body": rest is not None}]
    if rest is not None:
        messages.append(dict(rest))

    async def replayed() -> MutableMapping[str, Any]:
        return messages.pop(0) if messages else await receive()

    return replayed


def _with_length(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name not in (b"content-length", b"transfer-encoding")]
    return [*kept, (b"content-length", b"%d" % length)]


async def _refuse(send: Send, message: str, status: int = 400, *more: tuple[bytes, bytes]) -> None:
    kind = "BadRequestError" if status == 400 else "Conflict"
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
