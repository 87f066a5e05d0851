"""An open-loop load over HTTP: every request is sent when it is due, however late the others are."""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import aiohttp

from headway.core.request import Slo
from headway.report.metrics import Outcome
from headway.workload import Item

#: A request is given up after this long, in the load's own seconds.
PATIENCE_S = 240.0
#: Between the call and the first arrival.
LEAD_S = 0.5


class Ask(NamedTuple):
    """A request: its body, and what is wrong with the bytes that came back (None: nothing)."""

    body: dict[str, Any]
    wrong: Callable[[Item, bytes], str | None]


def whole(item: Item, body: bytes) -> str | None:
    """Say what is wrong with an answer that does not have all its tokens, by its `usage`."""
    found = re.search(rb'"completion_tokens":(\d+)', body)
    if found is None or int(found[1]) != item.output_tokens:
        return f"not {item.output_tokens} tokens"
    return None


def loop_factory() -> Any:
    """Return uvloop's, where there is one."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def replay(
    url: str,
    ask: Callable[[int, Item], Ask],
    items: Sequence[Item],
    *,
    slo: Slo,
    speed: float = 1.0,
    on_piece: Callable[[int, float, bytes], None] = lambda number, at_s, piece: None,
) -> list[Outcome]:
    """Send every item when it is due, as a streamed completion; return what became of each.

    Times in the outcomes are wall time × `speed`, from the first item's zero. `on_piece` is told of each
    piece of an answer: the item's number, the time, the bytes. Raises SystemExit for an answer that is wrong.
    """
    loop = asyncio.get_running_loop()
    start_s = loop.time() + LEAD_S
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S / speed, sock_connect=30.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:

        async def one(number: int, item: Item) -> Outcome:
            outcome = Outcome(str(number), item.arrival_s, item.prompt_tokens, item.output_tokens, slo)
            asked = ask(number, item)
            data = json.dumps(asked.body).encode()
            await asyncio.sleep(max(0.0, start_s + item.arrival_s / speed - loop.time()))
            try:
                body = await _stream(
                    session, data, outcome, lambda: (loop.time() - start_s) * speed, partial(on_piece, number)
                )
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome.rejected = type(error).__name__
            else:
                if body is not None and (problem := asked.wrong(item, body)):
                    raise SystemExit(f"request {number}: {problem}: {body[-300:]!r}")
            return outcome

        return list(await asyncio.gather(*(one(n, item) for n, item in enumerate(items))))


async def _stream(
    session: aiohttp.ClientSession,
    data: bytes,
    outcome: Outcome,
    now: Callable[[], float],
    on_piece: Callable[[float, bytes], None],
) -> bytes | None:
    """Read an answer to its end and note its times; None when there is none."""
    headers = {"Content-Type": "application/json"}
    async with session.post("/v1/completions", data=data, headers=headers) as answer:
        if answer.status != 200:
            outcome.rejected = f"http {answer.status}"
            return None
        body = bytearray()
        async for chunk in answer.content.iter_any():
            at_s = now()
            if outcome.first_token_s is None:
                outcome.first_token_s = at_s
            on_piece(at_s, chunk)
            body += chunk
        outcome.finished_s = now()
    return bytes(body)
