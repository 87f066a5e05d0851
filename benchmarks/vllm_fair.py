"""FairBatching and triage inside a real vLLM, against vLLM's own scheduler: one machine, in alternation.

    make test-engine                                                  # once: prepares .venv-vllm
    python -m benchmarks.vllm_fair run --trace FILE --rounds 3 --out out
    python -m benchmarks.vllm_fair saturation --trace FILE --out out  # tokens/s when it never runs dry
    python -m benchmarks.vllm_fair report --out out                   # of all that was run into that folder

Every contender is a `vllm serve` of its own on the CPU, all started first; while one is measured the others
sleep. A tiny random Llama's steps have the shape of an 8B model's on an A100, and with lengths × 0.25 a
trace's prompts take the seconds there that they would take on that GPU. Arrivals are open-loop. Round r has
seed r: within a round all contenders get the very same requests, in turning order. The engine has one core,
its front end and this client the other.

Capacity is the highest rate at which 90% (99%) of the requests meet both targets, read off the runs at all
rates: every scheduler got the same requests there. Loads are fractions of that of the better stock scheduler
at 90%; `run` chooses its rates by a rough search for it, or by `--capacity`. Each run is appended to
OUT/vllm_fair.jsonl with all its requests, so that a run cut short loses nothing and more rounds add up.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.replay import Ask, loop_factory, replay, whole
from benchmarks.rounds import spread, turned
from headway.core.request import Slo
from headway.report.metrics import Outcome, meets_slo
from headway.report.tables import Column, Grid, to_rich
from headway.workload import Item, Workload, load_trace, make_items, parametric

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engine"))  # its servers and models
from models import tiny_llama
from servers import Engine, serving

MODEL = "tiny-llama"
MAX_MODEL_LEN = 8192
VOCABULARY = 40_000
#: In flight together at saturation, and how many requests that takes.
CLOSED_LOOP, CLOSED_REQUESTS = 48, 300
#: Targets that bind nothing.
LAX = {"slo_ttft_ms": 600_000, "slo_tpot_ms": 60_000}
#: Attainments that a capacity is told at; loads are fractions of that at the first.
SHARES = (0.9, 0.99)
RECORD = "vllm_fair.jsonl"
#: Rounds from here on are of the search: single runs, told but not shown.
SEARCH = 90
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
    """One run of one contender. `rps`: offered."""

    contender: str
    arrivals: str
    rps: float
    round: int
    outcomes: list[Outcome]

    @property
    def attainment(self) -> float:
        """Share of the requests that met both targets."""
        return sum(map(meets_slo, self.outcomes)) / len(self.outcomes)


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


def ask(seed: int, **fields: object) -> Callable[[int, Item], Ask]:
    """Return what makes the requests of a round: token ids that no other prompt begins with."""

    def one(number: int, item: Item) -> Ask:
        first = 7919 * (seed * 100_000 + number)
        ids = [1000 + (first + 104_729 * place) % VOCABULARY for place in range(item.prompt_tokens)]
        body = {"model": MODEL, "prompt": ids, "max_tokens": item.output_tokens, "ignore_eos": True}
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        return Ask(body | usage | {"temperature": 0.0} | fields, whole)

    return one


# The runs


class Bench:
    """All contenders, served; runs them and appends what it measured to the record."""

    def __init__(self, given: argparse.Namespace, workload: Workload, urls: dict[str, str]) -> None:
        self._given, self._workload, self._urls = given, workload, urls
        self._record = given.out / RECORD
        self._runner = asyncio.Runner(loop_factory=loop_factory())
        self.slo = Slo(given.ttft, given.tpot)
        self.contenders = list(urls)

    def warm(self) -> None:
        """Let each server pay for what its first requests set up, and a policy learn step times."""
        items = make_items(self._workload, rps=3.0, arrivals="poisson", requests=40, seed=98)
        for url in self._urls.values():
            self._runner.run(replay(url, ask(98), items, slo=self.slo))

    def run(self, contender: str, arrivals: str, rps: float, number: int) -> Measured:
        """Measure one contender under one load."""
        count = max(8, round(rps * self._given.seconds))
        items = make_items(self._workload, rps=rps, arrivals=arrivals, requests=count, seed=number)
        outcomes = self._runner.run(replay(self._urls[contender], ask(number), items, slo=self.slo))
        measured = Measured(contender, arrivals, rps, number, outcomes)
        self._append(measured)
        print(_line(measured), flush=True)
        return measured

    def edge(self, contenders: Sequence[str], share: float, probes: int) -> float:
        """Search, by bisection, the rate at which the best of these schedulers has this share in SLO."""
        low, high = self._given.least, self._given.most
        for probe in range(probes):
            rps = (low * high) ** 0.5
            best = max(self.run(name, "poisson", rps, SEARCH + probe % 2).attainment for name in contenders)
            low, high = (rps, high) if best >= share else (low, rps)
        return (low * high) ** 0.5

    def saturate(self, contender: str, number: int, fields: dict[str, Any]) -> float:
        """Return tokens/s, of prompts and answers, while CLOSED_LOOP are in flight: 10th to 90th percent."""
        items = make_items(self._workload, rps=1.0, arrivals="poisson", requests=CLOSED_REQUESTS, seed=number)
        return self._runner.run(_closed(self._urls[contender], items, ask(number, **fields), self.slo))

    def _append(self, measured: Measured) -> None:
        requests = [
            [o.arrival_s, o.prompt_tokens, o.output_tokens, o.first_token_s, o.finished_s, o.rejected]
            for o in measured.outcomes
        ]
        row = {**measured._asdict(), "ttft_s": self.slo.ttft_s, "tpot_s": self.slo.tpot_s}
        row["outcomes"] = requests
        with self._record.open("a") as file:
            file.write(json.dumps(row) + "\n")


async def _closed(url: str, items: Sequence[Item], make: Callable[[int, Item], Ask], slo: Slo) -> float:
    waiting, ends = iter(enumerate(items)), []
    loop = asyncio.get_running_loop()

    async def worker() -> None:
        for number, item in waiting:
            at_once = item._replace(arrival_s=0.0)
            await replay(url, lambda _, it, n=number: make(n, it), [at_once], slo=slo)
            ends.append((loop.time(), item.prompt_tokens + item.output_tokens))

    await asyncio.gather(*(worker() for _ in range(CLOSED_LOOP)))
    low, high = len(ends) // 10, len(ends) * 9 // 10
    ends.sort()
    return sum(tokens for _, tokens in ends[low + 1 : high + 1]) / (ends[high][0] - ends[low][0])


@contextmanager
def served(given: argparse.Namespace, workload: Workload) -> Iterator[Bench]:
    """Serve all contenders, warm."""
    model = tiny_llama(Path(given.python).resolve().parent.parent / "models" / MODEL)
    contenders = [Contender(name) for name in given.contenders.split(",")]
    slo = Slo(given.ttft, given.tpot)
    engines = [contender.engine(model, given.budget, slo) for contender in contenders]
    with serving(*engines, python=given.python, logs=given.out) as servers:
        urls = {c.name: server.url for c, server in zip(contenders, servers, strict=True)}
        bench = Bench(given, workload, urls)
        bench.warm()
        yield bench


def measure(given: argparse.Namespace, workload: Workload) -> None:
    """Every contender at every load, in turning order, round by round."""
    with served(given, workload) as bench:
        whole = given.capacity
        if whole is None:
            stock = [name for name in bench.contenders if name.startswith("stock")]
            whole = bench.edge(stock, SHARES[0], given.probes)
            print(f"capacity of the better stock scheduler: {whole:.2f} requests/s", flush=True)
        cases = [(a, float(load)) for a in given.arrivals.split(",") for load in given.loads.split(",")]
        for number in range(given.first_round, given.first_round + given.rounds):
            for turn, (arrivals, load) in enumerate(cases):
                for name in turned(bench.contenders, number + turn):
                    bench.run(name, arrivals, load * whole, number)


def saturation(given: argparse.Namespace, workload: Workload) -> None:
    """Tokens/s in a closed loop: with targets that bind nothing, and with those of the requests."""
    with served(given, workload) as bench:
        for label, fields in (("no target binds", {"vllm_xargs": LAX}), ("targets as served", {})):
            rates: dict[str, list[float]] = {name: [] for name in bench.contenders}
            for number in range(given.first_round, given.first_round + given.rounds):
                for name in turned(bench.contenders, number):
                    own = fields if not name.startswith("stock") else {}
                    rates[name].append(bench.saturate(name, 100 + number, own))
            base = np.mean(rates[bench.contenders[0]])
            for name, found in rates.items():
                print(
                    f"{label}: {name} {spread(found, '{:.0f}')} tokens/s, "
                    f"{np.mean(found) / base:.3f} of {bench.contenders[0]}",
                    flush=True,
                )


def _line(one: Measured) -> str:
    ttft, tpot = _ttfts_s([one]), _tpots_s([one])
    return (
        f"round {one.round}, {one.arrivals}, {one.rps:.2f}/s, {one.contender}: "
        f"TTFT p50 {_at(ttft, 50):.3f} p99 {_at(ttft, 99):.3f} s, "
        f"TPOT p50 {1e3 * _at(tpot, 50):.0f} p99 {1e3 * _at(tpot, 99):.0f} ms, in SLO {one.attainment:.3f}"
    )


# What is shown


def read_record(path: Path) -> list[Measured]:
    """Read what was run. Raises SystemExit when there is nothing."""
    if not path.exists():
        raise SystemExit(f"{path}: nothing was run there")
    runs = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        slo = Slo(row.pop("ttft_s"), row.pop("tpot_s"))
        row["rps"] = round(row["rps"], 2)  # the same rate from two measured capacities is one
        outcomes = []
        for number, (arrival, prompt, output, first, finished, rejected) in enumerate(row.pop("outcomes")):
            outcome = Outcome(str(number), arrival, prompt, output, slo)
            outcome.first_token_s, outcome.finished_s, outcome.rejected = first, finished, rejected
            outcomes.append(outcome)
        runs.append(Measured(**row, outcomes=outcomes))
    return runs


def report(given: argparse.Namespace, workload: Workload) -> None:
    """Show a table and write a figure of all that was run into the folder."""
    runs = [run for run in read_record(given.out / RECORD) if run.round < SEARCH]
    slo = runs[0].outcomes[0].slo
    title = (
        f"vLLM on the CPU, tiny Llama, {workload.name} × {given.scale:g}, "
        f"TTFT ≤ {slo.ttft_s:g} s, TPOT ≤ {1e3 * slo.tpot_s:g} ms"
    )
    edges = {
        (name, share): edge(runs, name, share)
        for name in dict.fromkeys(run.contender for run in runs)
        for share in SHARES
    }
    stock = [e for (name, share), e in edges.items() if name.startswith("stock") and share == SHARES[0] and e]
    whole = given.capacity or max(stock, default=1.0)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(to_rich(grid(runs, whole, title), width=150))
    for (name, share), found in edges.items():
        told = "below what was run" if found is None else f"{found:.2f} requests/s, {found / whole:.2f}"
        console.print(f"{name}: {share:.0%} in SLO up to {told}")
    figure(runs, whole, title).savefig(given.out / "vllm_fair.png", dpi=160, facecolor="white")
    console.print(f"wrote {given.out / 'vllm_fair.png'}")


def grid(runs: Sequence[Measured], whole: float, title: str) -> Grid:
    """A row for each load, arrivals and contender: means over the rounds, ± half of what they span."""
    columns = [Column("arrivals", text=True), Column("load"), Column("scheduler", text=True)]
    columns += [Column(f"TTFT {q}", "s") for q in ("p50", "p99")]
    columns += [Column(f"TPOT {q}", "ms") for q in ("p50", "p99")]
    columns += [Column("TTFT met"), Column("TPOT met"), Column("in SLO"), Column("goodput", "rps")]
    rows = []
    cases = sorted({(m.arrivals, m.rps) for m in runs})
    for arrivals, rps in cases:
        for name in dict.fromkeys(m.contender for m in runs):
            own = [m for m in runs if (m.arrivals, m.rps, m.contender) == (arrivals, rps, name)]
            if own:
                rows.append((arrivals, f"{rps / whole:.2f}", name, *_cells(own)))
    return Grid(title, tuple(columns), tuple(rows), caption="means over rounds, ± half of their span")


def _cells(own: Sequence[Measured]) -> list[str]:
    slo = own[0].outcomes[0].slo
    ttfts, tpots = [_ttfts_s([m]) for m in own], [_tpots_s([m]) for m in own]
    cells = [spread([_at(v, q) for v in ttfts], "{:.2f}") for q in (50, 99)]
    cells += [spread([1e3 * _at(v, q) for v in tpots], "{:.0f}") for q in (50, 99)]
    cells.append(spread([float(np.mean(v <= slo.ttft_s)) for v in ttfts], "{:.3f}"))
    cells.append(spread([float(np.mean(v <= slo.tpot_s)) for v in tpots], "{:.3f}"))
    cells.append(spread([m.attainment for m in own], "{:.3f}"))
    cells.append(spread([m.attainment * m.rps for m in own], "{:.2f}"))
    return cells


def edge(runs: Sequence[Measured], contender: str, share: float) -> float | None:
    """Return the highest rate of Poisson arrivals, in requests/s, up to which this share was in SLO at every
    rate, interpolated to the next; None if it was not at the lowest.
    """
    rates = sorted({m.rps for m in runs if m.contender == contender and m.arrivals == "poisson"})
    below: tuple[float, float] | None = None
    for rps in rates:
        own = [m for m in runs if (m.contender, m.arrivals, m.rps) == (contender, "poisson", rps)]
        met = sum(m.attainment * len(m.outcomes) for m in own) / sum(len(m.outcomes) for m in own)
        if met < share:
            if below is None:
                return None
            return below[0] + (rps - below[0]) * (below[1] - share) / (below[1] - met)
        below = rps, met
    return None if below is None else below[0]


def _ttfts_s(runs: Sequence[Measured]) -> np.ndarray:
    """TTFTs of all requests; of one that was not served, infinity."""
    return np.asarray(
        [
            np.inf if o.first_token_s is None else o.first_token_s - o.arrival_s
            for m in runs
            for o in m.outcomes
        ]
    )


def _tpots_s(runs: Sequence[Measured]) -> np.ndarray:
    """Mean times per token after the first, of all requests with more than one; infinity as in `_ttfts_s`."""
    return np.asarray(
        [
            np.inf
            if o.finished_s is None or o.first_token_s is None
            else (o.finished_s - o.first_token_s) / (o.output_tokens - 1)
            for m in runs
            for o in m.outcomes
            if o.output_tokens > 1
        ]
    )


def _at(values: np.ndarray, percent: float) -> float:
    """Return a percentile as one of the values: infinity is not interpolated."""
    return float(np.percentile(values, percent, method="higher"))


def figure(runs: Sequence[Measured], whole: float, title: str) -> Figure:
    """Attainment, P99 TTFT and P99 TPOT over load; a panel each, a line per contender and arrivals."""
    drawn = Figure(figsize=(13.0, 4.2), layout="constrained")
    drawn.suptitle(title, fontsize=10)
    shown: list[tuple[str, Callable[[Measured], float]]] = [
        ("share in SLO", lambda m: m.attainment),
        ("P99 TTFT, s", lambda m: _at(_ttfts_s([m]), 99)),
        ("P99 TPOT, ms", lambda m: 1e3 * _at(_tpots_s([m]), 99)),
    ]
    names = list(dict.fromkeys(m.contender for m in runs))
    for axes, (label, value) in zip(drawn.subplots(1, 3), shown, strict=True):
        for name, arrivals in dict.fromkeys((m.contender, m.arrivals) for m in runs):
            own = [m for m in runs if (m.contender, m.arrivals) == (name, arrivals)]
            rates = sorted({m.rps for m in own})
            found = [[value(m) for m in own if m.rps == rps] for rps in rates]
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            style = "-" if arrivals == "poisson" else "--"
            loads = [rps / whole for rps in rates]
            axes.plot(loads, [np.mean(v) for v in found], style, color=colour, label=f"{name}, {arrivals}")
            axes.fill_between(
                loads, [min(v) for v in found], [max(v) for v in found], color=colour, alpha=0.15
            )
        axes.set(xlabel="load, of stock's capacity", ylabel=label)
        axes.grid(alpha=0.3)
    drawn.axes[1].set_yscale("log")
    drawn.axes[0].legend(fontsize=7, frameon=False)
    return drawn


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_fair", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("what", choices=WHAT, help="what to do")
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="of the environment with vLLM")
    parser.add_argument("--trace", type=Path, help="a recorded trace (default: the fitted workload)")
    parser.add_argument("--workload", default="azure-conv", help="a fitted workload")
    parser.add_argument("--scale", type=float, default=0.25, help="of the trace's lengths")
    parser.add_argument("--contenders", default="stock,stock@512,fair:anchor=first-token,triage")
    parser.add_argument("--budget", type=int, default=2048, help="--max-num-batched-tokens, vLLM's default")
    parser.add_argument("--arrivals", default="poisson,gamma:3", help="poisson, gamma:CV or recorded")
    parser.add_argument("--loads", default="0.6,0.8,0.95", help="fractions of capacity")
    parser.add_argument("--capacity", type=float, help="requests/s (default: measured)")
    parser.add_argument("--least", type=float, default=1.0, help="where a search begins, requests/s")
    parser.add_argument("--most", type=float, default=16.0, help="where a search ends, requests/s")
    parser.add_argument("--probes", type=int, default=5, help="of a search")
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals in each run")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--first-round", type=int, default=0, help="the first round's number, its seed")
    parser.add_argument("--ttft", type=float, default=1.0, help="target, s")
    parser.add_argument("--tpot", type=float, default=0.08, help="target, s")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


WHAT = {"run": measure, "saturation": saturation, "report": report}


def main() -> None:
    """Measure, or show."""
    given = options()
    given.out.mkdir(parents=True, exist_ok=True)
    workload = scaled(load_trace(given.trace) if given.trace else parametric(given.workload), given.scale)
    WHAT[given.what](given, workload)


if __name__ == "__main__":
    main()
