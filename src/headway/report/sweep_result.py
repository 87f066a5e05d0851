"""What a sweep of topologies gives back: points, and which of them nothing else beats.

A `Point` is one topology under one policy at one rate, over its seeds. The Pareto front holds the points that
keep the asked share of requests within both SLOs and have no other such point with both more goodput per GPU
and less latency. Without that share a swamped cluster would win: it has a high goodput, and as many angry
users.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from headway.core.errors import ConfigError
from headway.model.topology import Refusal, Topology
from headway.report.confidence import Estimate
from headway.report.metrics import Run
from headway.report.results import Cell, Provenance, flat, short_name

__all__ = ["FailedRun", "Point", "SweepResult", "latency_measure"]

_LATENCIES = ("ttft", "tpot", "e2e")
_STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True)
class Point:
    """One topology, policy, batch policy and rate; `cell` holds its runs over the seeds."""

    topology: Topology
    cell: Cell

    @property
    def goodput_per_gpu(self) -> Estimate:
        """Requests per second and GPU that met both SLOs."""
        mean, half_width = self.cell.estimate("goodput_rps")
        gpus = self.topology.gpus
        return Estimate(mean / gpus, None if half_width is None else half_width / gpus)


@dataclass(frozen=True, slots=True)
class FailedRun:
    """A simulation that came to nothing: which, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class SweepResult:
    """Topologies on one workload. `latency`: the measure of a `Run` on the front's other axis, in seconds.

    `attainment`: the share of requests within both SLOs that a point needs to be on the front. `refused`: the
    topologies that cannot be.
    """

    workload: str
    points: list[Point]
    provenance: Provenance
    latency: str = "ttft_s.p99"
    attainment: float = 0.9
    refused: list[Refusal] = field(default_factory=list)
    failed: list[FailedRun] = field(default_factory=list)

    def front(self) -> list[Point]:
        """The points that nothing beats, from the most goodput per GPU down, which is from slow to fast."""
        able = [p for p in self.points if p.cell.mean("slo_attainment") >= self.attainment]
        able.sort(key=lambda p: (-p.goodput_per_gpu.mean, p.cell.mean(self.latency)))
        front: list[Point] = []
        for point in able:
            if not front or point.cell.mean(self.latency) < front[-1].cell.mean(self.latency):
                front.append(point)
        return front

    def label(self, point: Point) -> str:
        """The shortest text that tells a point's topology and policies from the others, its rate aside."""
        cells = [other.cell for other in self.points]
        parts = [point.topology.pools]
        if len({other.topology.chunk_tokens for other in self.points}) > 1:
            parts.append(f"{point.topology.chunk_tokens:,}")
        if len({other.topology.system for other in self.points}) > 1:
            parts.insert(0, point.topology.system.upper())
        if len({cell.policy for cell in cells}) > 1:
            parts.append(short_name(point.cell.policy))
        if len({cell.batch for cell in cells}) > 1:
            parts.append(short_name(point.cell.batch))
        return " · ".join(parts)

    def runs(self) -> list[Run]:
        """Every run, in the order of the points."""
        return [run for point in self.points for run in point.cell.runs]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record per run with its topology, for a DataFrame."""
        return [
            asdict(point.topology) | {"gpus": point.topology.gpus} | flat(asdict(run))
            for point in self.points
            for run in point.cell.runs
        ]

    def to_json(self) -> str:
        """Return the document of schema `headway.sweep/1`. What is not known is null."""
        front = self.front()
        body = {
            "schema": "headway.sweep/1",
            "workload": self.workload,
            "provenance": asdict(self.provenance),
            "latency": self.latency,
            "attainment": self.attainment,
            "points": [self._point(point, point in front) for point in self.points],
            "refused": [asdict(refusal.topology) | {"why": refusal.why} for refusal in self.refused],
            "failed": [asdict(run) for run in self.failed],
        }
        return orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()

    def _point(self, point: Point, on_front: bool) -> dict[str, Any]:
        return {
            "topology": asdict(point.topology),
            "gpus": point.topology.gpus,
            "goodput_rps_per_gpu": point.goodput_per_gpu.mean,
            "latency_s": point.cell.mean(self.latency),
            "slo_attainment": point.cell.mean("slo_attainment"),
            "front": on_front,
            "runs": [asdict(run) for run in point.cell.runs],
        }


def latency_measure(name: str) -> str:
    """Read "ttft-p99" as the measure "ttft_s.p99" of a `Run`. Raises ConfigError with what there is."""
    what, _, statistic = name.partition("-")
    if what not in _LATENCIES or statistic not in _STATISTICS:
        raise ConfigError(
            f"unknown latency {name!r}: write one of {', '.join(_LATENCIES)} and one of "
            f"{', '.join(_STATISTICS)} with a dash between, such as ttft-p99"
        )
    return f"{what}_s.{statistic}"
