"""Works out what the page shows at a moment: one JSON object, told anew about four times a second.

What lasts (workers, held requests, percentiles) is told whole; what happens (passes, decisions) once, from
where the viewer was told last. Between two readings in quick succession nothing is worked out again, so
that many viewers cost little more than one.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import orjson

from headway.core.cluster import Held
from headway.core.decision_log import encode
from headway.front.admin import describe
from headway.front.buffer import Buffer
from headway.front.driver import Driver
from headway.front.lease import Elector
from headway.front.worker import Worker
from headway.front.workers import Workers
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.observer import Observer, Pass

__all__ = ["SCHEMA", "Cursor", "Live"]

#: Raised when a field changes its meaning.
SCHEMA = "headway.live/1"
#: How far the lanes go back, and the latencies.
LANES_S, LATENCIES_S = 10.0, 60.0
#: Of the held requests this many are told one by one, the oldest.
MOST_HELD = 40
#: What lasts is as new as this; with a long buffer it may be older, for explaining each hold takes a walk.
FRESH_S, LONG_FRESH_S, LONG = 0.2, 1.0, 2000


class Cursor(NamedTuple):
    """What a viewer has been told: the numbers of the last pass and the last decision."""

    passes: int = 0
    decisions: int = 0


class Live:
    """The running gateway as the page sees it."""

    def __init__(
        self,
        config: GatewayConfig,
        observer: Observer,
        driver: Driver,
        workers: Workers,
        buffer: Buffer,
        elector: Elector,
    ) -> None:
        self._config = config
        self._observer = observer
        self._driver = driver
        self._workers = workers
        self._buffer = buffer
        self._elector = elector
        self._state: dict[str, object] = {}
        self._stale_s = -math.inf

    def tell(self, cursor: Cursor, now: float) -> tuple[bytes, Cursor]:
        """Return the JSON object for a viewer who was told up to `cursor`, and where he is then."""
        if now >= self._stale_s:
            self._state = self._look(now)
            long = self._buffer.requests > LONG
            self._stale_s = now + (LONG_FRESH_S if long else FRESH_S)
        seen, decided = self._observer.passes, self._observer.decisions
        news = {
            "now_s": now,
            "passes": [_pass(p) for p in seen if p.number > cursor.passes and p.at_s > now - LANES_S],
            "decisions": [
                orjson.Fragment(encode(d.at_s, d.event, d.action))
                for d in decided
                if d.number > cursor.decisions
            ],
        }
        reached = Cursor(
            seen[-1].number if seen else cursor.passes, decided[-1].number if decided else cursor.decisions
        )
        return orjson.dumps(self._state | news, default=list), reached

    def _look(self, now: float) -> dict[str, object]:
        self._observer.keep(worker.name for worker in self._workers)
        return {
            "schema": SCHEMA,
            "policy": self._config.policy.cluster,
            "ready": self._workers.ready() and self._elector.leads(),
            "leader": self._elector.standing() if self._elector.shared else None,
            "lanes_s": LANES_S,
            "totals": self._observer.totals,
            "in_flight": self._buffer.in_flight,
            "held": self._held(now),
            "latency": self._latency(now),
            "workers": [self._worker(worker) for worker in self._workers],
        }

    def _held(self, now: float) -> dict[str, object]:
        held = self._driver.held()
        limits = self._config.limits
        return {
            "requests": self._buffer.requests,
            "tokens": self._buffer.tokens,
            "bytes": self._buffer.bytes,
            "limits": {
                "requests": limits.buffer_requests,
                "tokens": limits.buffer_tokens,
                "bytes": limits.buffer_bytes,
            },
            "in_policy": len(held),
            "reasons": dict(Counter(each.why for each in held).most_common(16)),
            "oldest": [
                self._hold(each, now) for each in heapq.nsmallest(MOST_HELD, held, key=lambda h: h.since_s)
            ],
        }

    def _hold(self, held: Held, now: float) -> dict[str, object]:
        request = self._observer.requests.get(held.request_id)
        return {
            "id": held.request_id,
            "held_s": now - held.since_s,
            "why": held.why,
            "prompt_tokens": None if request is None else request.prompt_tokens,
            "left_s": None if request is None else request.arrival_s + request.slo.ttft_s - now,
        }

    def _latency(self, now: float) -> dict[str, object]:
        recent = [each for each in self._observer.latencies if each.at_s > now - LATENCIES_S]
        slo = self._config.slo
        streams = [each for each in recent if each.tpot_s is not None]
        return {
            "window_s": LATENCIES_S,
            "ttft": _summary([e.ttft_s for e in recent], sum(e.ttft_met for e in recent), slo.ttft_s),
            "tpot": _summary(
                [e.tpot_s for e in streams if e.tpot_s is not None],
                sum(e.tpot_met for e in streams),
                slo.tpot_s,
            ),
        }

    def _worker(self, worker: Worker) -> dict[str, object]:
        shape = self._observer.shapes.get(worker.name)
        loads = sorted(
            (first, load) for (name, first), load in self._observer.loads.items() if name == worker.name
        )
        return describe(worker) | {
            "takes_work": worker.takes_work(),
            "chunk_tokens": worker.chunk_tokens,
            "kv_blocks": None if shape is None else shape.kv_blocks,
            "max_running": None if shape is None else shape.max_running,
            "load": [
                {
                    "first_rank": first,
                    "queued_tokens": load.queued_tokens,
                    "kv_blocks": load.kv_blocks,
                    "running": load.running,
                    "waiting": load.waiting,
                }
                for first, load in loads
            ],
        }


def _pass(ended: Pass) -> dict[str, object]:
    report = ended.report
    return {
        "instance": report.instance,
        "first_rank": report.first_rank,
        "end_s": ended.at_s,
        "duration_s": report.duration_s,
        "ran_tokens": report.ran_tokens,
        "running": report.running,
    }


def _summary(values: Sequence[float], met: int, target_s: float) -> dict[str, float | int | None]:
    """Percentiles are the nearest rank's; None when there is nothing to tell."""
    ordered = sorted(values)
    count = len(ordered)
    shares = {f"p{p}_s": ordered[math.ceil(count * p / 100) - 1] if count else None for p in (50, 90, 99)}
    return shares | {"requests": count, "met": met / count if count else None, "target_s": target_s}
