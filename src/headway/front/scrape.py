"""Reads an engine's load off its public pages: the last resort, for it is old when it is read.

vLLM: `/metrics` (`vllm:num_requests_running` …, one line per engine core). SGLang: `/v1/loads`, else
`/metrics`. NaN and infinity count as not told.
"""

import math
from dataclasses import dataclass

import msgspec

__all__ = ["Load", "read_loads", "read_metrics"]

_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
_RANK_LABELS = ("engine", "dp_rank")


@dataclass(slots=True)
class Load:
    """Of each rank: requests that run and wait, and the share of its KV in use. None: not told."""

    running: tuple[int, ...] | None = None
    waiting: tuple[int, ...] | None = None
    kv_usage: tuple[float, ...] | None = None


def read_metrics(text: str, ranks: int) -> Load:
    """Read Prometheus text. A value that is not there for every rank counts as not told."""
    found: dict[str, dict[int, float]] = {}
    for line in text.splitlines():
        if line.startswith(("vllm:", "sglang:")):
            _read_line(line, found)
    running, waiting = _whole(found, _RUNNING, ranks), _whole(found, _WAITING, ranks)
    return Load(_ints(running), _ints(waiting), _whole(found, _USAGE, ranks))


def _read_line(line: str, found: dict[str, dict[int, float]]) -> None:
    name, brace, rest = line.partition("{")
    labels, _, value = rest.rpartition("}")
    if not brace:
        name, _, value = line.partition(" ")
    if name not in (*_RUNNING, *_WAITING, *_USAGE):
        return
    try:
        rank, number = _rank(labels), float(value.split()[0])
    except (ValueError, IndexError):
        return
    if math.isfinite(number):
        found.setdefault(name, {})[rank] = number


def _rank(labels: str) -> int:
    for pair in labels.split(","):
        key, _, value = pair.partition("=")
        if key.strip() in _RANK_LABELS:
            return int(value.strip().strip('"') or 0)
    return 0


def _whole(
    found: dict[str, dict[int, float]], names: tuple[str, ...], ranks: int
) -> tuple[float, ...] | None:
    told = next((found[name] for name in names if name in found), {})
    return tuple(told[rank] for rank in range(ranks)) if all(rank in told for rank in range(ranks)) else None


def _ints(values: tuple[float, ...] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(round(value) for value in values)


class _RankLoad(msgspec.Struct):
    dp_rank: int = 0
    num_running_reqs: int | None = None
    num_waiting_reqs: int | None = None
    token_usage: float | None = None


class _Loads(msgspec.Struct):
    loads: list[_RankLoad]


def read_loads(body: bytes, ranks: int) -> Load | None:
    """Read SGLang's `/v1/loads`; None when it is not that."""
    try:
        told = {load.dp_rank: load for load in msgspec.json.decode(body, type=_Loads).loads}
    except msgspec.DecodeError:
        return None
    if any(rank not in told for rank in range(ranks)):
        return None
    in_order = [told[rank] for rank in range(ranks)]
    running = [load.num_running_reqs for load in in_order if load.num_running_reqs is not None]
    waiting = [load.num_waiting_reqs for load in in_order if load.num_waiting_reqs is not None]
    usage = [load.token_usage for load in in_order if load.token_usage is not None]
    return Load(
        tuple(running) if len(running) == ranks else None,
        tuple(waiting) if len(waiting) == ranks else None,
        tuple(usage) if len(usage) == ranks else None,
    )
