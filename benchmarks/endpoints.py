"""Try every endpoint of the table on Headway, vllm-router and smg, with two stand-in engines behind each.

python -m benchmarks.endpoints --vllm-router PATH --smg PATH     # the table of docs/endpoints.md

A cell says where the request went: `1` or `2` engines, `own` when the router answered itself, the status of a
refusal otherwise. The engines answer everything with 200.
"""

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import aiohttp
from aiohttp import web

from headway.hosts.gateway.endpoints import ENDPOINTS, Endpoint, Kind

UP_S, ASK_S = 40.0, 8.0
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": "hi"},
    "text": "hi",
    "finish_reason": "stop",
}
ANSWER = {"id": "x", "object": "x", "created": 1, "model": "tiny", "choices": [CHOICE], "usage": USAGE}
INFO = {"model_path": "tiny", "served_model_name": "tiny", "tokenizer_path": "tiny", "is_generation": True}
ANSWERS: dict[str, object] = {
    "/v1/models": {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 1000}]},
    "/get_model_info": INFO,
    "/model_info": INFO,
    "/get_server_info": INFO | {"tp_size": 1, "dp_size": 1, "version": "0.5.23"},
    "/server_info": INFO | {"tp_size": 1, "dp_size": 1, "version": "0.5.23"},
    "/get_load": [{"dp_rank": 0, "num_reqs": 1, "num_waiting_reqs": 0, "num_tokens": 3}],
    "/v1/loads": {"loads": [{"dp_rank": 0, "num_running_reqs": 1}]},
    "/load": {"server_load": 1},
    "/version": {"version": "0.32.0"},
    "/rerank": [{"index": 0, "score": 0.5}],
    "/v1/rerank": [{"index": 0, "score": 0.5}],
}
BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 3,
}
BODIES: dict[str, object] = {"/v1/messages": BODY, "/v1/responses": {"model": "tiny", "input": "x"}}
FIELDS: dict[str, object] = {"prompt": "x", "input": "x", "query": "q", "documents": ["a"], "text": "x"}


class Engines:
    """Two engines that answer everything, and note who was asked for what."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, str]] = set()  # engine, and the last part of the path
        self.urls: list[str] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Engines"]:
        """Listen while the context lasts."""
        runners = [web.ServerRunner(web.Server(self._handler(name))) for name in ("a", "b")]
        for runner in runners:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        try:
            yield self
        finally:
            for runner in runners:
                await runner.cleanup()

    def _handler(self, name: str):  # type: ignore[no-untyped-def]
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            await request.read()
            self.asked.add((name, request.path.rpartition("/")[2]))
            return web.json_response(ANSWERS.get(request.path, ANSWER))

        return handle


async def free_port() -> int:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


async def try_all(command: Sequence[str], rows: Sequence[Endpoint]) -> list[str]:
    """Start a router and return a cell for each row."""
    async with Engines().running() as engines:
        port, metrics = await free_port(), await free_port()
        options = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
        router = await asyncio.create_subprocess_exec(
            *command,
            "--worker-urls",
            *engines.urls,
            *options,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        timeout = aiohttp.ClientTimeout(total=ASK_S)
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=timeout) as client:
                await until_up(client)
                return [await cell(client, engines, row) for row in rows]
        finally:
            with suppress(ProcessLookupError):
                router.terminate()
            await router.wait()


async def until_up(client: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(UP_S):
        while True:
            with suppress(aiohttp.ClientError, TimeoutError):
                async with client.post("/v1/chat/completions", json=BODY) as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.2)


async def cell(client: aiohttp.ClientSession, engines: Engines, row: Endpoint) -> str:
    """Ask for one path and say where the request went."""
    engines.asked.clear()
    body = BODIES.get(row.path) or (BODY if "chat" in row.path else {**BODY, **FIELDS})
    more = {"json": body} if row.methods[0] in ("POST", "PUT") else {}
    path = row.path.replace("ID", "resp_1").replace("NAME", "tiny").replace("…", "cancel")
    try:
        async with client.request(row.methods[0], path, **more) as answer:
            await answer.read()
            status = answer.status
    except (aiohttp.ClientError, TimeoutError):
        return "?"
    asked = {name for name, last in engines.asked if last == path.rpartition("/")[2]}
    if asked and row.path != "/health":  # routers check health on their own account
        return str(len(asked))
    return "own" if status < 300 else str(status)


async def main(routers: dict[str, list[str]]) -> None:
    rows = [row for row in ENDPOINTS if row.kind is not Kind.REFUSED]
    cells = {name: await try_all(command, rows) for name, command in routers.items()}
    print("| path | methods | kind | " + " | ".join(cells) + " |")
    print("|---" * (3 + len(cells)) + "|")
    for number, row in enumerate(rows):
        tried = " | ".join(column[number] for column in cells.values())
        print(f"| `{row.path}` | {', '.join(row.methods)} | {row.kind.value} | {tried} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vllm-router", help="the program")
    parser.add_argument("--smg", help="the program")
    given = parser.parse_args()
    chosen = {"Headway": [sys.executable, "-m", "headway", "serve"]}
    if given.vllm_router:
        chosen["vllm-router"] = [given.vllm_router]
    if given.smg:
        chosen["smg"] = [given.smg, "launch"]
    asyncio.run(main(chosen))
