"""Publishes the pass events of a vLLM instance: one thread in the process of its rank 0.

The ranks of an instance are processes of their own, and the wire format knows one sequence for an instance:
so all ranks tell the hub, which puts them together (`merge.py`), publishes (`headway.wire`), and answers
requests for snapshots. Beside, it puts what the front end's `/metrics` shows on a socket of its own: counts
since the start, so that nothing is lost with a message.
"""

import math
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from logging import Logger
from pathlib import Path

import msgspec
import zmq

from headway.core.errors import ConfigError
from headway.core.events import InstanceDown
from headway.hosts.vllm.merge import Merge
from headway.hosts.vllm.reports import Ended, read
from headway.wire.publisher import Publisher
from headway.wire.schema import PassEvent

__all__ = ["Hub"]

#: How long a request for a snapshot waits at most, and how often the counts are told at most.
_IDLE_S = 0.05
_STATS_S = 0.25


class Hub:
    """Binds at construction (raises ConfigError where it cannot); runs from `start()` to `close()`."""

    def __init__(
        self, name: str, collect: str, stats: str, events: str | None, snapshots: str | None, log: Logger
    ) -> None:
        self._merge = Merge(name, int(time.time() * 1000))
        self._name, self._log = name, log
        self._publisher = Publisher(events, snapshots, self._merge.snapshot) if events else None
        self.endpoint = self._publisher.endpoint if self._publisher else None
        self.snapshot_endpoint = self._publisher.snapshot_endpoint if self._publisher else None
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._inbox: zmq.Socket[bytes] = context.socket(zmq.PULL)
        self._stats: zmq.Socket[bytes] = context.socket(zmq.PUB)
        self._bound = {self._inbox: collect, self._stats: stats}
        try:
            for socket, bind in self._bound.items():
                socket.setsockopt(zmq.LINGER, 0)
                socket.bind(bind)
        except zmq.ZMQError as error:
            self._shut()
            raise ConfigError(f"cannot bind {bind!r}: {error.strerror}") from None
        self._latest: dict[int, Ended] = {}
        self._changed = False
        self._told_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headway-hub", daemon=True)

    def start(self) -> None:
        """Begin to publish."""
        self._thread.start()

    def close(self) -> None:
        """Stop, say goodbye, and close the sockets."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)
        self._publish([InstanceDown(self._name)])
        self._shut()

    def _shut(self) -> None:
        for socket, bind in self._bound.items():
            socket.close()
            if bind.startswith("ipc://"):  # ZeroMQ leaves the file
                Path(bind.removeprefix("ipc://")).unlink(missing_ok=True)
        if self._publisher is not None:
            self._publisher.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
            except zmq.ZMQError:
                return  # the context is gone: the process ends
            except Exception:
                self._log.exception("headway's publisher failed on a report; the engine is not affected")

    def _turn(self) -> None:
        due_s = self._merge.due_s
        wait_s = _IDLE_S if due_s is None else min(max(due_s - time.monotonic(), 0.0), _IDLE_S)
        if self._inbox.poll(math.ceil(wait_s * 1000)):
            self._drain()
        self._publish(self._merge.flush(time.monotonic()))
        if self._publisher is not None:
            self._publisher.answer()
        now = time.monotonic()
        if self._changed and now - self._told_s >= _STATS_S:
            self._told_s, self._changed = now, False
            self._stats.send(msgspec.msgpack.encode(self._latest), zmq.NOBLOCK)

    def _drain(self) -> None:
        with suppress(zmq.Again):
            while True:
                message = read(self._inbox.recv(zmq.NOBLOCK))
                self._publish(self._merge.take(message, time.monotonic()))
                if isinstance(message, Ended):
                    self._note(message)

    def _note(self, message: Ended) -> None:
        """Keep the last of a rank, with the models it told last."""
        before = self._latest.get(message.rank)
        if before is not None and message.decode_model is None and message.mixed_model is None:
            models = {"decode_model": before.decode_model, "mixed_model": before.mixed_model}
            message = msgspec.structs.replace(message, **models)
        self._latest[message.rank] = message
        self._changed = True

    def _publish(self, events: Sequence[PassEvent]) -> None:
        if self._publisher is not None:
            for event in events:
                self._publisher.publish(event)
