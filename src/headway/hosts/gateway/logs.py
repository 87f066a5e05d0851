"""Decides what is logged: a line of JSON for every request that is over, and what went wrong with engines.

No prompt, no answer and no header of a client stands in a log; of what clients write only the request id
does, which is checked, and a model's name, cut. Lines are written by a thread of their own: a pipe that
nobody reads must not stop the gateway. What does not fit into its queue is dropped and counted.
"""

import logging
import queue
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import TextIO

import orjson

from headway.hosts.gateway.config import LogsSpec
from headway.hosts.gateway.flight import Flight

__all__ = ["AccessLog", "JsonLines", "logging_as_json"]

#: Lines that wait to be written.
MOST_LINES = 10_000
MOST_NAME = 100

#: What every record has; the rest came as `extra`, and goes into the line.
_STANDARD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"))

access = logging.getLogger("headway.access")


class AccessLog:
    """Logs requests that are over to the logger `headway.access`, where that is listened to."""

    def done(self, flight: Flight, status: int) -> None:
        """Log a request that was taken in."""
        if access.isEnabledFor(logging.INFO):
            _log("request", _fields(flight, status))

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
    access.info(message, extra=fields)


def _path(path: str) -> str:
    return path.partition("?")[0][:MOST_NAME]


def _fields(flight: Flight, status: int) -> dict[str, object]:
    request = flight.request
    return {
        "request_id": request.id,
        "trace_id": flight.trace.trace_id,
        "path": flight.call.path,
        "status": status,
        "code": flight.code or None,
        "model": None if flight.call.model is None else flight.call.model[:MOST_NAME],
        "stream": flight.call.stream,
        "priority": request.priority,
        "prompt_tokens": request.prompt_tokens if flight.prompt_tokens is None else flight.prompt_tokens,
        "output_tokens": flight.output_tokens,
        "queue_s": _span_s(request.arrival_s, flight.dispatched_s),
        "ttft_s": _span_s(request.arrival_s, flight.first_byte_s) if flight.call.stream else None,
        "duration_s": _span_s(request.arrival_s, flight.ended_s),
        "instances": flight.instances,
        "why": flight.why,
        "failed_legs": flight.attempts,
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
    """Hands records to the writing thread as they are."""

    def __init__(self, lines: "queue.Queue[object]") -> None:
        super().__init__(lines)
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Leave the formatting to the thread."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Drop what does not fit, and say so when there is room again."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1
            return
        if self.dropped:
            text, self.dropped = f"{self.dropped} lines were dropped", 0
            self.enqueue(logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None))


@contextmanager
def logging_as_json(spec: LogsSpec, stream: TextIO | None = None) -> Iterator[None]:
    """Log to a stream (standard error) as `[logs]` says, while the context lasts."""
    root, ours = logging.getLogger(), logging.getLogger("headway")
    before = (root.handlers[:], root.level, ours.level, access.level)
    writer = logging.StreamHandler(sys.stderr if stream is None else stream)
    writer.setFormatter(JsonLines())
    lines: queue.Queue[object] = queue.Queue(MOST_LINES)
    listener = QueueListener(lines, writer)
    root.handlers[:] = [_Queue(lines)]
    root.setLevel(logging.WARNING)
    ours.setLevel(spec.level.upper())
    access.setLevel(logging.INFO if spec.access else logging.CRITICAL)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        root.handlers[:] = before[0]
        for logger, level in zip((root, ours, access), before[1:], strict=True):
            logger.setLevel(level)
