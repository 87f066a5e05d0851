"""Reads the load of an engine's ranks from its public pages: the last resort, for it is old when it is read.

vLLM: `/metrics` (`vllm:num_requests_running` and others, one line for each engine core). SGLang: `/v1/loads`,
else `/metrics`. A value that is NaN or infinite counts as not reported.

Rule 1  (labels)     vLLM labels its lines with global ranks: a server of ranks 4 and 5 says `engine="4"` and
                     `engine="5"`, one that is rank 3 alone says `engine="3"`. As many labels as the instance
                     has ranks, in a row, are its ranks in order.
Rule 2  (as one)     a server with several ranks that is configured as one counts as their sum, its KV usage
                     as their mean.
Rule 3  (otherwise)  the labels contradict the configuration: nothing is read. As with rule 2, `Load.doubt`
                     says so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

__all__ = ["Load", "read_loads", "read_metrics"]

_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
_RANK_LABELS = ("engine", "dp_rank")

_ByRank = Mapping[int, float]


@dataclass(slots=True)
class Load:
    """Of each rank: requests that run and wait, and the share of its KV in use. None: not reported.

    `doubt`: how the page contradicts the configured number of ranks; empty: it does not.
    """

    running: tuple[int, ...] | None = None
    waiting: tuple[int, ...] | None = None
    kv_usage: tuple[float, ...] | None = None
    doubt: str = ""


def read_metrics(text: str, ranks: int) -> Load:
    """Read Prometheus text. A value that is not there for every rank counts as not reported."""
    found: dict[str, dict[int, float]] = {}
    for line in text.splitlines():
        if line.startswith(("vllm:", "sglang:")):
            _read_line(line, found)
    running, waiting, usage = (
        next((found[name] for name in names if name in found), {}) for names in (_RUNNING, _WAITING, _USAGE)
    )
    return _load(running, waiting, usage, ranks)


def _load(running: _ByRank, waiting: _ByRank, usage: _ByRank, ranks: int) -> Load:
    """Take the values of the instance's ranks out of those by label."""
    labels = sorted({*running, *waiting, *usage})
    if not labels:
        return Load()
    shown = ", ".join(map(str, labels[:16])) + (" and more" if len(labels) > 16 else "")
    doubt = f"its metrics are of rank{'s' if len(labels) > 1 else ''} {shown}, configured is ranks = {ranks}"
    if ranks == 1 and len(labels) > 1:
        mean = _summed(usage, labels, share=1 / len(labels))
        doubt += ": taken as one, their sum"
        return Load(_ints(_summed(running, labels)), _ints(_summed(waiting, labels)), mean, doubt)
    if len(labels) != ranks or labels[-1] - labels[0] >= ranks:
        return Load(doubt=f"{doubt}: its load is not read")
    return Load(_ints(_whole(running, labels)), _ints(_whole(waiting, labels)), _whole(usage, labels))


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


def _whole(values: _ByRank, labels: list[int]) -> tuple[float, ...] | None:
    return tuple(values[rank] for rank in labels) if len(values) == len(labels) else None


def _summed(values: _ByRank, labels: list[int], share: float = 1.0) -> tuple[float, ...] | None:
    whole = _whole(values, labels)
    return None if whole is None else (sum(whole) * share,)


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
    """Read SGLang's `/v1/loads`; None when it is not that, or not of these ranks."""
    try:
        loads = msgspec.json.decode(body, type=_Loads).loads
    except (msgspec.DecodeError, RecursionError):
        return None
    load = _load(
        {each.dp_rank: each.num_running_reqs for each in loads if each.num_running_reqs is not None},
        {each.dp_rank: each.num_waiting_reqs for each in loads if each.num_waiting_reqs is not None},
        {each.dp_rank: each.token_usage for each in loads if each.token_usage is not None},
        ranks,
    )
    return load if load != Load(doubt=load.doubt) else None
