"""Decides how the KV of a prompt gets from a prefill to a decode instance of the same emulator.

Rule 1. vLLM (NIXL): prefill keeps the KV under its block ids until a decode instance pulls it, once, or until
        it expires. What died with its instance, expired or was pulled is not there any more.
Rule 2. SGLang (bootstrap): both legs meet in a room. Prefill begins when the decode leg is there; the decode
        leg waits for the KV. A leg that waits too long fails.
Rule 3. When a leg is aborted, the other one learns of it only `abort_s` later, as SGLang's do: a gateway that
        does not cancel both pays for it.

Nothing is sent: the KV is a note in memory, and its transfer a wait that the caller makes.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

from headway.hosts.emulator.errors import ApiError

__all__ = ["KvStore", "Room", "Rooms"]

#: vLLM: VLLM_NIXL_ABORT_REQUEST_TIMEOUT.
KV_EXPIRES_S = 480.0


class KvStore:
    """Prompts computed and not pulled yet, oldest first. Keys: engine id and first block id."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._kept: OrderedDict[tuple[str, int], tuple[int, float]] = OrderedDict()
        self._blocks = count(1)

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, engine_id: str, prompt_tokens: int, block_tokens: int) -> list[int]:
        """Keep the KV of a prompt; return its block ids."""
        self._expire()
        ids = [next(self._blocks) for _ in range(-(-prompt_tokens // block_tokens))]
        self._kept[engine_id, ids[0]] = (prompt_tokens, self._clock_s() + KV_EXPIRES_S)
        return ids

    def pull(self, engine_id: str, block_ids: list[int], prompt_tokens: int) -> None:
        """Take the KV of a prompt. Raises ApiError when it is not there, or of another prompt."""
        self._expire()
        kept = self._kept.pop((engine_id, block_ids[0]), None) if block_ids else None
        if kept is None:
            raise ApiError(500, f"KV load failure: {engine_id} has no blocks {block_ids[:4]}…")
        if kept[0] != prompt_tokens:
            raise ApiError(
                500, f"KV load failure: {kept[0]} tokens were computed, the prompt has {prompt_tokens}"
            )

    def drop(self, engine_id: str) -> None:
        """Forget what an engine kept: it died."""
        for key in [key for key in self._kept if key[0] == engine_id]:
            del self._kept[key]

    def _expire(self) -> None:
        now = self._clock_s()
        while self._kept and next(iter(self._kept.values()))[1] <= now:
            self._kept.popitem(last=False)


class Room:
    """Where the two legs of a request meet."""

    __slots__ = ("aborted", "inside", "kv", "legs", "paired")

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.paired: asyncio.Future[None] = loop.create_future()
        self.kv: asyncio.Future[None] = loop.create_future()
        self.aborted: asyncio.Future[None] = loop.create_future()
        self.legs: set[str] = set()
        self.inside = 0

    def computed(self) -> None:
        """The prefill leg is done."""
        if not self.kv.done():
            self.kv.set_result(None)


class Rooms:
    """Bootstrap rooms by (port of the prefill instance, number).

    `default_port`: of the prefill instance meant by a decode leg that names none.
    """

    def __init__(self, timeout_s: float, abort_s: float) -> None:
        self.timeout_s, self.abort_s = timeout_s, abort_s
        self.default_port = 0
        self._rooms: dict[tuple[int, int], Room] = {}

    def __len__(self) -> int:
        return len(self._rooms)

    @contextmanager
    def join(self, port: int | None, number: int, leg: str) -> Iterator[Room]:
        """Stay in a room while the leg ("prefill", "decode") lasts; an exception aborts the other leg.

        Raises ApiError when the same leg is there already.
        """
        key = (self.default_port if port is None else port, number)
        room = self._rooms.setdefault(key, Room())
        if leg in room.legs:
            raise ApiError(400, f"bootstrap_room {number} has its {leg} leg already")
        room.legs.add(leg)
        room.inside += 1
        if len(room.legs) == 2 and not room.paired.done():
            room.paired.set_result(None)
        completed = False
        try:
            yield room
            completed = True
        finally:
            self._leave(key, room, completed)

    async def paired(self, room: Room) -> None:
        """Wait for the other leg. Raises ApiError when it does not come."""
        await self._wait(room, room.paired, "the other leg never came")

    async def kv(self, room: Room) -> None:
        """Wait for the prompt's KV. Raises ApiError when it does not come."""
        await self._wait(room, room.kv, "the KV of the prompt never came")

    async def _wait(self, room: Room, wanted: asyncio.Future[None], what: str) -> None:
        await asyncio.wait(
            (wanted, room.aborted), timeout=self.timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if wanted.done():
            return
        why = "the other leg was aborted" if room.aborted.done() else f"{what} within {self.timeout_s:g} s"
        raise ApiError(500, f"KVTransferError: {why}")

    def _leave(self, key: tuple[int, int], room: Room, completed: bool) -> None:
        room.inside -= 1
        if not room.inside and (completed or len(room.legs) == 2):
            self._forget(key, room)
        elif not completed and not room.aborted.done():
            asyncio.get_running_loop().call_later(self.abort_s, self._abort, key, room)

    def _abort(self, key: tuple[int, int], room: Room) -> None:
        if not room.aborted.done():
            room.aborted.set_result(None)
        if not room.inside:
            self._forget(key, room)

    def _forget(self, key: tuple[int, int], room: Room) -> None:
        if self._rooms.get(key) is room:
            del self._rooms[key]
