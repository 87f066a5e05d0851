"""What a command gives back: typed records that go into JSON, a DataFrame, a table or a figure.

`Comparison` (schema `headway.compare/1`) holds one `Run` per policy, batch policy, load and seed; a `Cell` is
one such combination over its seeds. `CapacityResult` (schema `headway.capacity/1`) holds one record per
policy.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import orjson

from headway.core.registry import split_spec
from headway.report.confidence import Estimate, estimate
from headway.report.metrics import Distribution, PassRecord, Run

__all__ = [
    "BASELINES",
    "CapacityResult",
    "CapacityRun",
    "Cell",
    "Comparison",
    "Provenance",
    "combinations",
    "flat",
    "is_baseline",
    "short_name",
]

#: The published rules that ours are judged against (algorithms §6); everything else is a candidate.
BASELINES = frozenset(
    {"round-robin", "random", "least-requests", "least-tokens", "power-of-two", "vllm-dp"}
    | {"stall-free", "vllm-v1", "prefill-first"}
)


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the numbers rest on. Rates in requests per second."""

    version: str
    command: str
    cluster_source: str
    workload_source: str
    arrivals: str
    requests: int
    seeds: tuple[int, ...]
    slo_ttft_s: float
    slo_tpot_s: float
    nominal_rps: float
    mean_prompt_tokens: float
    mean_output_tokens: float


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy and batch policy at one rate: its runs over the seeds."""

    policy: str
    batch: str
    load: float | None
    rps: float
    runs: tuple[Run, ...]

    def estimate(self, measure: str) -> Estimate:
        """Mean over seeds of a measure of `Run`, such as "slo_attainment" or "ttft_s.mean"; NaN if absent."""
        values = [_measure(run, measure) for run in self.runs]
        return estimate([v for v in values if not math.isnan(v)])

    def mean(self, measure: str) -> float:
        """Return the mean alone."""
        return self.estimate(measure).mean


@dataclass(frozen=True, slots=True)
class Comparison:
    """Policies side by side on one cluster and one workload.

    `distributions[i]` belongs to `runs[i]`. `timelines` maps a policy's label to the passes of a window in
    mid-run.
    """

    cluster: str
    workload: str
    runs: list[Run]
    provenance: Provenance
    distributions: list[Distribution] = field(default_factory=list, repr=False)
    timelines: dict[str, list[PassRecord]] = field(default_factory=dict, repr=False)

    def to_json(self) -> str:
        """Return the document of schema `headway.compare/1`. What is not known is null."""
        body = {
            "schema": "headway.compare/1",
            "cluster": self.cluster,
            "workload": self.workload,
            "provenance": asdict(self.provenance),
            "runs": [asdict(run) for run in self.runs],
        }
        return _dump(body)

    def rows(self) -> list[dict[str, Any]]:
        """One flat record per run, for a DataFrame: `ttft_s.mean`, `ttft_s.p99`, … become columns."""
        return [flat(asdict(run)) for run in self.runs]

    def cells(self) -> list[Cell]:
        """Runs grouped over their seeds, in the order of the runs."""
        groups: dict[tuple[float, str, str], list[Run]] = {}
        for run in self.runs:
            groups.setdefault((run.rps, run.policy, run.batch), []).append(run)
        return [Cell(p, b, runs[0].load, rps, tuple(runs)) for (rps, p, b), runs in groups.items()]

    def best_baseline(self, rps: float, measure: str = "ttft_s.mean") -> Cell | None:
        """The baseline with the lowest `measure` at this rate, None when no baseline ran."""
        cells = [c for c in self.cells() if c.rps == rps and is_baseline(c.policy, c.batch)]
        cells = [c for c in cells if not math.isnan(c.mean(measure))]
        return min(cells, key=lambda c: c.mean(measure), default=None)

    def label(self, policy: str, batch: str) -> str:
        """The shortest text that tells this combination from the others compared here."""
        if len({run.batch for run in self.runs}) < 2:
            return short_name(policy)
        if len({run.policy for run in self.runs}) < 2:
            return short_name(batch)
        return f"{short_name(policy)} · {short_name(batch)}"

    def distribution_of(self, cell: Cell) -> Distribution:
        """The latency distribution of the first seed of a cell."""
        for run, distribution in zip(self.runs, self.distributions, strict=False):
            if run is cell.runs[0]:
                return distribution
        return Distribution()


@dataclass(frozen=True, slots=True)
class CapacityRun:
    """The highest rate one policy carries, mean over seeds. `ci95`: its interval, None for a single seed."""

    policy: str
    batch: str
    capacity_rps: float
    ci95: tuple[float, float] | None
    slo_ttft_s: float
    slo_tpot_s: float
    attainment: float
    metric: str = "slo"
    per_seed_rps: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class CapacityResult:
    """The capacity of policies on one cluster and one workload."""

    cluster: str
    workload: str
    runs: list[CapacityRun]
    provenance: Provenance

    def to_json(self) -> str:
        """Return the document of schema `headway.capacity/1`."""
        body = {
            "schema": "headway.capacity/1",
            "cluster": self.cluster,
            "workload": self.workload,
            "provenance": asdict(self.provenance),
            "runs": [asdict(run) for run in self.runs],
        }
        return _dump(body)

    def rows(self) -> list[dict[str, Any]]:
        """One record per policy, for a DataFrame."""
        return [asdict(run) for run in self.runs]


def is_baseline(policy: str, batch: str) -> bool:
    """Whether a combination is made of published baselines only."""
    names = [split_spec(part)[0] for part in (*policy.split("+"), batch)]
    return BASELINES.issuperset(names)


def short_name(spec: str) -> str:
    """A spec as shown to a person: a module path is left out, settings stay.

    >>> short_name("my.package.mine:Patient:hold_s=0.1")
    'Patient:hold_s=0.1'
    """
    return "+".join(_short_part(part) for part in spec.split("+"))


def combinations(comparison: Comparison) -> Sequence[tuple[str, str]]:
    """Every (policy, batch) once, in the order of the runs."""
    return list(dict.fromkeys((run.policy, run.batch) for run in comparison.runs))


def _short_part(spec: str) -> str:
    name, texts = split_spec(spec)
    return ":".join([name.rpartition(":")[2], *(f"{key}={value}" for key, value in texts.items())])


def _measure(run: Run, measure: str) -> float:
    name, _, key = measure.partition(".")
    value = getattr(run, name)
    return float(value.get(key, math.nan)) if key else float(value)


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its inner dicts spread out: `ttft_s.mean`, `ttft_s.p99`, …"""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _dump(body: dict[str, Any]) -> str:
    return orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()
