"""Prometheus metrics in base units. Labels are bounded: instances that are configured, words that are ours.

No request id, no model name, no client's text becomes a label. An engine's label is `worker`: `instance` is
Prometheus' own, of the gateway that was scraped.
"""

from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from headway.core.actions import Action, Dispatch, Poll, Recall, Reject
from headway.core.events import Event, InstanceUp, PassEnded
from headway.front.buffer import Buffer
from headway.front.keys import CLIENT_NAME
from headway.front.lease import Elector
from headway.front.loop_lag import LoopLagMonitor
from headway.front.over import Over
from headway.front.worker import State
from headway.front.workers import Workers

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_TPOT_SECONDS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
_PASS_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
_TOKENS = tuple(float(1 << power) for power in range(4, 18))
#: Reasons come from policies, which may be anybody's: past this many, new ones are counted as "other".
MOST_WORDS = 32
#: Keys files may have many keys, and be reloaded with others.
MOST_CLIENTS = 200


class Metrics:
    """The gateway's own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "headway_requests", "Requests over, by status", ["status"], registry=self.registry
        )
        self._client_requests = Counter(
            "headway_client_requests",
            "Requests over, by the name of the client's key and status",
            ["client", "status"],
            registry=self.registry,
        )
        self._retries = Counter("headway_retries", "Legs made again", ["reason"], registry=self.registry)
        self._dispatches = Counter(
            "headway_dispatches", "Placements decided", ["worker", "why"], registry=self.registry
        )
        self._rejects = Counter(
            "headway_rejects", "Requests the policy refused", ["why"], registry=self.registry
        )
        self._recalls = Counter(
            "headway_recalls", "Placements taken back", ["worker"], registry=self.registry
        )
        self._polls = Counter(
            "headway_polls", "Snapshots the policy asked for", ["worker"], registry=self.registry
        )
        self._prompt = Counter("headway_prompt_tokens", "Prompt tokens served", registry=self.registry)
        self._output = Counter("headway_output_tokens", "Output tokens served", registry=self.registry)
        self._queue = Histogram(
            "headway_queue_seconds", "From arrival to dispatch", buckets=_SECONDS, registry=self.registry
        )
        self._ttft = Histogram(
            "headway_ttft_seconds",
            "From arrival to the first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tpot = Histogram(
            "headway_tpot_seconds", "Per token after the first", buckets=_TPOT_SECONDS, registry=self.registry
        )
        self._whole = Histogram(
            "headway_request_seconds", "From arrival to the end", buckets=_SECONDS, registry=self.registry
        )
        self._length = Histogram(
            "headway_request_prompt_tokens", "Prompt lengths", buckets=_TOKENS, registry=self.registry
        )
        self._met = Counter(
            "headway_slo",
            "Requests served, by target and whether it was met",
            ["target", "met"],
            registry=self.registry,
        )
        self._passes = Counter(
            "headway_passes", "Forward passes that ended", ["worker"], registry=self.registry
        )
        self._pass_tokens = Counter(
            "headway_pass_prompt_tokens",
            "Prompt tokens computed in passes",
            ["worker"],
            registry=self.registry,
        )
        self._pass_capacity = Counter(
            "headway_pass_capacity_tokens",
            "Prompt tokens that the passes which computed any had room for",
            ["worker"],
            registry=self.registry,
        )
        self._pass_seconds = Histogram(
            "headway_pass_seconds",
            "How long passes take",
            ["role"],
            buckets=_PASS_SECONDS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        self._shapes: dict[str, InstanceUp] = {}
        self._words: set[str] = set()
        self._clients: set[str] = set()
        self._children: dict[tuple[Counter, tuple[str, ...]], Counter] = {}

    def watch(self, buffer: Buffer, workers: Workers, elector: Elector) -> None:
        """Read gauges off the living objects when they are asked for, and forget workers that go."""
        workers.on_removed = self.forget
        limits = workers.config.limits
        for name, doc, read in (
            ("headway_ready", "Whether every role has an engine that takes work", workers.ready),
            ("headway_held_limit_requests", "Bound of the buffer", lambda: limits.buffer_requests),
            ("headway_held_limit_tokens", "Bound of the buffer", lambda: limits.buffer_tokens),
            ("headway_held_limit_bytes", "Bound of the buffer", lambda: limits.buffer_bytes),
            ("headway_held_requests", "Requests not dispatched", lambda: buffer.requests),
            ("headway_held_tokens", "Prompt tokens not dispatched", lambda: buffer.tokens),
            ("headway_held_bytes", "Bodies that arrive or are not dispatched", lambda: buffer.bytes),
            ("headway_in_flight_requests", "Requests not over", lambda: buffer.in_flight),
        ):
            self._gauge(name, doc, read)
        self.registry.register(_WorkerGauges(workers))
        self.registry.register(_LeaderGauges(elector))

    def watch_loop(self, lag: LoopLagMonitor) -> None:
        """Read how long the event loop was blocked when it is asked for."""
        doc = "Longest time that the event loop was blocked in the last minute"
        self._gauge("headway_event_loop_lag_seconds", doc, lag.longest_s)
        self.registry.register(_LoopStalls(lag))

    def watch_estimates(self, error: Callable[[], float]) -> None:
        """Read the error of estimated prompt lengths when it is asked for."""
        doc = "Mean relative error of recent estimates of prompt lengths (0: none was needed)"
        self._gauge("headway_prompt_estimate_error_ratio", doc, error)

    def observe(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """Count decisions and passes: an observer of the driver."""
        if isinstance(event, PassEnded):
            self._pass_ended(event)
        elif isinstance(event, InstanceUp):
            self._shapes[event.instance] = event
        for action in actions:
            if isinstance(action, Dispatch):
                self._count(self._dispatches, action.instance, self._word(action.why))
            elif isinstance(action, Reject):
                self._count(self._rejects, self._word(action.why))
            elif isinstance(action, Recall):
                self._count(self._recalls, action.instance)
            elif isinstance(action, Poll):
                self._count(self._polls, action.instance)

    def _pass_ended(self, event: PassEnded) -> None:
        shape = self._shapes.get(event.instance)
        if shape is None:
            return  # not a worker (any more)
        self._count(self._passes, event.instance)
        self._pass_seconds.labels(shape.role.value).observe(event.duration_s)
        ran = sum(event.ran_tokens)
        if ran:
            self._count(self._pass_tokens, event.instance, by=ran)
            self._count(self._pass_capacity, event.instance, by=len(event.ran_tokens) * shape.chunk_tokens)

    def retried(self, reason: str) -> None:
        """Count a retry."""
        self._count(self._retries, reason)

    def refused(self, status: int) -> None:
        """Count a request that never came to be served."""
        self._request_over(status)

    def done(self, over: Over, status: int) -> None:
        """Count a request that is over."""
        self._request_over(status)
        arrived_s = over.request.arrival_s
        self._length.observe(over.request.prompt_tokens)
        if over.dispatched_s is not None:
            self._queue.observe(over.dispatched_s - arrived_s)
        if status == 200 and over.first_byte_s is not None and over.ended_s is not None:
            self._served(over, over.first_byte_s - arrived_s, over.ended_s - over.first_byte_s)
            self._whole.observe(over.ended_s - arrived_s)

    def _request_over(self, status: int) -> None:
        self._count(self._requests, str(status))
        if name := CLIENT_NAME.get():
            self._count(self._client_requests, self._client(name), str(status))

    def _client(self, name: str) -> str:
        """Return the label of a client's key; past `MOST_CLIENTS` names, new ones are counted as "other"."""
        if name not in self._clients and len(self._clients) >= MOST_CLIENTS:
            return "other"
        self._clients.add(name)
        return name

    def _served(self, over: Over, ttft_s: float, decode_s: float) -> None:
        slo = over.request.slo
        self._prompt.inc(over.prompt_tokens or over.request.prompt_tokens)
        self._output.inc(over.output_tokens or 0)
        if not over.call.stream:
            return  # its first byte is its last: it tells nothing of TTFT
        self._ttft.observe(ttft_s)
        self._count(self._met, "ttft", str(ttft_s <= slo.ttft_s).lower())
        if over.output_tokens is not None and over.output_tokens > 1:
            tpot_s = decode_s / (over.output_tokens - 1)
            self._tpot.observe(tpot_s)
            self._count(self._met, "tpot", str(tpot_s <= slo.tpot_s).lower())

    def forget(self, instance: str) -> None:
        """Drop the series of a worker that was removed."""
        self._children.clear()
        self._shapes.pop(instance, None)
        for metric in (
            self._dispatches,
            self._recalls,
            self._polls,
            self._passes,
            self._pass_tokens,
            self._pass_capacity,
        ):
            metric.remove_by_labels({"worker": instance})

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self.registry)

    def _count(self, counter: Counter, *labels: str, by: float = 1.0) -> None:
        """Count up. Looking a series up by its labels costs more than counting: it is kept."""
        child = self._children.get((counter, labels))
        if child is None:
            child = self._children[counter, labels] = counter.labels(*labels)
        child.inc(by)

    def _word(self, word: str) -> str:
        if word in self._words:
            return word
        if len(self._words) >= MOST_WORDS:
            return "other"
        self._words.add(word)
        return word

    def _gauge(self, name: str, doc: str, read: Callable[[], float]) -> None:
        Gauge(name, doc, registry=self.registry).set_function(read)


class _LeaderGauges:
    """Whether this replica leads its pool, and how often it came to."""

    def __init__(self, elector: Elector) -> None:
        self._elector = elector

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Metric]:
        elector = self._elector
        leads = GaugeMetricFamily("headway_leader", "Whether this replica leads the pool", labels=["pool"])
        leads.add_metric([elector.pool], float(elector.leads()))
        terms = CounterMetricFamily("headway_leader_terms", "How often it came to lead", labels=["pool"])
        terms.add_metric([elector.pool], elector.terms)
        return [leads, terms]


class _LoopStalls:
    """How often the event loop was blocked for longer than 50 ms."""

    def __init__(self, lag: LoopLagMonitor) -> None:
        self._lag = lag

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Metric]:
        stalls = CounterMetricFamily(
            "headway_event_loop_stalls", "Times that the event loop was blocked for more than 50 ms"
        )
        stalls.add_metric([], self._lag.stalls())
        return [stalls]


class _WorkerGauges:
    """Health and work of each worker, read when asked for."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Metric]:
        up = GaugeMetricFamily("headway_worker_up", "Whether a worker takes work", labels=["worker", "role"])
        legs = GaugeMetricFamily("headway_worker_legs", "Legs under way", labels=["worker", "role"])
        ejections = GaugeMetricFamily(
            "headway_worker_ejections", "Ejections not forgiven", labels=["worker", "role"]
        )
        backpressure = CounterMetricFamily(
            "headway_engine_backpressure",
            "Requests an engine refused because it had enough to do",
            labels=["worker", "role"],
        )
        limit = GaugeMetricFamily(
            "headway_engine_limit_requests",
            "Requests an engine takes at once, as learned from its refusals",
            labels=["worker", "role"],
        )
        for worker in self._workers:
            labels = [worker.name, worker.spec.role.value]
            backpressure.add_metric(labels, worker.limit.refusals)
            if worker.limit.limit is not None:
                limit.add_metric(labels, worker.limit.limit)
            up.add_metric(labels, float(worker.state is State.UP and not worker.draining))
            legs.add_metric(labels, len(worker.legs))
            ejections.add_metric(labels, worker.health.ejections)
        return [up, legs, ejections, backpressure, limit]
