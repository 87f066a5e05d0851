"""Staggered batch scheduling in front of a real engine in lockstep, against those who send at once.

    make test-engine                                   # once: prepares .venv-vllm
    python -m benchmarks.vllm_lockstep run --trace FILE --rounds 4 --out out
    python -m benchmarks.vllm_lockstep report --out out

The engine is one vLLM server on the CPU: a tiny random Qwen3-MoE whose two ranks meet in every MoE layer, so
that each pass is as long as its fuller rank makes it. Headway's scheduler class sits in it with the policy
`vllm-v1`, which leaves every step to vLLM and only tells of passes. Contenders are cluster policies of
`headway serve` in front of that server (`POLICY@inferred`: the gateway is not told where the events are), and
`vllm`: the client straight at the server, which chooses the rank itself. They run one after the other; within
a round all of them get the very same requests, in turning order. Arrivals are open-loop, the lengths a
trace's, scaled, so that a prompt is a fair part of a chunk; answers are cut short, so that prefill decides.

Capacity is what the server does when it never runs dry, asked directly; loads are fractions of it. Client,
gateway, front end and both ranks share the machine's cores.

`run` appends to OUT/vllm_lockstep.jsonl and goes on where an earlier call stopped. `report` makes the table,
OUT/vllm_lockstep.json and OUT/vllm_lockstep.png of it, with what the simulator says of the same requests on
a model of this engine, whose pass times are fitted to the passes that were measured.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.children import headway_serve
from benchmarks.replay import LEAD_S, Ask, loop_factory, replay, whole
from benchmarks.rounds import spread, turned
from headway.core.events import PassEnded
from headway.core.request import Slo
from headway.hosts.sim import simulate
from headway.hosts.sim.counters import PassCounters
from headway.model.cluster import ClusterSpec
from headway.model.costs import LockstepCosts, PhaseCosts
from headway.model.engine import PassOutcome
from headway.report.metrics import Outcome, Run, summarise
from headway.report.tables import Column, Grid, to_rich
from headway.wire.subscriber import Subscriber
from headway.workload import Item, Workload, load_trace, make_items, parametric

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engine"))  # its servers and models
from doors import BLOCK_TOKENS, Place, place
from models import tiny_moe
from servers import Engine, serving

RANKS = 2
MODEL = "tiny-moe"
MAX_MODEL_LEN = 4096
VOCABULARY = 40_000
RECORD = "vllm_lockstep.jsonl"
#: In flight together while capacity is measured, and how many requests that takes.
CLOSED_LOOP, CLOSED_REQUESTS = 48, 240
#: Before each run, the same for all: the gateway learns what a pass takes, the server wakes up.
WARM_LOOP, WARM_REQUESTS = 8, 24
#: One at a time, far enough apart for the ranks to rest, to see what lies between client and engine.
PROBES, PROBE_GAP_S, PROBE_TOKENS = 20, 1.0, 64
#: No target binds: what is measured is how soon, not whether soon enough.
SLO = Slo(ttft_s=60.0, tpot_s=5.0)
DIRECT = "vllm"
#: What stands for a contender in the simulator, where it is not the policy of that name.
SIMULATED = {DIRECT: "vllm-dp", "staggered@inferred": None}
_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#999999")

Row = dict[str, Any]


class Pass(NamedTuple):
    """A pass as the engine told it. `at_s`: when that was heard, on the run's clock; tuples are per rank."""

    at_s: float
    duration_s: float
    ran_tokens: tuple[int, ...]
    queued_tokens: tuple[int, ...]
    running: tuple[int, ...]


class Measured(NamedTuple):
    """One run of one contender. `gaps_s`: between the tokens of an answer, at the client."""

    contender: str
    load: float
    round: int
    rps: float
    outcomes: list[Outcome]
    gaps_s: list[float]
    passes: list[Pass]

    def items(self) -> list[Item]:
        """Return the requests."""
        return [Item(o.arrival_s, o.prompt_tokens, o.output_tokens) for o in self.outcomes]

    def counters(self, chunk_tokens: int) -> PassCounters:
        """Count the passes as the simulator does."""
        counters = PassCounters()
        for each in self.passes:
            counters.add(PassOutcome([], [], each.ran_tokens, each.running), chunk_tokens)
        return counters

    def run(self, chunk_tokens: int) -> Run:
        """Condense it."""
        counters = self.counters(chunk_tokens)
        return summarise(
            self.outcomes,
            policy=self.contender,
            batch="",
            load=self.load,
            rps=self.rps,
            seed=self.round,
            chunk_utilisation=counters.chunk_utilisation,
            bubble=counters.bubble,
        )


# The load


def shortened(workload: Workload, share: float, most_output: int) -> Workload:
    """Shorten prompts and answers to a share of what they were, and to what the model takes."""

    def length(tokens: int, most: int) -> int:
        return max(1, min(most, round(share * tokens)))

    items = [
        Item(
            i.arrival_s,
            length(i.prompt_tokens, MAX_MODEL_LEN - most_output),
            length(i.output_tokens, most_output),
        )
        for i in workload.items
    ]
    return dataclasses.replace(workload, items=items)


def ask(seed: int) -> Callable[[int, Item], Ask]:
    """Return what makes the requests of a round: token ids that no other prompt begins with."""

    def one(number: int, item: Item) -> Ask:
        ids = random.Random(f"{seed}/{number}").choices(range(1000, VOCABULARY), k=item.prompt_tokens)
        body = {"model": MODEL, "prompt": ids, "max_tokens": item.output_tokens, "ignore_eos": True}
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        return Ask(body | usage | {"temperature": 0.0}, whole)

    return one


async def closed_loop(url: str, items: Sequence[Item], *, together: int, seed: int) -> list[float]:
    """Keep so many requests in flight; return when each was done, in order."""
    waiting, ends = iter(enumerate(items)), []
    make = ask(seed)

    async def worker() -> None:
        for number, item in waiting:
            await replay(url, lambda _, it, n=number: make(n, it), [item._replace(arrival_s=0.0)], slo=SLO)
            ends.append(asyncio.get_running_loop().time())

    await asyncio.gather(*(worker() for _ in range(together)))
    return sorted(ends)


class Pieces:
    """Hears the pieces of all answers, and keeps the gaps between those that bring tokens."""

    def __init__(self) -> None:
        self.gaps_s: list[float] = []
        self._last_s: dict[int, float] = {}

    def __call__(self, number: int, at_s: float, piece: bytes) -> None:
        """Take in a piece; the last one of an answer tells of usage only."""
        if b'"choices":[{' in piece:
            if number in self._last_s:
                self.gaps_s.append(at_s - self._last_s[number])
            self._last_s[number] = at_s


# The runs


@contextmanager
def door(contender: str, engine: Mapping[str, Any]) -> Iterator[str]:
    """Yield where the client is to go: a gateway in a process of its own, or the engine itself."""
    if contender == DIRECT:
        yield engine["url"]
        return
    policy, _, how = contender.partition("@")
    hidden = ("events", "snapshots") if how == "inferred" else ()
    data = {
        "server": {"port": 0, "drain_timeout_s": 1.0},
        "instances": [{key: value for key, value in engine.items() if key not in hidden}],
        "policy": {"cluster": policy},
        "logs": {"level": "warning", "access": False},
    }
    with headway_serve(data) as url:
        yield url


async def watched(
    url: str, engine: Mapping[str, Any], items: Sequence[Item], seed: int
) -> tuple[list[Outcome], list[float], list[Pass]]:
    """Warm up, then replay the items; return outcomes, gaps, and the passes meanwhile."""
    loop = asyncio.get_running_loop()
    heard: list[tuple[float, PassEnded]] = []
    await closed_loop(url, items[:WARM_REQUESTS], together=WARM_LOOP, seed=1000 + seed)
    pieces = Pieces()

    def hear(event: object) -> None:
        if isinstance(event, PassEnded):
            heard.append((loop.time(), event))

    async with Subscriber(engine["events"], engine["snapshots"], hear):
        zero_s = loop.time() + LEAD_S
        outcomes = await replay(url, ask(seed), items, slo=SLO, on_piece=pieces)
        await asyncio.sleep(0.1)  # the last pass is on its way
    passes = [
        Pass(at_s - zero_s, e.duration_s, e.ran_tokens, e.queued_tokens or (), e.running or ())
        for at_s, e in heard
    ]
    return outcomes, pieces.gaps_s, passes


def prepared(given: argparse.Namespace) -> Place:
    """Say what engine it is."""
    model = tiny_moe(Path(given.python).resolve().parent.parent / "models" / MODEL)
    engine = Engine(
        model,
        ranks=RANKS,
        max_model_len=MAX_MODEL_LEN,
        batch_tokens=given.chunk,
        arguments=("--no-enable-prefix-caching",),
    )
    return place("vllm-v1", engine, "engine-0", lockstep=True)


def measure(given: argparse.Namespace) -> None:
    """Do the runs that the record has not."""
    workload = _workload(given)
    record = given.out / RECORD
    head, done = read_record(record)
    contenders = given.contenders.split(",")
    its_place = prepared(given)
    with (
        serving(its_place.engine, python=given.python, logs=given.out) as (server,),
        asyncio.Runner(loop_factory=loop_factory()) as runner,
    ):
        engine = its_place.at(server)
        if head is None:
            head = runner.run(_first_look(given, engine, workload))
            _append(record, head)
        print(
            f"capacity {head['capacity_rps']:.2f} requests/s, to the engine {1e3 * head['there_s']:.1f} ms, "
            f"back {1e3 * head['back_s']:.1f} ms",
            flush=True,
        )
        known = {(m.contender, m.load, m.round) for m in done}
        for number in range(given.rounds):
            for turn, load in enumerate(map(float, given.loads.split(","))):
                rps = load * head["capacity_rps"]
                count = max(WARM_REQUESTS, round(rps * given.seconds))
                items = make_items(workload, rps=rps, arrivals=given.arrivals, requests=count, seed=number)
                for contender in turned(contenders, number + turn):
                    if (contender, load, number) in known:
                        continue
                    with door(contender, engine) as url:
                        found = runner.run(watched(url, engine, items, number))
                    one = Measured(contender, load, number, rps, *found)
                    _append(record, _row(one))
                    print(_line(one, given.chunk), flush=True)


async def _first_look(given: argparse.Namespace, engine: Mapping[str, Any], workload: Workload) -> Row:
    """Measure the capacity, then what lies between client and engine when nothing else is there."""
    url = engine["url"]
    items = make_items(workload, rps=1.0, arrivals="poisson", requests=CLOSED_REQUESTS, seed=99)
    await closed_loop(url, items[:WARM_REQUESTS], together=WARM_LOOP, seed=98)
    ends = await closed_loop(url, items, together=CLOSED_LOOP, seed=99)
    low, high = len(ends) // 10, len(ends) * 9 // 10
    capacity_rps = (high - low) / (ends[high] - ends[low])
    with door("round-robin", engine) as url:
        probes = [Item(PROBE_GAP_S * (n + 1), PROBE_TOKENS, 1) for n in range(PROBES)]
        outcomes, _, passes = await watched(url, engine, probes, 97)
    there_s, back_s = _between_s(outcomes, passes)
    told = {key: str(value) for key, value in vars(given).items()} | {"workload": workload.name}
    return {
        "capacity_rps": capacity_rps,
        "there_s": there_s,
        "back_s": back_s,
        "chunk_tokens": given.chunk,
        "options": told,
    }


def _between_s(outcomes: Sequence[Outcome], passes: Sequence[Pass]) -> tuple[float, float]:
    """Return medians, in s: from a client to its pass, and from there to the first token."""
    there, back = [], []
    for one in outcomes:
        (own,) = [p for p in passes if any(p.ran_tokens) and 0.0 < p.at_s - one.arrival_s < PROBE_GAP_S]
        ended_s = min(own.at_s - one.arrival_s, _ttft_s(one))  # whoever brought the news first
        there.append(ended_s - own.duration_s)
        back.append(_ttft_s(one) - ended_s)
    return float(np.median(there)), float(np.median(back))


def _ttft_s(outcome: Outcome) -> float:
    return math.nan if outcome.first_token_s is None else outcome.first_token_s - outcome.arrival_s


def _workload(given: argparse.Namespace) -> Workload:
    recorded = load_trace(given.trace) if given.trace else parametric(given.workload)
    return shortened(recorded, given.scale, given.most_output)


def _line(one: Measured, chunk_tokens: int) -> str:
    run, gaps = one.run(chunk_tokens), _gaps_ms(one)
    return (
        f"round {one.round}, load {one.load:g}, {one.contender}: TTFT mean {run.ttft_s['mean']:.3f} "
        f"p50 {run.ttft_s['p50']:.3f} p99 {run.ttft_s['p99']:.3f} s, chunk use {run.chunk_utilisation:.3f}, "
        f"bubble {run.bubble:.3f}, gaps p50 {gaps['p50']:.0f} p99 {gaps['p99']:.0f} ms, "
        f"lost {run.requests - run.completed}"
    )


def _gaps_ms(one: Measured) -> dict[str, float]:
    values = 1e3 * np.array(one.gaps_s or [math.nan])
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}


# The record


def _append(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")


def _row(one: Measured) -> Row:
    outcomes = [
        [o.arrival_s, o.prompt_tokens, o.output_tokens, o.first_token_s, o.finished_s, o.rejected]
        for o in one.outcomes
    ]
    return one._asdict() | {"outcomes": outcomes, "gaps_s": [round(gap, 5) for gap in one.gaps_s]}


def read_record(path: Path) -> tuple[Row | None, list[Measured]]:
    """Read what was measured so far: the first look, and the runs."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return (rows[0] if rows else None), [_measured(row) for row in rows[1:]]


def _measured(row: Row) -> Measured:
    outcomes = []
    for number, (arrival_s, prompt, output, first_s, finished_s, rejected) in enumerate(row["outcomes"]):
        outcome = Outcome(str(number), arrival_s, prompt, output, SLO)
        outcome.first_token_s, outcome.finished_s, outcome.rejected = first_s, finished_s, rejected
        outcomes.append(outcome)
    passes = [Pass(at_s, took_s, *map(tuple, counts)) for at_s, took_s, *counts in row["passes"]]
    return Measured(**row | {"outcomes": outcomes, "passes": passes})


# The engine as the simulator has it


class Fit(NamedTuple):
    """Pass times, and how far the measured ones are from them: standard deviation and mean of the absolute
    relative error, of passes with prompts and without.
    """

    costs: LockstepCosts
    jitter: float
    prefill_error: float
    decode_error: float


def fit(runs: Sequence[Measured], chunk_tokens: int) -> Fit:
    """Fit `a + b·(tokens of the fullest rank) + c·(mean tokens of the ranks)` to the passes with prompts and
    to those without.
    """
    with_prompts, without = [], []
    for run in runs:
        for now, most, mean in _loads(run, chunk_tokens):
            group = with_prompts if any(now.ran_tokens) else without
            group.append((1.0, most, mean, now.duration_s))
    prefill, prefill_errors = _phase(np.array(with_prompts))
    decode, decode_errors = _phase(np.array(without))
    return Fit(
        LockstepCosts(prefill, decode),
        float(prefill_errors.std()),
        float(np.abs(prefill_errors).mean()),
        float(np.abs(decode_errors).mean()),
    )


def pace(run: Measured, fitted: Fit, chunk_tokens: int) -> float:
    """Return how long the passes of a run took beside the fit to all runs: 1.1 where the machine was 10%
    slower than on average.
    """
    took_s = expected_s = 0.0
    for now, most, mean in _loads(run, chunk_tokens):
        costs = fitted.costs.prefill if any(now.ran_tokens) else fitted.costs.decode
        took_s += now.duration_s
        expected_s += costs.fixed_s + costs.token_s * most + costs.sync_token_s * mean
    return took_s / expected_s if expected_s else math.nan


def _loads(run: Measured, chunk_tokens: int) -> Iterator[tuple[Pass, int, float]]:
    """Yield each pass that computed, the tokens of its fullest rank, and those of the mean one."""
    for before, now in zip(run.passes, run.passes[1:], strict=False):
        decodes = [_decodes(before, rank, chunk_tokens) for rank in range(RANKS)]
        tokens = [ran + n for ran, n in zip(now.ran_tokens, decodes, strict=True)]
        if any(tokens):
            yield now, max(tokens), sum(tokens) / RANKS


def _decodes(before: Pass, rank: int, chunk_tokens: int) -> int:
    """Return how many requests of a rank decode after a pass: all that run, but for a prompt that was cut."""
    cut = before.queued_tokens[rank] > 0 and before.ran_tokens[rank] + before.running[rank] > chunk_tokens
    return max(0, before.running[rank] - cut)


def _phase(rows: np.ndarray) -> tuple[PhaseCosts, np.ndarray]:
    """Fit one kind of pass; return the costs and the relative errors.

    Passes beyond three times the median error of a first fit are left out of the second: another process had
    the core.
    """
    features, durations = rows[:, :3], rows[:, 3]
    near = features @ _solve(features, durations, durations)
    errors = np.abs(durations / near - 1.0)
    kept = errors <= 3.0 * np.median(errors)
    solution = _solve(features[kept], durations[kept], near[kept])
    fixed_s, token_s, shared_s = map(float, solution)
    own = (features[kept] @ solution) / durations[kept] - 1.0
    return PhaseCosts(fixed_s, token_s, sync_token_s=shared_s), own


def _solve(features: np.ndarray, durations: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Least squares of the error relative to `near`, without coefficients below 0."""
    relative = features / near[:, None]
    kept = list(range(features.shape[1]))
    while True:
        found = np.linalg.lstsq(relative[:, kept], durations / near, rcond=None)[0]
        if found.min() >= 0.0 or len(kept) == 1:
            break
        del kept[int(found.argmin())]
    solution = np.zeros(features.shape[1])
    solution[kept] = np.maximum(found, 0.0)
    return solution


def modelled(fitted: Fit, head: Row) -> ClusterSpec:
    """Return the engine as the simulator has it."""
    pool = {
        "role": "aggregated",
        "ranks": RANKS,
        "token_cap": head["chunk_tokens"],
        "kv_blocks": 2000,
        "block_tokens": BLOCK_TOKENS,
        "costs": dataclasses.asdict(fitted.costs),
        "host_gap_s": 0.0,  # the engine's passes last from end to end
        "jitter": min(0.5, fitted.jitter),
    }
    network = {"dispatch_latency_s": max(0.0, head["there_s"]), "answer_latency_s": head["back_s"]}
    data = {"name": MODEL, "kv_bytes_per_token": 4096, "network": network, "pools": [pool]}
    return ClusterSpec.parse(data, where="the fitted engine")


def simulated(cluster: ClusterSpec, one: Measured) -> Run | None:
    """Run the same requests in the simulator; None where it has no such contender."""
    policy = SIMULATED.get(one.contender, one.contender)
    if policy is None:
        return None
    found = simulate(cluster, one.items(), policy, "vllm-v1", seed=one.round, slo=SLO)
    return summarise(
        found.outcomes,
        policy=policy,
        batch="vllm-v1",
        load=one.load,
        rps=one.rps,
        seed=one.round,
        chunk_utilisation=found.chunk_utilisation,
        bubble=found.bubble,
    )


# What is shown


class Shown(NamedTuple):
    """A run condensed, what the simulator says of it, and how fast the machine was (`pace`)."""

    run: Run
    gaps_ms: dict[str, float]
    simulated: Run | None
    pace: float


def report(given: argparse.Namespace) -> None:
    """Print the table; write the figure and the numbers."""
    head, runs = read_record(given.out / RECORD)
    if head is None or not runs:
        raise SystemExit(f"{given.out / RECORD} has no runs: `run` comes first")
    chunk = head["chunk_tokens"]
    fitted = fit(runs, chunk)
    cluster = modelled(fitted, head)
    shown = [
        Shown(one.run(chunk), _gaps_ms(one), simulated(cluster, one), pace(one, fitted, chunk))
        for one in runs
    ]
    told = head["options"]
    title = (
        f"vLLM on the CPU, tiny MoE, {RANKS} ranks in lockstep, chunk {chunk}, "
        f"{told['workload']} × {told['scale']}, capacity {head['capacity_rps']:.2f} rps"
    )
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in (ttft_grid(shown, title), pass_grid(shown, title)):
        console.print(to_rich(table, width=140))
    print(_fit_line(fitted))
    figure(shown, title).savefig(given.out / "vllm_lockstep.png", dpi=160, facecolor="white")
    numbers = {
        "first_look": head,
        "fit": {"costs": dataclasses.asdict(fitted.costs), "jitter": fitted.jitter}
        | {"prefill_error": fitted.prefill_error, "decode_error": fitted.decode_error},
        "runs": [
            {
                "run": dataclasses.asdict(each.run),
                "gaps_ms": each.gaps_ms,
                "simulated": each.simulated and dataclasses.asdict(each.simulated),
                "pace": each.pace,
            }
            for each in shown
        ],
    }
    (given.out / "vllm_lockstep.json").write_text(json.dumps(numbers, indent=1))
    print(f"wrote {given.out / 'vllm_lockstep.png'} and {given.out / 'vllm_lockstep.json'}")


def _fit_line(fitted: Fit) -> str:
    parts = []
    for name in ("prefill", "decode"):
        phase: PhaseCosts = getattr(fitted.costs, name)
        parts.append(
            f"{name} {1e3 * phase.fixed_s:.1f} ms + {1e6 * phase.token_s:.0f} µs·max + "
            f"{1e6 * phase.sync_token_s:.0f} µs·mean of tokens "
            f"(error {100 * getattr(fitted, f'{name}_error'):.1f}%)"
        )
    return f"passes: {'; '.join(parts)}; jitter {100 * fitted.jitter:.1f}%"


_CAPTION = "means over rounds, ± half of their span"
_PANELS: dict[str, Callable[[Run], float]] = {
    "mean TTFT, s": lambda run: run.ttft_s["mean"],
    "P99 TTFT, s": lambda run: run.ttft_s["p99"],
    "chunk utilisation": lambda run: run.chunk_utilisation,
    "bubble": lambda run: run.bubble,
}


def ttft_grid(shown: Sequence[Shown], title: str) -> Grid:
    """Times to the first token by load and contender: measured, simulated, and the mean beside that of
    `vllm` in the same round.
    """
    heads = ("mean", "p50", "p99")
    columns = [
        Column("load"),
        Column("contender", text=True),
        *(Column(f"TTFT {head}", "s") for head in heads),
    ]
    columns += [*(Column(f"sim {head}", "s") for head in heads), Column(f"mean / {DIRECT}"), Column("lost")]
    means_s = {(s.run.load, s.run.seed): s.run.ttft_s["mean"] for s in shown if s.run.policy == DIRECT}
    rows = []
    for (load, name), own in _grouped(shown).items():
        cells = [spread([s.run.ttft_s[head] for s in own], "{:.3f}") for head in heads]
        cells += [spread([s.simulated.ttft_s[head] for s in own if s.simulated], "{:.3f}") for head in heads]
        there = [s.run for s in own if (s.run.load, s.run.seed) in means_s]
        cells.append(spread([r.ttft_s["mean"] / means_s[r.load, r.seed] for r in there], "{:.2f}"))
        lost = sum(s.run.requests - s.run.completed for s in own)
        rows.append((f"{load:g}", name, *cells, str(lost)))
    return Grid(title, tuple(columns), tuple(rows), caption=_CAPTION)


def pass_grid(shown: Sequence[Shown], title: str) -> Grid:
    """Passes and gaps between tokens by load and contender. `pace`: passes beside the fit to all of them."""
    columns = [Column("load"), Column("contender", text=True)]
    columns += [Column(head) for head in ("chunk use", "sim", "bubble", "sim")]
    columns += [*(Column(f"gap {head}", "ms") for head in ("p50", "p99", "max")), Column("pace")]
    rows = []
    for (load, name), own in _grouped(shown).items():
        told = [s.simulated for s in own if s.simulated]
        cells = [
            spread([s.run.chunk_utilisation for s in own], "{:.3f}"),
            spread([run.chunk_utilisation for run in told], "{:.3f}"),
            spread([s.run.bubble for s in own], "{:.3f}"),
            spread([run.bubble for run in told], "{:.3f}"),
        ]
        cells += [spread([s.gaps_ms[key] for s in own], "{:.0f}") for key in ("p50", "p99", "max")]
        cells.append(spread([s.pace for s in own], "{:.2f}"))
        rows.append((f"{load:g}", name, *cells))
    return Grid(title, tuple(columns), tuple(rows), caption=_CAPTION)


def _grouped(shown: Sequence[Shown]) -> dict[tuple[float, str], list[Shown]]:
    names = list(dict.fromkeys(s.run.policy for s in sorted(shown, key=lambda s: s.run.seed)))
    loads = sorted({s.run.load or 0.0 for s in shown})
    groups = {
        (load, n): [s for s in shown if (s.run.load, s.run.policy) == (load, n)]
        for load in loads
        for n in names
    }
    return {key: own for key, own in groups.items() if own}


def figure(shown: Sequence[Shown], title: str) -> Figure:
    """Mean and P99 TTFT, chunk utilisation and bubble over load: measured in full, simulated dashed."""
    drawn = Figure(figsize=(15.0, 4.2), layout="constrained")
    drawn.suptitle(title, fontsize=10)
    groups = _grouped(shown)
    names = list(dict.fromkeys(name for _, name in groups))
    for axes, (label, value) in zip(drawn.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        for name, colour in zip(names, _COLOURS, strict=False):
            loads = [load for load, other in groups if other == name]
            found = [[value(s.run) for s in groups[load, name]] for load in loads]
            axes.plot(loads, [np.mean(v) for v in found], "o-", ms=4, color=colour, label=name)
            axes.fill_between(loads, list(map(min, found)), list(map(max, found)), color=colour, alpha=0.15)
            told = [[value(s.simulated) for s in groups[load, name] if s.simulated] for load in loads]
            if all(told):
                axes.plot(loads, [np.mean(v) for v in told], "--", color=colour, lw=1.0)
        axes.set(xlabel="load, of capacity", ylabel=label)
        axes.grid(alpha=0.3)
    drawn.axes[0].legend(fontsize=8, frameon=False, title="dashed: simulated", title_fontsize=8)
    return drawn


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_lockstep", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("what", choices=sorted(WHAT))
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="of the environment with vLLM")
    parser.add_argument("--trace", type=Path, help="a recorded trace (default: the fitted workload)")
    parser.add_argument("--workload", default="azure-code", help="a fitted workload")
    parser.add_argument("--scale", type=float, default=0.25, help="of the trace's lengths")
    parser.add_argument("--most-output", type=int, default=16, help="answers are cut at so many tokens")
    parser.add_argument("--chunk", type=int, default=1024, help="--max-num-batched-tokens, of each rank")
    parser.add_argument(
        "--contenders",
        default="staggered,staggered@inferred,round-robin,least-tokens,vllm-dp,vllm",
        help="policies; POLICY@inferred: without pass events; vllm: no gateway",
    )
    parser.add_argument("--arrivals", default="poisson", help="poisson, gamma:CV or recorded")
    parser.add_argument("--loads", default="0.5,0.7,0.9", help="fractions of capacity")
    parser.add_argument("--seconds", type=float, default=45.0, help="of arrivals in each run")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


WHAT = {"run": measure, "report": report}


def main() -> None:
    """Do what was asked for."""
    given = options()
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # with its server and gateway
    WHAT[given.what](given)


if __name__ == "__main__":
    main()
