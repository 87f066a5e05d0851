"""What is shown on `/metrics`, and where it comes from.

The counts are kept in the engine's processes, since their start, and come over a socket of the hub
(`hub.py`) of which only the last message is kept: whoever scrapes reads that one, nothing runs in between.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress

import msgspec
import zmq
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from headway.core.events import StepModel
from headway.hosts.vllm.reports import BUCKETS_S, Ended

__all__ = ["Collector", "families"]

_RANK = ("engine",)  # vLLM's name for the rank in its labels

_COUNTS = {
    "prompt_tokens": "Prompt tokens computed",
    "decode_tokens": "Decodes run, one a step and request",
    "steered": "Steps that were not the engine's own",
    "sat_out": "Requests times steps they sat out",
    "left_alone": "Steps given to the engine because a plan came to nothing",
    "failures": "Failures of ours; the step was the engine's own",
    "slo_ignored": "Requests whose targets were nonsense and were ignored",
    "dropped": "Reports that found no room",
    "unrecorded": "Steps to be recorded that could not be written",
}
_STATES = {
    "queued_tokens": "Prompt tokens to compute, waiting or begun",
    "running": "Requests that hold a seat",
    "waiting": "Requests that wait",
    "pab_tokens": "Prefill admission budget",
}
_decoder: msgspec.msgpack.Decoder[dict[int, Ended]] = msgspec.msgpack.Decoder(dict[int, Ended])


def families(told: dict[int, Ended]) -> Iterator[Metric]:
    """Return what is shown of the ranks' last words."""
    seconds = HistogramMetricFamily("headway_step_seconds", "How long steps took", labels=_RANK)
    for rank, last in told.items():
        below, buckets = 0, []
        for end, steps in zip((*map(str, BUCKETS_S), "+Inf"), last.tally.buckets, strict=True):
            below += steps
            buckets.append((end, below))
        seconds.add_metric((str(rank),), buckets, last.tally.seconds)
    yield seconds
    for name, doc in _COUNTS.items():
        counter = CounterMetricFamily(f"headway_{name}", doc, labels=_RANK)
        for rank, last in told.items():
            counter.add_metric((str(rank),), getattr(last.tally, name))
        yield counter
    for name, doc in _STATES.items():
        gauge = GaugeMetricFamily(f"headway_{name}", doc, labels=_RANK)
        for rank, last in told.items():
            value = getattr(last.shown, name)
            if value is not None:
                gauge.add_metric((str(rank),), value)
        yield gauge
    fallback = GaugeMetricFamily(
        "headway_fallback",
        "1 once the engine schedules on its own until its restart, after its scheduler failed",
        labels=_RANK,
    )
    for rank, last in told.items():
        fallback.add_metric((str(rank),), last.tally.fallback)
    yield fallback
    yield from _models(told)


def _models(told: dict[int, Ended]) -> Iterable[Metric]:
    labels = (*_RANK, "regime")
    terms = GaugeMetricFamily(
        "headway_step_model",
        "Learned step time: a s, b s/token, c s/token, q s/token²",
        labels=(*labels, "term"),
    )
    error = GaugeMetricFamily("headway_step_model_error_ratio", "Mean absolute error, a share", labels=labels)
    margin = GaugeMetricFamily("headway_step_model_margin_ratio", "Factor kept in reserve", labels=labels)
    for rank, last in told.items():
        models: dict[str, StepModel | None] = {"decode": last.decode_model, "mixed": last.mixed_model}
        for regime, model in models.items():
            if model is None:
                continue
            for term in "abcq":
                terms.add_metric((str(rank), regime, term), getattr(model, f"{term}_s"))
            margin.add_metric((str(rank), regime), model.margin)
            if model.error is not None:
                error.add_metric((str(rank), regime), model.error)
    return terms, error, margin


class Collector:
    """Reads the hub's last message when somebody scrapes."""

    def __init__(self, stats: str) -> None:
        self._told: dict[int, Ended] = {}
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.CONFLATE, 1)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(stats)

    def collect(self) -> Iterator[Metric]:
        """Return the metrics, as Prometheus's client asks for them: from any thread."""
        with self._lock, suppress(zmq.ZMQError, msgspec.MsgspecError):  # vLLM's own must be shown in any case
            if self._socket.poll(0):
                self._told = _decoder.decode(self._socket.recv(zmq.NOBLOCK))
        return families(self._told)

    def describe(self) -> list[Metric]:
        """Return nothing: names are not checked at registration."""
        return []

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
