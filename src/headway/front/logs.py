"""Decides what is logged: a line of JSON for every request that is over, and what went wrong with engines.

No prompt, no answer and no header of a client stands in a log; of what clients write only the request id
does, which is checked, and a model's name, cut. Lines are written by a thread of their own: a pipe that
nobody reads must not stop the gateway, nor keep it from ending. What does not fit into the queue is dropped
and counted, and so is what cannot be written in time at the end.
"""

import io
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from typing import TextIO

import orjson

from headway.front.config import LogsSpec
from headway.front.keys import CLIENT_NAME
from headway.front.over import Over

__all__ = ["AccessLog", "JsonLines", "logging_as_json"]

#: Lines that wait to be written.
MOST_LINES = 10_000
#: At the end, the lines that wait are given so long to be written.
LAST_LINES_S = 2.0
MOST_NAME = 100

#: What every record has; the rest came as `extra`, and goes into the line.
_STANDARD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"))

access = logging.getLogger("headway.access")


class AccessLog:
    """Logs requests that are over to the logger `headway.access`, where that is listened to."""

    def done(self, over: Over, status: int) -> None:
        """Log a request that was taken in."""
        if access.isEnabledFor(logging.INFO):
            _log("request", _fields(over, status))

    def refused(self, path: str, request_id: str, status: int, code: str) -> None:
        """Log a request that was refused at the door. `code`: the error's."""
        if access.isEnabledFor(logging.INFO):
            _log(
                "refused",
                {"request_id": request_id, "path": _path(path), "status": status, "code": code},
            )

    def passed_on(self, method: str, path: str, request_id: str, status: int) -> None:
        """Log a request that was passed on to an engine as it was."""
        if access.isEnabledFor(logging.INFO):
            _log(
                "passed on",
                {"request_id": request_id, "method": method, "path": _path(path), "status": status},
            )


def _log(message: str, fields: dict[str, object]) -> None:
    access.info(message, extra=fields | {"client": CLIENT_NAME.get() or None})


def _path(path: str) -> str:
    return path.partition("?")[0][:MOST_NAME]


def _fields(over: Over, status: int) -> dict[str, object]:
    request = over.request
    return {
        "request_id": request.id,
        "trace_id": over.trace_id,
        "path": over.call.path,
        "status": status,
        "code": over.code or None,
        "model": None if over.call.model is None else over.call.model[:MOST_NAME],
        "stream": over.call.stream,
        "priority": request.priority,
        "prompt_tokens": request.prompt_tokens if over.prompt_tokens is None else over.prompt_tokens,
        "output_tokens": over.output_tokens,
        "queue_s": _span_s(request.arrival_s, over.dispatched_s),
        "ttft_s": _span_s(request.arrival_s, over.first_byte_s) if over.call.stream else None,
        "duration_s": _span_s(request.arrival_s, over.ended_s),
        "instances": over.instances,
        "why": over.why,
        "failed_legs": over.attempts,
    }


def _span_s(start_s: float, end_s: float | None) -> float | None:
    return None if end_s is None else round(end_s - start_s, 6)


class JsonLines(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class _Queue(QueueHandler):
    """Hands records to the writing thread as they are. What does not fit is dropped and counted."""

    def __init__(self, lines: "queue.Queue[object]") -> None:
        super().__init__(lines)
        self._dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Leave the formatting to the thread."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Drop what does not fit."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.drop()

    def drop(self, lines: int = 1) -> None:
        """Count lines that will not be written."""
        with self._counting():
            self._dropped += lines

    def take_dropped(self) -> int:
        """Return how many lines were dropped since it was asked last."""
        with self._counting():
            dropped, self._dropped = self._dropped, 0
        return dropped

    @contextmanager
    def _counting(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()


class _Writer(threading.Thread):
    """Writes lines as they come. Where it is stuck it is left behind: while it writes it holds no lock of
    Python's at which the end of the process would wait for it, as those of streams and handlers.
    """

    def __init__(self, handler: _Queue, lines: "queue.Queue[object]", stream: TextIO) -> None:
        super().__init__(name="logs", daemon=True)
        self._handler = handler
        self._lines = lines
        self._write = _writing(stream)
        self._format = JsonLines().format
        self._left_behind = False

    def run(self) -> None:
        """Write until the end is told, and after each line what was dropped."""
        while isinstance(record := self._lines.get(), logging.LogRecord) and not self._left_behind:
            self._put(record)
            self._say_dropped()
        self._say_dropped()

    def finish(self, patience_s: float) -> None:
        """Write what waits; what is not written in time is dropped."""
        deadline_s = time.monotonic() + patience_s
        with suppress(queue.Full):
            self._lines.put(None, timeout=patience_s)
            self.join(max(0.0, deadline_s - time.monotonic()))
        if self.is_alive():
            self._left_behind = True
            waiting = list(self._lines.queue)
            self._handler.drop(sum(isinstance(line, logging.LogRecord) for line in waiting))

    def _put(self, record: logging.LogRecord) -> None:
        try:
            self._write(f"{self._format(record)}\n")
        except Exception:  # whoever read is gone, or what a library logs cannot be written: the next may be
            self._handler.drop()

    def _say_dropped(self) -> None:
        if dropped := self._handler.take_dropped():
            text = f"{dropped} lines were dropped"
            self._put(logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None))


def _writing(stream: TextIO) -> Callable[[str], object]:
    """Return what writes text, straight to the file where there is one."""
    try:
        file = stream.fileno()
    except (AttributeError, io.UnsupportedOperation):  # kept in memory
        return stream.write

    def write(text: str) -> None:
        rest = text.encode()
        while rest:
            rest = rest[os.write(file, rest) :]

    return write


@contextmanager
def logging_as_json(spec: LogsSpec, stream: TextIO | None = None) -> Iterator[None]:
    """Log to a stream (standard error) as `[logs]` says, while the context lasts."""
    root, ours = logging.getLogger(), logging.getLogger("headway")
    before = (root.handlers[:], root.level, ours.level, access.level)
    lines: queue.Queue[object] = queue.Queue(MOST_LINES)
    handler = _Queue(lines)
    writer = _Writer(handler, lines, sys.stderr if stream is None else stream)
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    ours.setLevel(spec.level.upper())
    access.setLevel(logging.INFO if spec.access else logging.CRITICAL)
    writer.start()
    try:
        yield
    finally:
        root.handlers[:] = before[0]
        for logger, level in zip((root, ours, access), before[1:], strict=True):
            logger.setLevel(level)
        writer.finish(LAST_LINES_S)
