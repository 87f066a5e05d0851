"""What a rank of vLLM tells the hub of its instance, and how: over a ZeroMQ PUSH socket that never waits.

Rule 1. A report holds the full state of the rank: one that is lost costs nothing but time.
Rule 2. Nothing here ever waits: beyond the high water mark a report is dropped and counted.
Rule 3. Numbers of dispatches must not be lost with a report: they go with the next one that leaves, the
        highest ones if there are many. (No hub hears the ranks of other machines.)
"""

import tempfile
from heapq import heappush, heappushpop
from typing import Any

import msgspec
import zmq

from headway.core.events import InstanceUp, Role, StepModel

__all__ = ["BUCKETS_S", "Ended", "Message", "Reporter", "Shown", "Started", "Tally", "Up", "address", "read"]

_HIGH_WATER_MARK = 1000
#: Numbers of dispatches that are kept for the next report.
_MOST_DISPATCHES = 1000
#: Step models change slowly: every so many steps is often enough to tell them.
_MODELS_EVERY = 16
#: Upper ends of the buckets of step times, in s; the last bucket is open.
BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Tally(msgspec.Struct):
    """Counts since the start. `buckets`: steps by duration, as `BUCKETS_S` has it and one more.

    `steered`: steps that were not vLLM's own. `sat_out`: requests times steps that they sat out.
    `left_alone`: steps given to vLLM because a plan came to nothing. `failures`: of ours. `slo_ignored`:
    requests whose targets were nonsense. `dropped`: reports that found no room. `unrecorded`: steps that were
    to be written down and could not. `fallback`: 1 once every step is left to vLLM for good.
    """

    steps: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    decode_tokens: int = 0
    steered: int = 0
    sat_out: int = 0
    left_alone: int = 0
    failures: int = 0
    slo_ignored: int = 0
    dropped: int = 0
    unrecorded: int = 0
    fallback: int = 0
    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))

    def count(self, prompt_tokens: int, decodes: int, duration_s: float) -> None:
        """Count a step."""
        self.steps += 1
        self.seconds += duration_s
        self.prompt_tokens += prompt_tokens
        self.decode_tokens += decodes
        self.buckets[sum([duration_s > end for end in BUCKETS_S])] += 1


class Shown(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a rank stands: fields as in `PassEnded`, of one rank."""

    queued_tokens: int = 0
    kv_blocks: int = 0
    running: int = 0
    waiting: int = 0
    pab_tokens: int | None = None


class Up(msgspec.Struct, frozen=True, tag="up"):
    """The rank is there. `lockstep`: it marches with `ranks` − 1 others."""

    rank: int
    ranks: int
    role: str
    chunk_tokens: int
    kv_blocks: int
    block_tokens: int
    max_running: int
    lockstep: bool

    def instance_up(self, name: str, ranks: int, epoch: int) -> InstanceUp:
        """Introduce the instance that the rank is of."""
        return InstanceUp(
            name,
            Role(self.role),
            ranks,
            self.chunk_tokens,
            self.kv_blocks,
            self.block_tokens,
            self.max_running,
            self.lockstep,
            epoch,
        )


class Started(msgspec.Struct, frozen=True, tag="started"):
    """A step began. Only ranks in lockstep say so: the hub waits for them."""

    rank: int


class Ended(msgspec.Struct, frozen=True, omit_defaults=True, tag="ended"):
    """A step ended (`ran_tokens` None: none did, but the rank has nothing left to do), and how the rank
    stands.

    `dispatches`: numbers that came since the last report.
    """

    rank: int
    shown: Shown
    tally: Tally
    dispatches: list[int]
    ran_tokens: int | None = None
    duration_s: float = 0.0
    decode_model: StepModel | None = None
    mixed_model: StepModel | None = None


Message = Up | Started | Ended

_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def read(data: bytes) -> Message:
    """Read a message. Raises msgspec.MsgspecError when it is none."""
    return _decoder.decode(data)


def address(instance_id: str, what: str) -> str:
    """Return where processes of one vLLM instance meet on this machine."""
    return f"ipc://{tempfile.gettempdir()}/headway-{instance_id}-{what}"


class Reporter:
    """The rank's end."""

    def __init__(self, connect: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(connect)
        self._dispatches: list[int] = []
        self._reports = 0

    def received(self, dispatch: int) -> None:
        """Note the number of a dispatch that came."""
        if len(self._dispatches) < _MOST_DISPATCHES:
            heappush(self._dispatches, dispatch)
        else:
            heappushpop(self._dispatches, dispatch)

    def up(self, up: Up) -> None:
        """Introduce the rank."""
        self._send(up)

    def started(self, rank: int) -> None:
        """Say that a step began."""
        self._send(Started(rank))

    def ended(
        self, rank: int, shown: Shown, tally: Tally, ran: tuple[int, float] | None, step_time: Any
    ) -> None:
        """Say how the rank stands; `ran`: prompt tokens and duration of the step that ended, if any did."""
        models: dict[str, StepModel | None] = {}
        if step_time is not None and self._reports % _MODELS_EVERY == 0:
            models = {f"{regime}_model": _model(step_time, regime) for regime in ("decode", "mixed")}
        ran_tokens, duration_s = ran or (None, 0.0)
        message = Ended(rank, shown, tally, self._dispatches, ran_tokens, duration_s, **models)
        self._reports += 1
        if self._send(message):
            self._dispatches = []
        else:
            tally.dropped += 1

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, message: Message) -> bool:
        try:
            self._socket.send(_encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True


def _model(step_time: Any, regime: str) -> StepModel | None:
    if not step_time.trained(regime):
        return None
    a_s, b_s, c_s, q_s = step_time.coefficients(regime)
    return StepModel(
        a_s,
        b_s,
        c_s,
        q_s,
        step_time.steps(regime),
        step_time.recent_error(regime),
        step_time.margin(regime),
    )
