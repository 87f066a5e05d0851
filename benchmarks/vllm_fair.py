"""FairBatching and triage inside a real vLLM, against vLLM's own scheduler: one machine, in alternation.

    make test-engine                                   # once: prepares .venv-vllm
    python -m benchmarks.vllm_fair --trace FILE --loads 0.6,0.8,0.95 --rounds 3 --out out

Every contender is a `vllm serve` of its own on the CPU, all started first; while one is measured the others
sleep. A tiny random Llama's steps have the shape of an 8B model's on an A100. Arrivals are open-loop, the
lengths a trace's, scaled. Round r has seed r: within a round all contenders get the very same requests, in
turning order. The engine has one core, its front end and this client the other.

Capacity is what stock vLLM serves when it never runs dry (closed loop), in requests per second; loads are
fractions of it. Writes OUT/vllm_fair.json and OUT/vllm_fair.png.
"""

import argparse
import asyncio
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.replay import Ask, loop_factory, replay
from headway.core.request import Slo
from headway.report.metrics import Outcome, Run, summarise
from headway.report.tables import Column, Grid, to_rich
from headway.workload import Item, Workload, load_trace, make_items, parametric

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engine"))  # its servers and models
from models import tiny_llama
from servers import Engine, serving

MAX_MODEL_LEN = 8192
VOCABULARY = 40_000
#: In flight together while capacity is measured, and how many requests that takes.
CLOSED_LOOP, CLOSED_REQUESTS = 48, 240
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Contender(NamedTuple):
    """A scheduler: `stock`, `stock@512` (with that token budget), or a batch policy of ours."""

    name: str

    def engine(self, model: Path, budget: int, slo: Slo) -> Engine:
        """Return how to serve it."""
        kind, _, own = self.name.partition("@")
        engine = Engine(model, max_model_len=MAX_MODEL_LEN, batch_tokens=int(own or budget))
        engine = dataclasses.replace(engine, arguments=("--no-enable-prefix-caching", "--disable-log-stats"))
        if kind == "stock":
            return engine
        told = {"policy": kind, "ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s}
        return dataclasses.replace(
            engine, scheduler="headway.hosts.vllm.FairScheduler", additional_config={"headway": told}
        )


class Measured(NamedTuple):
    """One run of one contender."""

    contender: str
    arrivals: str
    load: float
    round: int
    run: Run
    outcomes: list[Outcome]


# The load


def scaled(workload: Workload, share: float) -> Workload:
    """Shorten prompts and answers to a share of what they were, and to what the model takes."""

    def length(tokens: int, most: int) -> int:
        return max(1, min(most, round(share * tokens)))

    items = [
        Item(i.arrival_s, length(i.prompt_tokens, MAX_MODEL_LEN - 1024), length(i.output_tokens, 1000))
        for i in workload.items
    ]
    return dataclasses.replace(workload, items=items)


def ask(model: str, seed: int) -> Callable[[int, Item], Ask]:
    """Return what makes the requests of a round: token ids that no other prompt begins with."""

    def one(number: int, item: Item) -> Ask:
        first = 7919 * (seed * 100_000 + number)
        ids = [1000 + (first + 104_729 * place) % VOCABULARY for place in range(item.prompt_tokens)]
        body = {"model": model, "prompt": ids, "max_tokens": item.output_tokens, "ignore_eos": True}
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        return Ask(body | usage | {"temperature": 0.0}, _whole)

    return one


def _whole(item: Item, body: bytes) -> str | None:
    found = re.search(rb'"completion_tokens":(\d+)', body)
    if found is None or int(found[1]) != item.output_tokens:
        return f"not {item.output_tokens} tokens"
    return None


async def capacity(url: str, model: str, items: Sequence[Item], slo: Slo) -> float:
    """Return requests per second served while CLOSED_LOOP are in flight, 10th to 90th percent."""
    waiting, ends = iter(enumerate(items)), []
    loop = asyncio.get_running_loop()
    make = ask(model, 99)

    async def worker() -> None:
        for number, item in waiting:
            at_once = item._replace(arrival_s=0.0)
            await replay(url, lambda _, it, n=number: make(n, it), [at_once], slo=slo)
            ends.append(loop.time())

    await asyncio.gather(*(worker() for _ in range(CLOSED_LOOP)))
    ends.sort()
    low, high = len(ends) // 10, len(ends) * 9 // 10
    return (high - low) / (ends[high] - ends[low])


# The runs


@contextmanager
def served(given: argparse.Namespace, contenders: Sequence[Contender], slo: Slo) -> Iterator[dict[str, str]]:
    """Serve all contenders; yields their URLs by name."""
    model = tiny_llama(Path(given.python).resolve().parent.parent / "models" / "tiny-llama")
    engines = [contender.engine(model, given.budget, slo) for contender in contenders]
    with serving(*engines, python=given.python, logs=given.out) as servers:
        yield {c.name: server.url for c, server in zip(contenders, servers, strict=True)}


def measure(given: argparse.Namespace, workload: Workload, slo: Slo) -> tuple[float, list[Measured]]:
    """Run everything in turn; return stock's capacity, in requests per second, and the runs."""
    contenders = [Contender(name) for name in given.contenders.split(",")]
    measured: list[Measured] = []
    with served(given, contenders, slo) as urls, asyncio.Runner(loop_factory=loop_factory()) as runner:
        for url in urls.values():  # warm: the first requests of a server pay for what it sets up
            runner.run(replay(url, ask("tiny-llama", 98), [Item(0.0, 64, 8)] * 4, slo=slo))
        whole = given.capacity
        if whole is None:
            items = make_items(workload, rps=1.0, arrivals="poisson", requests=CLOSED_REQUESTS, seed=99)
            whole = runner.run(capacity(urls[contenders[0].name], "tiny-llama", items, slo))
        print(f"capacity of {contenders[0].name}: {whole:.2f} requests/s", flush=True)
        cases = [(a, float(load)) for a in given.arrivals.split(",") for load in given.loads.split(",")]
        for number in range(given.first_round, given.first_round + given.rounds):
            for turn, (arrivals, load) in enumerate(cases):
                rps = load * whole
                count = max(8, round(rps * given.seconds))
                items = make_items(workload, rps=rps, arrivals=arrivals, requests=count, seed=number)
                start = (number + turn) % len(contenders)
                for contender in contenders[start:] + contenders[:start]:
                    outcomes = runner.run(
                        replay(urls[contender.name], ask("tiny-llama", number), items, slo=slo)
                    )
                    run = summarise(
                        outcomes, policy=contender.name, batch="", load=load, rps=rps, seed=number
                    )
                    measured.append(Measured(contender.name, arrivals, load, number, run, outcomes))
                    print(_line(measured[-1]), flush=True)
    return whole, measured


def _line(one: Measured) -> str:
    run = one.run
    ttft, tpot = run.ttft_s, {q: 1e3 * value for q, value in run.tpot_s.items()}
    return (
        f"round {one.round}, {one.arrivals}, load {one.load:g}, {one.contender}: "
        f"TTFT p50 {ttft['p50']:.3f} p99 {ttft['p99']:.3f} s, "
        f"TPOT p50 {tpot['p50']:.0f} p99 {tpot['p99']:.0f} ms, in SLO {run.slo_attainment:.3f}"
    )


# What is shown


def grid(measured: Sequence[Measured], title: str) -> Grid:
    """A row for each contender, load and arrivals: means over the rounds, ± half of what they span."""
    columns = [Column("arrivals", text=True), Column("load"), Column("scheduler", text=True)]
    columns += [Column(f"TTFT {q}", "s") for q in ("p50", "p99")]
    columns += [Column(f"TPOT {q}", "ms") for q in ("p50", "p99")]
    columns += [Column("in SLO"), Column("goodput", "rps"), Column("TPOT met")]
    rows = []
    for arrivals, load, name in dict.fromkeys((m.arrivals, m.load, m.contender) for m in measured):
        own = [m for m in measured if (m.arrivals, m.load, m.contender) == (arrivals, load, name)]
        cells = [_spread([m.run.ttft_s[q] for m in own], "{:.2f}") for q in ("p50", "p99")]
        cells += [_spread([1e3 * m.run.tpot_s[q] for m in own], "{:.0f}") for q in ("p50", "p99")]
        cells.append(_spread([m.run.slo_attainment for m in own], "{:.3f}"))
        cells.append(_spread([m.run.goodput_rps for m in own], "{:.2f}"))
        cells.append(_spread([_tpot_met(m.outcomes) for m in own], "{:.3f}"))
        rows.append((arrivals, f"{load:g}", name, *cells))
    return Grid(title, tuple(columns), tuple(rows), caption="means over rounds, ± half of their span")


def _tpot_met(outcomes: Sequence[Outcome]) -> float:
    met = [_tpot_s(o) <= o.slo.tpot_s for o in outcomes if o.finished_s is not None and o.output_tokens > 1]
    return sum(met) / max(1, len(met))


def _tpot_s(outcome: Outcome) -> float:
    assert outcome.finished_s is not None and outcome.first_token_s is not None
    return (outcome.finished_s - outcome.first_token_s) / (outcome.output_tokens - 1)


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ±{form.format((max(values) - min(values)) / 2)}"


def figure(measured: Sequence[Measured], title: str) -> Figure:
    """Attainment, P99 TTFT and P99 TPOT over load; a panel each, a line per contender and arrivals."""
    drawn = Figure(figsize=(13.0, 4.2), layout="constrained")
    drawn.suptitle(title, fontsize=10)
    shown: list[tuple[str, Callable[[Run], float]]] = [
        ("share in SLO", lambda run: run.slo_attainment),
        ("P99 TTFT, s", lambda run: run.ttft_s["p99"]),
        ("P99 TPOT, ms", lambda run: 1e3 * run.tpot_s["p99"]),
    ]
    names = list(dict.fromkeys(m.contender for m in measured))
    for axes, (label, value) in zip(drawn.subplots(1, 3), shown, strict=True):
        for name, arrivals in dict.fromkeys((m.contender, m.arrivals) for m in measured):
            own = [m for m in measured if (m.contender, m.arrivals) == (name, arrivals)]
            loads = sorted({m.load for m in own})
            found = [[value(m.run) for m in own if m.load == load] for load in loads]
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            style = "-" if arrivals == "poisson" else "--"
            axes.plot(loads, [np.mean(v) for v in found], style, color=colour, label=f"{name}, {arrivals}")
            axes.fill_between(
                loads, [min(v) for v in found], [max(v) for v in found], color=colour, alpha=0.15
            )
        axes.set(xlabel="load, of stock's capacity", ylabel=label)
        axes.grid(alpha=0.3)
    drawn.axes[1].set_yscale("log")
    drawn.axes[0].legend(fontsize=8, frameon=False)
    return drawn


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_fair", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="of the environment with vLLM")
    parser.add_argument("--trace", type=Path, help="a recorded trace (default: the fitted workload)")
    parser.add_argument("--workload", default="azure-conv", help="a fitted workload")
    parser.add_argument("--scale", type=float, default=0.5, help="of the trace's lengths")
    parser.add_argument("--contenders", default="stock,stock@512,fair,triage", help="the first sets capacity")
    parser.add_argument("--budget", type=int, default=2048, help="--max-num-batched-tokens, vLLM's default")
    parser.add_argument("--arrivals", default="poisson", help="poisson, gamma:CV or recorded, with commas")
    parser.add_argument("--loads", default="0.6,0.8,0.95", help="fractions of capacity")
    parser.add_argument("--capacity", type=float, help="requests/s (default: measured)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals in each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first-round", type=int, default=0, help="the first round's number, its seed")
    parser.add_argument("--ttft", type=float, default=1.0, help="target, s")
    parser.add_argument("--tpot", type=float, default=0.08, help="target, s")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def main() -> None:
    """Measure, then show."""
    given = options()
    given.out.mkdir(parents=True, exist_ok=True)
    workload = scaled(load_trace(given.trace) if given.trace else parametric(given.workload), given.scale)
    slo = Slo(given.ttft, given.tpot)
    whole, measured = measure(given, workload, slo)
    title = (
        f"vLLM on the CPU, tiny Llama, {workload.name} × {given.scale:g}, "
        f"TTFT ≤ {slo.ttft_s:g} s, TPOT ≤ {1e3 * slo.tpot_s:g} ms, capacity {whole:.2f} rps"
    )
    Console(width=140 if not sys.stdout.isatty() else None).print(to_rich(grid(measured, title), width=140))
    figure(measured, title).savefig(given.out / "vllm_fair.png", dpi=160, facecolor="white")
    record: dict[str, Any] = {"capacity_rps": whole, "options": {k: str(v) for k, v in vars(given).items()}}
    record["runs"] = [
        {"arrivals": m.arrivals, "round": m.round, "run": dataclasses.asdict(m.run)} for m in measured
    ]
    (given.out / "vllm_fair.json").write_text(json.dumps(record, indent=1))
    print(f"wrote {given.out / 'vllm_fair.png'} and {given.out / 'vllm_fair.json'}")


if __name__ == "__main__":
    main()
