"""A trace replayed over HTTP through the gateway against emulated engines, next to what the simulator says.

    python -m benchmarks.live --load 0.6 --policies staggered,round-robin --out out

For each policy `headway serve` is started with its embedded cluster, slowed down to what two cores carry
(gateway, engines and this client share them). Arrivals are open-loop: a request is sent when it is due,
however late the others are, and its time to first token counts from then. All times are given in the
model's seconds (wall time × speed). Writes DIR/live.png and DIR/live.json.
"""

import argparse
import asyncio
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.children import HEADWAY, child
from benchmarks.replay import Ask, loop_factory, replay
from benchmarks.rounds import spread
from headway.hosts.sim import simulate
from headway.model.cluster import ClusterSpec
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.report.metrics import Outcome, Run, summarise
from headway.report.tables import Column, Grid, to_rich
from headway.workload import Item, load_trace, make_items, parametric

#: What the emulator takes for a token of text.
BYTES_PER_TOKEN = 4
CAPTION = "time to first token in the model's seconds; apart: at the median; lost: or refused"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Pair(NamedTuple):
    """One policy at one load with one seed, over HTTP and simulated."""

    load: float
    policy: str
    seed: int
    live: list[Outcome]
    simulated: list[Outcome]

    def runs(self) -> tuple[Run, Run]:
        """Condense both."""
        common: dict[str, Any] = {
            "policy": self.policy,
            "batch": "",
            "load": self.load,
            "rps": 0.0,
            "seed": self.seed,
        }
        return summarise(self.live, **common), summarise(self.simulated, **common)


# The load


def prompt(item: Item, number: int) -> str:
    """Return a text of the item's length; texts begin alike as far as the items' prefixes do."""
    size = BYTES_PER_TOKEN * item.prompt_tokens
    blocks = [_filled(f"b{block} ", BYTES_PER_TOKEN * item.prefix_block_tokens) for block in item.prefix]
    return ("".join(blocks) + _filled(f"r{number} ", size))[:size]


def _filled(text: str, size: int) -> str:
    return (text * (size // len(text) + 1))[:size]


def ask(model: str) -> Callable[[int, Item], Ask]:
    """Return what makes requests to the emulated cluster, whose answers tell which token is which."""

    def one(number: int, item: Item) -> Ask:
        body = {"model": model, "prompt": prompt(item, number), "max_tokens": item.output_tokens}
        return Ask(body | {"stream": True}, _whole)

    return one


def _whole(item: Item, body: bytes) -> str | None:
    tokens = [int(number) for number in re.findall(rb"tok(\d+)", body)]
    return (
        None if tokens == list(range(item.output_tokens)) else f"{len(tokens)} of {item.output_tokens} tokens"
    )


# The service


@contextmanager
def service(options: Sequence[str]) -> Iterator[str]:
    """Run `headway serve` with its embedded cluster; yields its URL."""
    with child([*HEADWAY, "serve", "--port", "0", *options], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"serves on (\S+?):? ", line)
        if found is None:
            raise SystemExit(f"headway serve did not start: {line}")
        yield found[1]


# What is shown


def grid(pairs: Sequence[Pair], title: str) -> Grid:
    """A row for each policy and load: over HTTP, simulated, and how far apart at the median.

    Of several seeds the mean, and ± half of what they span.
    """
    heads = ("mean", "median", "p99")
    columns = [Column("load"), Column("policy", text=True)]
    columns += [Column(f"{where} {head}") for where in ("live", "sim") for head in heads]
    columns += [Column("apart"), Column("lost")]
    rows = []
    for load, policy in dict.fromkeys((pair.load, pair.policy) for pair in pairs):
        runs = [pair.runs() for pair in pairs if (pair.load, pair.policy) == (load, policy)]
        cells = [
            spread([run[side].ttft_s[key] for run in runs], "{:.3f}")
            for side in (0, 1)
            for key in ("mean", "p50", "p99")
        ]
        apart = [100.0 * (live.ttft_s["p50"] / simulated.ttft_s["p50"] - 1.0) for live, simulated in runs]
        lost = sum(live.requests - live.completed for live, _ in runs)
        rows.append((f"{load:g}", policy, *cells, f"{spread(apart, '{:+.1f}')} %", str(lost)))
    return Grid(title, tuple(columns), tuple(rows), caption=CAPTION)


def figure(pairs: Sequence[Pair], title: str) -> Figure:
    """Distributions of TTFT, a panel per load: over HTTP in full, simulated dashed."""
    loads = sorted({pair.load for pair in pairs})
    drawn = Figure(figsize=(1.0 + 4.6 * len(loads), 4.2), layout="constrained")
    drawn.suptitle(title, fontsize=10)
    for axes, load in zip(np.atleast_1d(drawn.subplots(1, len(loads), sharey=True)), loads, strict=True):
        for colour, pair in zip(_COLOURS, _first_seed(pairs, load), strict=False):
            for label, outcomes, dash in (("HTTP", pair.live, "-"), ("simulated", pair.simulated, "--")):
                times = sorted(o.first_token_s - o.arrival_s for o in outcomes if o.first_token_s is not None)
                share = np.arange(1, len(times) + 1) / len(times)
                axes.step(times, share, dash, where="post", color=colour, label=f"{pair.policy}, {label}")
        axes.set(title=f"load {load:g}", xlabel="time to first token, s of the model", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    drawn.axes[0].set_ylabel("share of requests")
    return drawn


def _first_seed(pairs: Sequence[Pair], load: float) -> list[Pair]:
    return [pair for pair in pairs if pair.load == load and pair.seed == pairs[0].seed]


def _record(pair: Pair) -> dict[str, Any]:
    live, simulated = map(dataclasses.asdict, pair.runs())
    return {"load": pair.load, "policy": pair.policy, "seed": pair.seed, "live": live, "simulated": simulated}


# The run


def measure(
    given: argparse.Namespace, cluster: ClusterSpec, items: Sequence[Item], policy: str, seed: int
) -> list[Outcome]:
    """Replay the items through a gateway of its own. `POLICY@inferred`: the engines publish no events."""
    policy, _, how = policy.partition("@")
    options = ["--cluster", given.cluster, "--policy", policy, "--batch", given.batch]
    options += ["--speed", str(given.speed), "--seed", str(seed), "--dialect", given.dialect]
    if how:
        options.append("--no-events")
    with service(options) as url, asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(replay(url, ask(cluster.name), items, speed=given.speed, slo=cluster.slo))


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description=__doc__.partition("\n")[0])
    parser.add_argument("--cluster", default="dsv3-h200-pd", help="a preset or a .toml file")
    parser.add_argument("--trace", type=Path, help="a recorded trace (default: the fitted workload)")
    parser.add_argument("--workload", default="azure-code", help="a fitted workload")
    parser.add_argument(
        "--policies",
        default="staggered,round-robin",
        help="NAME@inferred: before engines without pass events",
    )
    parser.add_argument("--batch", default="vllm-v1")
    parser.add_argument("--dialect", default="vllm", choices=("vllm", "sglang"))
    parser.add_argument("--load", default="0.6", help="fractions of nominal capacity: 0.3,0.6")
    parser.add_argument("--requests", type=int, default=300, help="per policy and load")
    parser.add_argument(
        "--most-output", type=int, help="cut answers to so many tokens: the last one may take minutes"
    )
    parser.add_argument("--speed", type=float, default=0.25, help="pace of the engines")
    parser.add_argument("--seeds", default="0", help="of arrivals, lengths and policies: 0,1,2")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def main() -> None:
    """Run all policies at all loads in turn."""
    given = options()
    cluster = load_cluster(given.cluster)
    workload = load_trace(given.trace) if given.trace else parametric(given.workload)
    nominal = nominal_capacity_rps(cluster, workload.mean_prompt_tokens, workload.mean_output_tokens)
    pairs: list[Pair] = []
    for seed in map(int, given.seeds.split(",")):
        for load in map(float, given.load.split(",")):
            rps = load * nominal
            items = make_items(workload, rps=rps, arrivals="poisson", requests=given.requests, seed=seed)
            if given.most_output is not None:
                items = [i._replace(output_tokens=min(i.output_tokens, given.most_output)) for i in items]
            for policy in given.policies.split(","):
                wall_s = items[-1].arrival_s / given.speed
                print(
                    f"seed {seed}, load {load:g}, {policy}: {len(items)} requests in {wall_s:.0f} s",
                    flush=True,
                )
                live = measure(given, cluster, items, policy, seed)
                name = policy.partition("@")[0]
                simulated = simulate(cluster, items, name, given.batch, seed=seed).outcomes
                pairs.append(Pair(load, policy, seed, live, simulated))
    show(
        given,
        pairs,
        f"{cluster.name} at {given.speed:g} × its speed, {workload.name}, over HTTP and simulated",
    )


def show(given: argparse.Namespace, pairs: Sequence[Pair], title: str) -> None:
    """Print the table; write the figure and the numbers."""
    Console(width=140 if not sys.stdout.isatty() else None).print(to_rich(grid(pairs, title), width=140))
    given.out.mkdir(parents=True, exist_ok=True)
    figure(pairs, title).savefig(given.out / "live.png", dpi=160, facecolor="white")
    (given.out / "live.json").write_text(json.dumps([_record(pair) for pair in pairs], indent=1))
    print(f"wrote {given.out / 'live.png'} and {given.out / 'live.json'}")


if __name__ == "__main__":
    main()
