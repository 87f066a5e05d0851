"""Takes part in distributed traces: W3C trace context in and out, and spans where OpenTelemetry is there.

    POST /v1/chat/completions   server span, from arrival to end; what engines get as their parent
      queue                     from arrival to the (last) dispatch
      prefill                   to the first token
      decode                    to the end
      generate                  prefill and decode, where an answer that does not stream hides the border

Spans are made when the request is over, from times that are noted anyway. Without an exporter the context
is handed on as it came: engines that trace still join the client's trace. None is invented, because an
engine takes an unsampled parent as an order not to sample.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.hosts.gateway.config import TracesSpec

if TYPE_CHECKING:
    from headway.hosts.gateway.flight import Flight

__all__ = ["NO_TRACE", "SpanTracing", "Trace", "Tracing", "make_tracing"]

#: Version, trace id, parent id, flags (W3C Trace Context §3.2); versions after 00 may have more.
_TRACEPARENT = re.compile(
    r"(?:00|(?!ff)[0-9a-f]{2}(?=.{53}(?:-|$)))-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)
MOST_STATE_BYTES = 512


class Trace:
    """A request's place in a trace. `headers`: what engines get of it. `trace_id`: None outside of traces."""

    __slots__ = ("headers", "span", "trace_id")

    def __init__(self, trace_id: str | None, headers: Mapping[str, str], span: Any = None) -> None:
        self.trace_id = trace_id
        self.headers = headers
        self.span = span


NO_TRACE = Trace(None, {})


class Tracing:
    """Hands the context on as it came, if it is sound."""

    def begin(self, path: str, headers: Mapping[str, str], arrived_s: float) -> Trace:
        """Return the trace of a request with these headers."""
        given = headers.get("traceparent")
        if given is None:
            return NO_TRACE
        sound = _TRACEPARENT.fullmatch(given)
        if sound is None or (given.startswith("00") and sound[2]):
            return NO_TRACE  # §4.3: what cannot be parsed is not handed on, nor is its state
        context = {"traceparent": given}
        state = headers.get("tracestate", "")
        if 0 < len(state) <= MOST_STATE_BYTES:
            context["tracestate"] = state
        return Trace(sound[1], context)

    def done(self, flight: "Flight", status: int) -> None:
        """Note that a request is over, with the status its client was given."""

    async def close(self) -> None:
        """Send what waits to be sent."""


class Provider(Protocol):
    """An OpenTelemetry tracer provider."""

    def get_tracer(self, instrumenting_module_name: str) -> Any:
        """Return a tracer."""


class SpanTracing(Tracing):
    """Makes spans. `clock`: what the flights' times are of. Needs the `opentelemetry` packages."""

    def __init__(self, provider: Provider, clock: Callable[[], float]) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._context = TraceContextTextMapPropagator()
        self._provider = provider
        self._tracer = provider.get_tracer("headway")
        self._clock = clock

    def begin(self, path: str, headers: Mapping[str, str], arrived_s: float) -> Trace:
        """See `Tracing.begin`. A request outside of traces begins one."""
        parent = self._context.extract(super().begin(path, headers, arrived_s).headers)
        span = self._tracer.start_span(
            f"POST {path}",
            context=parent,
            kind=self._api.SpanKind.SERVER,
            start_time=self._wall_ns(arrived_s),
        )
        context: dict[str, str] = {}
        self._context.inject(context, context=self._api.set_span_in_context(span))
        return Trace(f"{span.get_span_context().trace_id:032x}", context, span)

    def done(self, flight: "Flight", status: int) -> None:
        """See `Tracing.done`."""
        span = flight.trace.span
        if span is None:
            return
        if span.is_recording():
            self._children(flight)
            span.set_attributes(_attributes(flight, status))
            if status >= 500:
                span.set_status(self._api.StatusCode.ERROR)
        span.end()

    async def close(self) -> None:
        """See `Tracing.close`."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            await asyncio.to_thread(shutdown)

    def _children(self, flight: "Flight") -> None:
        inside = self._api.set_span_in_context(flight.trace.span)
        for name, start_s, end_s in _phases(flight):
            span = self._tracer.start_span(name, context=inside, start_time=self._wall_ns(start_s))
            span.end(self._wall_ns(end_s))

    def _wall_ns(self, at_s: float) -> int:
        """Return a time of the clock as nanoseconds of the wall's."""
        return time.time_ns() - round((self._clock() - at_s) * 1e9)


def _phases(flight: "Flight") -> list[tuple[str, float, float]]:
    """Return (name, start, end) of what the request went through."""
    arrived_s, sent_s, prefilled_s = flight.request.arrival_s, flight.dispatched_s, flight.prefill_done_s
    ended_s = arrived_s if flight.ended_s is None else flight.ended_s
    if sent_s is None:
        return [("queue", arrived_s, ended_s)]
    phases = [("queue", arrived_s, sent_s)]
    if not flight.call.stream and flight.role_at_last() is Role.AGGREGATED:
        return [*phases, ("generate", sent_s, ended_s)]
    if prefilled_s is None:
        return [*phases, ("prefill", sent_s, ended_s)]
    return [*phases, ("prefill", sent_s, prefilled_s), ("decode", prefilled_s, ended_s)]


def _attributes(flight: "Flight", status: int) -> dict[str, Any]:
    request = flight.request
    known = {
        "http.request.method": "POST",
        "url.path": flight.call.path,
        "http.response.status_code": status,
        "gen_ai.request.model": flight.call.model,
        "gen_ai.request.max_tokens": flight.call.max_tokens,
        "gen_ai.usage.input_tokens": flight.prompt_tokens or request.prompt_tokens,
        "gen_ai.usage.output_tokens": flight.output_tokens,
        "headway.request_id": request.id,
        "headway.instances": tuple(flight.instances),
        "headway.why": flight.why,
        "headway.failed_legs": flight.attempts,
        "headway.slo.ttft_s": request.slo.ttft_s,
        "headway.slo.tpot_s": request.slo.tpot_s,
    }
    return {name: value for name, value in known.items() if value is not None}


def make_tracing(spec: TracesSpec, clock: Callable[[], float]) -> Tracing:
    """Build what `[traces]` says. Raises ConfigError when OpenTelemetry is wanted but not installed."""
    if spec.otlp_endpoint is None:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise ConfigError(f"traces.otlp_endpoint: {error.name} is missing, install headway[traces]") from None
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(spec.sample_ratio),
        resource=Resource.create({"service.name": spec.service_name}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=f"{spec.otlp_endpoint}/v1/traces", timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return SpanTracing(provider, clock)
