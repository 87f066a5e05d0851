"""Reads clients' bodies in a process of its own, so that a large one does not stop the event loop.

    python -m headway.front.body_worker DESCRIPTOR [TOKENIZER]

`BodyReader` starts it with one end of a socket, and it lives as long as that socket. One job after the other
comes over it: a header (`Job`, after its length in four bytes), then the body; one `Result` goes back.
Decoding holds Python's global lock, so that a thread would not do.
"""

import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from headway.front.errors import Refusal
from headway.front.prompts import Count
from headway.front.requests import Call, check_passed_on, read_call
from headway.front.tokenizer import load_tokenizer

__all__ = ["Job", "Result", "answer", "main"]

#: Its priority is lower than that of the process with the event loop, whose streams must not wait.
NICE = 5


class Job(msgspec.Struct, array_like=True):
    """What is to be read. `path`: of a generation; None: a body that is passed on."""

    size: int
    path: str | None
    steered: bool
    prefixes: bool


class Result(msgspec.Struct, array_like=True):
    """What came of a job: a call without its body, the model that a body to be passed on names, or why the
    body is refused.
    """

    call: Call | None = None
    model: str | None = None
    status: int = 0
    code: str = ""
    message: str = ""
    param: str | None = None

    def refusal(self) -> Refusal:
        """Return what a client is told."""
        return Refusal(self.status, self.code, self.message, param=self.param)


def answer(job: Job, body: bytes, count: Count | None) -> Result:
    """Carry out a job."""
    try:
        if job.path is None:
            return Result(model=check_passed_on(body))
        call = read_call(job.path, body, steered=job.steered, prefixes=job.prefixes, count=count)
    except Refusal as refusal:
        return Result(None, None, refusal.status, refusal.code, str(refusal), refusal.param)
    return Result(msgspec.structs.replace(call, body=b""))


def _receive(end: socket.socket, size: int) -> bytearray:
    """Receive so many bytes. Raises EOFError at the end of the socket."""
    data = bytearray(size)
    view, have = memoryview(data), 0
    while have < size:
        more = end.recv_into(view[have:])
        if not more:
            raise EOFError
        have += more
    return data


def main() -> None:
    """Serve jobs until the socket ends. What ends the parent is none of its business."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    count = load_tokenizer(Path(sys.argv[2])) if len(sys.argv) > 2 else None
    jobs, results = msgspec.msgpack.Decoder(Job), msgspec.msgpack.Encoder()
    with socket.socket(fileno=int(sys.argv[1])) as end, suppress(EOFError, OSError):
        while True:
            job = jobs.decode(_receive(end, int.from_bytes(_receive(end, 4), "big")))
            data = results.encode(answer(job, bytes(_receive(end, job.size)), count))
            end.sendall(len(data).to_bytes(4, "big") + data)


if __name__ == "__main__":
    main()
