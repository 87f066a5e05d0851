"""The P/D cluster behind a real Envoy: SBS by the picker against Envoy's own policies, gateway and simulator.

    python -m benchmarks.epp_live --load 0.6 --requests 300 --out out

Emulated engines, a port for each rank. One trace and seed goes in turn through: `headway serve`; Envoy with
`headway epp`, where a coordinator asks for prefill and decode one after the other (`coordinator.py`); the
same coordinator and Envoy with its round robin, and with its least-request, over the same ports; and the
simulator. Arrivals are open-loop, times in the model's seconds, as in `benchmarks.live`.
"""

import argparse
import asyncio
import dataclasses
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import envoys
from benchmarks.children import HEADWAY, child, headway_serve
from benchmarks.coordinator import coordinator
from benchmarks.epp import running
from benchmarks.live import ask
from benchmarks.replay import PATIENCE_S, loop_factory, replay
from headway.front.config import InstanceSpec
from headway.hosts.sim import simulate
from headway.model.cluster import ClusterSpec
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.report.metrics import Outcome, Run, summarise
from headway.report.tables import Column, Grid, to_rich
from headway.workload import Item, make_items, parametric

WAYS = ("gateway", "picker", "round-robin", "least-request", "simulator")
_ENVOYS_OWN = {"round-robin": "ROUND_ROBIN", "least-request": "LEAST_REQUEST"}


@contextmanager
def engines(given: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """Run the emulated cluster; yields a gateway's configuration for it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gateway.toml"
        command = [*HEADWAY, "emulate", "--cluster", given.cluster, "--speed", str(given.speed)]
        command += ["--port", "0", "--rank-by", "port", "--seed", str(seed), "--write-config", str(file)]
        with child(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("wrote"):
                    yield tomllib.loads(file.read_text())
                    return
            raise SystemExit("headway emulate did not start")


@contextmanager
def picked(data: dict[str, Any], policy: str) -> Iterator[str]:
    """Run the picker and an Envoy before the engines; yields Envoy's URL."""
    tables = {
        "server": {"host": "127.0.0.1", "grpc_port": 0, "grpc_health_port": 0},
        "metrics": {"host": "127.0.0.1", "port": 0},
        "picker": {"handover": "phases"},
        "policy": {"cluster": policy},
        "tls": {"mode": "off"},
        "logs": {"level": "warning", "access": False},
    }
    with running(data | tables) as picks:
        config = envoys.load("original-dst")
        envoys.before_picker(config, picks.port)
        envoys.connections(config)["preserve_external_request_id"] = True
        with envoys.envoy(config) as front:
            yield front.url


@contextmanager
def balanced(data: dict[str, Any], policy: str) -> Iterator[str]:
    """Run an Envoy that balances by itself, over every rank's port of the phase's role; yields its URL."""
    config = envoys.load("override-host")
    envoys.without_picker(config)
    known = config["static_resources"]["clusters"][0]
    specs = [InstanceSpec.model_validate(each) for each in data["instances"]]
    clusters, routes = [], []
    for role in ("prefill", "decode"):
        urls = [s.rank_url(rank) for s in specs if s.role.value == role for rank in range(s.ranks)]
        own = {key: value for key, value in known.items() if key != "load_balancing_policy"}
        own |= {"name": role, "lb_policy": policy}
        own["load_assignment"] = {
            "cluster_name": role,
            "endpoints": [{"lb_endpoints": envoys.endpoints(urls)}],
        }
        clusters.append(own)
        match = {"prefix": "/", "headers": [{"name": "epp-profile", "string_match": {"exact": role}}]}
        routes.append({"match": match, "route": {"cluster": role, "timeout": "0s"}})
    config["static_resources"]["clusters"] = clusters
    envoys.connections(config)["route_config"]["virtual_hosts"][0]["routes"] = routes
    with envoys.envoy(config) as front:
        yield front.url


def measure(
    way: str, given: argparse.Namespace, cluster: ClusterSpec, items: Sequence[Item], seed: int
) -> list[Outcome]:
    """Send the items one of the ways."""
    if way == "simulator":
        return simulate(cluster, items, given.policy, "vllm-v1", seed=seed).outcomes
    with engines(given, seed) as data:
        if way == "gateway":
            tables = {"server": {"port": 0}, "policy": {"cluster": given.policy}}
            quiet = {"logs": {"level": "warning", "access": False}}
            with headway_serve(data | tables | quiet) as url:
                return _replay(url, given, cluster, items, phases=False)
        front = picked(data, given.policy) if way == "picker" else balanced(data, _ENVOYS_OWN[way])
        with front as url:
            return _replay(url, given, cluster, items, phases=True)


def _replay(
    url: str, given: argparse.Namespace, cluster: ClusterSpec, items: Sequence[Item], *, phases: bool
) -> list[Outcome]:
    async def run() -> list[Outcome]:
        if not phases:
            return await replay(url, ask(cluster.name), items, speed=given.speed, slo=cluster.slo)
        async with coordinator(url, timeout_s=PATIENCE_S / given.speed) as through:
            return await replay(through, ask(cluster.name), items, speed=given.speed, slo=cluster.slo)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(run())


def grid(runs: Sequence[tuple[str, int, float, Run]], title: str) -> Grid:
    """A row for each way, load and seed."""
    columns = [Column("load"), Column("seed"), Column("way", text=True)]
    columns += [Column(f"TTFT {head}") for head in ("mean", "median", "p99")]
    columns += [Column("TPOT mean"), Column("lost")]
    rows = []
    for way, seed, load, run in runs:
        ttft = [f"{run.ttft_s[key]:.3f}" for key in ("mean", "p50", "p99")]
        lost = str(run.requests - run.completed)
        rows.append((f"{load:g}", str(seed), way, *ttft, f"{run.tpot_s['mean']:.4f}", lost))
    return Grid(title, tuple(columns), tuple(rows), caption="seconds of the model; lost: or refused")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.epp_live", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--cluster", default="dsv3-h200-pd", help="a preset or a .toml file, disaggregated")
    parser.add_argument("--workload", default="azure-code", help="a fitted workload")
    parser.add_argument("--policy", default="staggered")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--load", default="0.6", help="fractions of nominal capacity: 0.3,0.6")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--most-output", type=int, default=200, help="cut answers to so many tokens")
    parser.add_argument("--speed", type=float, default=0.25, help="pace of the engines")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def main() -> None:
    """Run all ways at all loads in turn."""
    given = options()
    cluster, workload = load_cluster(given.cluster), parametric(given.workload)
    nominal = nominal_capacity_rps(cluster, workload.mean_prompt_tokens, workload.mean_output_tokens)
    runs: list[tuple[str, int, float, Run]] = []
    for seed in map(int, given.seeds.split(",")):
        for load in map(float, given.load.split(",")):
            rps = load * nominal
            items = make_items(workload, rps=rps, arrivals="poisson", requests=given.requests, seed=seed)
            items = [i._replace(output_tokens=min(i.output_tokens, given.most_output)) for i in items]
            for way in given.ways.split(","):
                wall_s = items[-1].arrival_s / given.speed
                print(f"seed {seed}, load {load:g}, {way}: {len(items)} requests, {wall_s:.0f} s", flush=True)
                outcomes = measure(way, given, cluster, items, seed)
                run = summarise(outcomes, policy=way, batch="", load=load, rps=rps, seed=seed)
                runs.append((way, seed, load, run))
    title = f"{cluster.name} at {given.speed:g} × its speed, {workload.name}: {given.policy} through Envoy"
    Console(width=140 if not sys.stdout.isatty() else None).print(to_rich(grid(runs, title), width=140))
    given.out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"way": way, "seed": seed, "load": load} | dataclasses.asdict(run) for way, seed, load, run in runs
    ]
    (given.out / "epp_live.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
