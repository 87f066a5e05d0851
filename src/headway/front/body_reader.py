"""Reads clients' bodies without stopping the event loop: small ones at once, others in a few processes.

Rule 1. What is read at once takes a few milliseconds at worst, whatever stands in it: bounds on its bytes
        (with a tokenizer, which is slower, `INLINE_TOKENIZED_BYTES`), objects and strings.
Rule 2. A process reads one body at a time. Processes are started when they are needed, and again when they
        end. Large bodies leave one process to the others.
Rule 3. A body that takes longer than `MOST_S` is refused, and its process ended.
Rule 4. A client that goes away takes a job that waits with it, body and all. One that was begun ends by
        itself: to cut it would cost a process.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import msgspec

from headway.front.body_worker import Job, Result
from headway.front.errors import Refusal, unavailable
from headway.front.requests import Call, check_passed_on, looks_like_object, read_call
from headway.front.tokenizer import load_tokenizer

__all__ = ["BodyReader"]

log = logging.getLogger("headway.bodies")

#: Measured: a byte costs 30 ns at most (token ids), an object or a string 2 us.
INLINE_BYTES, INLINE_OBJECTS, INLINE_QUOTES = 64 << 10, 500, 2500
INLINE_TOKENIZED_BYTES = 4096
#: Larger bodies are large: they may take seconds.
LARGE_BYTES = 1 << 20
MOST_S = 30.0
#: A body is handed over in slices of this size.
SLICE_BYTES = 256 << 10

_job = msgspec.msgpack.Encoder()
_result = msgspec.msgpack.Decoder(Result)


class BodyReader:
    """Reads bodies. `tokenizer`: a tokenizer.json, with which tokens are counted. `processes`: how many may
    read at once, at least 2.

    Raises ConfigError when the tokenizer file cannot be used. `close` it at the end.
    """

    def __init__(self, tokenizer: Path | None = None, *, processes: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._count = None if tokenizer is None else load_tokenizer(tokenizer)
        most = max(2, processes or min(4, os.cpu_count() or 2))
        self._most_inline = INLINE_BYTES if tokenizer is None else INLINE_TOKENIZED_BYTES
        self._any = asyncio.Semaphore(most)
        self._large = asyncio.Semaphore(most - 1)
        self._idle: list[_Process] = []
        self._jobs: set[asyncio.Task[Result]] = set()
        self._waiting: set[asyncio.Task[Result]] = set()  # those of them that no process reads yet

    async def read(
        self, path: str, body: bytes | Sequence[bytes], *, steered: bool = False, prefixes: bool = True
    ) -> Call:
        """Read the body of a generation, whole or in pieces: see `read_call`. Raises Refusal. Of one that
        came in pieces, `Call.body` is empty.
        """
        if isinstance(body, bytes) and len(body) <= self._most_inline and _is_cheap(body):
            return read_call(path, body, steered=steered, prefixes=prefixes, count=self._count)
        pieces = (body,) if isinstance(body, bytes | bytearray) else body
        size = sum(map(len, pieces))
        if size <= self._most_inline and _is_cheap(whole := b"".join(pieces)):
            call = read_call(path, whole, steered=steered, prefixes=prefixes, count=self._count)
        else:
            result = await self._hand_over(Job(size, path, steered, prefixes), pieces)
            call = cast(Call, result.call)
        return msgspec.structs.replace(call, body=body if isinstance(body, bytes | bytearray) else b"")

    async def check_passed_on(self, body: bytes | Sequence[bytes]) -> str | None:
        """Check a body that goes to an engine unread: see `check_passed_on`. Raises Refusal."""
        pieces = (body,) if isinstance(body, bytes | bytearray) else body
        size = sum(map(len, pieces))
        if size <= INLINE_BYTES:
            return check_passed_on(b"".join(pieces))
        if not looks_like_object(pieces[0][:64].strip() + b"{"):
            return None
        return (await self._hand_over(Job(size, None, False, False), pieces)).model

    async def close(self) -> None:
        """End the processes."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        idle, self._idle = self._idle, []
        for process in idle:
            await process.end()

    async def _hand_over(self, job: Job, pieces: Sequence[bytes]) -> Result:
        task = asyncio.create_task(self._carry_out(job, pieces))
        self._jobs.add(task)
        self._waiting.add(task)
        task.add_done_callback(self._forget)
        try:
            result = await asyncio.shield(task)
        except asyncio.CancelledError:
            if task in self._waiting:
                task.cancel()
            raise
        if result.status:
            raise result.refusal()
        return result

    def _forget(self, task: "asyncio.Task[Result]") -> None:
        self._jobs.discard(task)
        self._waiting.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it may be gone

    async def _carry_out(self, job: Job, pieces: Sequence[bytes]) -> Result:
        if job.size <= LARGE_BYTES:
            async with self._any:
                return await self._ask(job, pieces)
        async with self._large, self._any:
            return await self._ask(job, pieces)

    async def _ask(self, job: Job, pieces: Sequence[bytes]) -> Result:
        self._waiting -= {asyncio.current_task()}
        process = self._idle.pop() if self._idle else None
        try:
            if process is None or process.lost:
                process = await _Process.start(self._tokenizer)
            async with asyncio.timeout(MOST_S) as timer:
                result = await process.ask(job, pieces)
        except BaseException as error:
            if process is not None:
                await process.end()
            if isinstance(error, TimeoutError) and timer.expired():
                message = f"The body took longer than {MOST_S:g} s to read."
                raise Refusal(413, "body_too_complex", message) from None
            if isinstance(error, OSError):
                log.error("a process that reads bodies failed: %s", error)
                raise unavailable("body_reader_failed", "The body could not be read.") from None
            raise
        self._idle.append(process)
        return result


def _is_cheap(body: bytes) -> bool:
    return body.count(b"{") <= INLINE_OBJECTS and body.count(b'"') <= INLINE_QUOTES


class _Process(asyncio.Protocol):
    """One process (`body_worker.py`), seen from here. `lost`: it is gone."""

    def __init__(self) -> None:
        self.lost = False
        self._process: asyncio.subprocess.Process | None = None
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._result: asyncio.Future[Result] | None = None
        self._writable: asyncio.Event = asyncio.Event()
        self._writable.set()

    @classmethod
    async def start(cls, tokenizer: Path | None) -> "_Process":
        """Start a process. Raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            loop = asyncio.get_running_loop()
            _, process = await loop.create_unix_connection(cls, sock=ours)
            try:
                process._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "headway.front.body_worker", str(theirs.fileno())),
                    *(() if tokenizer is None else (str(tokenizer),)),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's Ctrl-C is not meant for it
                )
            except BaseException:
                await process.end()
                raise
        return process

    async def ask(self, job: Job, pieces: Sequence[bytes]) -> Result:
        """Have a body read. Raises ConnectionResetError when the process is gone."""
        assert self._transport is not None
        self._result = asyncio.get_running_loop().create_future()
        header = _job.encode(job)
        self._transport.write(len(header).to_bytes(4, "big") + header)
        for piece in pieces:
            view = memoryview(piece)
            for at in range(0, len(view), SLICE_BYTES):
                await self._writable.wait()
                if self.lost:
                    break
                self._transport.write(view[at : at + SLICE_BYTES])
        return await self._result

    async def end(self) -> None:
        """End the process and wait for it."""
        self.lost = True
        if self._transport is not None:
            self._transport.abort()
        if self._process is not None:
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    self._process.kill()
            await self._process.wait()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it
        self._transport.set_write_buffer_limits(SLICE_BYTES)

    def pause_writing(self) -> None:
        """The process is behind."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """The process has caught up."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Take a piece of a result."""
        self._received += data
        size = int.from_bytes(self._received[:4], "big")
        if len(self._received) < 4 or len(self._received) < 4 + size:
            return
        result = _result.decode(self._received[4:])
        self._received.clear()
        if self._result is not None and not self._result.done():
            self._result.set_result(result)

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever waits for a result waits in vain."""
        self.lost = True
        self._writable.set()
        if self._result is not None and not self._result.done():
            self._result.set_exception(ConnectionResetError("the process ended"))
