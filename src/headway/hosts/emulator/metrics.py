"""Decides what `/metrics` and `/v1/loads` say: vLLM's or SGLang's names and labels, a series per rank."""

import time
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from headway.core.events import Role
from headway.hosts.emulator.driver import Driver, Job, Pass

__all__ = ["Dialect", "Metrics"]

Dialect = Literal["vllm", "sglang"]

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

#: Ours → theirs. SGLang has no counter of preemptions by this name and no histogram of step sizes.
_NAMES: dict[Dialect, dict[str, str]] = {
    "vllm": {
        "running": "vllm:num_requests_running",
        "waiting": "vllm:num_requests_waiting",
        "kv": "vllm:kv_cache_usage_perc",
        "preemptions": "vllm:num_preemptions",
        "prompt": "vllm:prompt_tokens",
        "generation": "vllm:generation_tokens",
        "step": "vllm:iteration_tokens_total",
        "ttft": "vllm:time_to_first_token_seconds",
        "e2e": "vllm:e2e_request_latency_seconds",
        "success": "vllm:request_success",
    },
    "sglang": {
        "running": "sglang:num_running_reqs",
        "waiting": "sglang:num_queue_reqs",
        "kv": "sglang:token_usage",
        "preemptions": "sglang:num_retracted_reqs",
        "prompt": "sglang:prompt_tokens",
        "generation": "sglang:generation_tokens",
        "step": "sglang:iteration_tokens_total",
        "ttft": "sglang:time_to_first_token_seconds",
        "e2e": "sglang:e2e_request_latency_seconds",
        "success": "sglang:num_requests",
    },
}
_GAUGES = ("running", "waiting", "kv")
_COUNTERS = ("preemptions", "prompt", "generation", "success")
_HISTOGRAMS = {"step": _TOKENS, "ttft": _SECONDS, "e2e": _SECONDS}


class _Series:
    """The series of one rank."""

    def __init__(self, families: dict[str, Any], labels: dict[str, str]) -> None:
        children = {name: family.labels(**labels) for name, family in families.items()}
        self.gauges: dict[str, Gauge] = {name: children[name] for name in _GAUGES}
        self.counters: dict[str, Counter] = {name: children[name] for name in _COUNTERS}
        self.histograms: dict[str, Histogram] = {name: children[name] for name in _HISTOGRAMS}


class Metrics:
    """Counts what the engines of one instance do."""

    def __init__(self, dialect: Dialect, model: str, role: Role, ranks: int) -> None:
        labels = [_labels(dialect, model, role, rank) for rank in range(ranks)]
        self._registry = CollectorRegistry()
        families = _families(_NAMES[dialect], list(labels[0]), self._registry)
        self._rank_label = "engine" if dialect == "vllm" else "dp_rank"
        self._ranks = [_Series(families, each) for each in labels]
        self._preemptions: dict[int, int] = {}

    def passed(self, passed: Pass) -> None:
        """Count a pass."""
        first, outcome = passed.first_rank, passed.outcome
        for place, (ran, decodes) in enumerate(zip(outcome.ran_tokens, outcome.decodes, strict=True)):
            if ran or decodes:
                rank = self._ranks[first + place]
                rank.histograms["step"].observe(ran + decodes)
                if ran:
                    rank.counters["prompt"].inc(ran)
                if decodes:
                    rank.counters["generation"].inc(decodes)
        for work in outcome.first_tokens:
            self._ranks[first + work.rank].counters["generation"].inc()
        self._count_preemptions(first, passed.preemptions)

    def finished(self, job: Job, ttft_s: float, e2e_s: float) -> None:
        """Count a request that is done; times in wall seconds."""
        rank = self._ranks[job.rank]
        rank.histograms["ttft"].observe(ttft_s)
        rank.histograms["e2e"].observe(e2e_s)
        rank.counters["success"].inc()

    def render(self, driver: Driver, only: int | None = None) -> bytes:
        """Return the exposition of all ranks, or of the one whose port was asked."""
        for load, rank in zip(self.loads(driver), self._ranks, strict=True):
            rank.gauges["running"].set(load["num_running_reqs"])
            rank.gauges["waiting"].set(load["num_waiting_reqs"])
            rank.gauges["kv"].set(load["token_usage"])
        whole = generate_latest(self._registry)
        if only is None:
            return whole
        mark = f'{self._rank_label}="{only}"'.encode()
        return b"".join([line for line in whole.splitlines(True) if line[:1] == b"#" or mark in line])

    def loads(self, driver: Driver) -> list[dict[str, Any]]:
        """Return the load of each rank, as `/v1/loads` words it."""
        pool = driver.instance.pool
        return [
            {
                "dp_rank": rank,
                "num_running_reqs": load.running,
                "num_waiting_reqs": load.waiting,
                "num_used_tokens": load.kv_blocks * pool.block_tokens,
                "max_total_num_tokens": pool.kv_tokens,
                "token_usage": load.kv_blocks / pool.kv_blocks,
                "max_running_requests": pool.max_running,
            }
            for rank, load in enumerate(driver.loads())
        ]

    def loads_answer(self, driver: Driver) -> dict[str, Any]:
        """Return the body of `/v1/loads`."""
        loads = self.loads(driver)
        names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
        total = {f"total_{name.removeprefix('num_')}": sum(load[name] for load in loads) for name in names}
        return {
            "timestamp": time.time(),
            "dp_rank_count": len(loads),
            "loads": loads,
            "aggregate": total,
        }

    def _count_preemptions(self, first_rank: int, total: int) -> None:
        """Of a lockstep group only the sum is known; it is shown at its first rank."""
        before = self._preemptions.get(first_rank, 0)
        if total > before:
            self._ranks[first_rank].counters["preemptions"].inc(total - before)
        self._preemptions[first_rank] = total


def _families(names: dict[str, str], labels: list[str], registry: CollectorRegistry) -> dict[str, Any]:
    """All metrics by our name for them."""
    kinds: dict[str, Any] = dict.fromkeys(_GAUGES, Gauge) | dict.fromkeys(_COUNTERS, Counter)
    families = {
        name: kind(names[name], names[name].partition(":")[2], labels, registry=registry)
        for name, kind in kinds.items()
    }
    for name, buckets in _HISTOGRAMS.items():
        text = names[name].partition(":")[2]
        families[name] = Histogram(names[name], text, labels, registry=registry, buckets=buckets)
    return families


def _labels(dialect: Dialect, model: str, role: Role, rank: int) -> dict[str, str]:
    if dialect == "vllm":
        return {"engine": str(rank), "model_name": model}
    kind = "unified" if role is Role.AGGREGATED else str(role)
    return {"model_name": model, "engine_type": kind, "tp_rank": "0", "pp_rank": "0", "dp_rank": str(rank)}
