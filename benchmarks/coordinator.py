"""Takes a completion through its two phases, as llm-d's coordinator does: prefill, then decode with its KV.

    client ─▶ coordinator ─▶ Envoy (EPP-Profile: prefill) ─▶ a prefill engine
                          ─▶ Envoy (EPP-Profile: decode)  ─▶ a decode engine, whose answer is the client's

Both carry one x-request-id. It decides nothing: who picks is behind Envoy.
"""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import orjson
from aiohttp import web

_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@asynccontextmanager
async def coordinator(front_url: str, *, timeout_s: float) -> AsyncIterator[str]:
    """Serve while the context lasts; yields the URL."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(front_url, connector=connector, timeout=timeout) as session:
        handler = _Phases(session)
        runner = web.ServerRunner(web.Server(handler, handler_cancellation=True), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


class _Phases:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        request_id = uuid.uuid4().hex
        prefill = {key: value for key, value in body.items() if key != "stream_options"}
        prefill |= {"max_tokens": 1, "stream": False, "kv_transfer_params": _REMOTE_DECODE}
        async with self._ask(request.path, "prefill", request_id, prefill) as answer:
            said = await answer.read()
            if answer.status != 200:
                return web.Response(status=answer.status, body=said, content_type="application/json")
        decode = body | {"kv_transfer_params": orjson.loads(said).get("kv_transfer_params")}
        async with self._ask(request.path, "decode", request_id, decode) as answer:
            kind = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
            response = web.StreamResponse(status=answer.status, headers=kind)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            return response

    def _ask(
        self, path: str, phase: str, request_id: str, body: dict[str, object]
    ) -> "aiohttp.client._RequestContextManager":
        headers = {"Content-Type": "application/json", "EPP-Profile": phase, "x-request-id": request_id}
        return self._session.post(path, data=orjson.dumps(body), headers=headers)
