"""Is the simulator true? A real vLLM measured, calibrated, and simulated under the very same requests.

    make test-engine                                              # once: prepares .venv-vllm
    python -m benchmarks.vllm_truth run --trace FILE --out out    # serve, measure, then report
    python -m benchmarks.vllm_truth report --out out              # of what was measured into that folder

One server per policy (`vllm-v1` is vLLM's own schedule), tiny random Llama on the CPU, one core for the
engine and one for its front end and this client. Each is asked for requests one at a time (what HTTP
and the front end add), then loads with seeds 1, 2 and 3. The engine is fitted to the steps of the first and
the last of them, as `headway calibrate` does: what drifts on the machine is in both. The simulator gets all
requests as they were sent, and its load with seed 2 is held against the measured one: nothing of that load
went into the calibration.
"""

import argparse
import asyncio
import csv
import json
import sys
import time
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.replay import LEAD_S, loop_factory, replay
from benchmarks.vllm_fair import MAX_MODEL_LEN, ask, scaled
from headway.core.request import Slo
from headway.hosts.sim import simulate
from headway.model.calibration import (
    Step,
    errors_by_regime,
    fit_hinge,
    host_gap_s,
    jitter,
    read_steps,
    to_toml,
    without_gap,
)
from headway.model.cluster import ClusterSpec, PoolSpec
from headway.model.costs import DenseCosts
from headway.report.metrics import Outcome, summarise
from headway.report.tables import Column, Grid, to_rich
from headway.workload import Item, Workload, load_trace, make_items, parametric

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "engine"))  # its servers and models
from models import tiny_llama
from servers import Engine, serving

SEATS = 256
#: Loads and their seeds, in order.
LOADS = (("calibration", 1), ("truth", 2), ("calibration", 3))
#: Longer than a recorder keeps steps back.
SETTLE_S = 1.5
#: Requests that are served alone: four lengths, several times each.
ALONE = [Item(1.0 * n, (16, 256, 1000, 1900)[n % 4], 8) for n in range(20)]


def engine(given: argparse.Namespace, model: Path, policy: str) -> Engine:
    """Return how to serve a policy."""
    told = {
        "policy": policy,
        "ttft_s": given.ttft,
        "tpot_s": given.tpot,
        "steps": str(steps_of(given, policy)),
    }
    return Engine(
        model,
        scheduler="headway.hosts.vllm.FairScheduler",
        additional_config={"headway": told},
        max_model_len=MAX_MODEL_LEN,
        batch_tokens=given.budget,
        arguments=("--no-enable-prefix-caching", "--disable-log-stats", "--max-num-seqs", str(SEATS)),
    )


def steps_of(given: argparse.Namespace, policy: str) -> Path:
    """Return where the steps of a policy's server are recorded."""
    return (given.out / f"steps-{policy.replace(':', '-')}.csv").resolve()


def record_of(given: argparse.Namespace, policy: str) -> Path:
    """Return where what was measured of a policy is kept."""
    return given.out / f"truth-{policy.replace(':', '-')}.json"


class Served:
    """One server and what was asked of it. `start_s` of a phase: where its times count from, on the machine's
    monotonic clock, which is that of the recorded steps too.
    """

    def __init__(self, given: argparse.Namespace, url: str) -> None:
        self._url = url
        self._runner = asyncio.Runner(loop_factory=loop_factory())
        self._slo = Slo(given.ttft, given.tpot)
        self.phases: list[dict[str, Any]] = []

    def ask(self, phase: str, items: Sequence[Item], seed: int) -> None:
        """Send items as they are due; note what became of them and which steps they were."""
        start_s, outcomes = self._runner.run(self._replay(items, seed))
        self.phases.append({"phase": phase, "start_s": start_s, "outcomes": [_plain(o) for o in outcomes]})

    async def _replay(self, items: Sequence[Item], seed: int) -> tuple[float, list[Outcome]]:
        start_s = time.monotonic() + LEAD_S
        return start_s, await replay(self._url, ask(seed), items, slo=self._slo)


def _plain(outcome: Outcome) -> list[Any]:
    if outcome.rejected:
        raise SystemExit(f"request {outcome.request_id}: {outcome.rejected}")
    sizes = [outcome.arrival_s, outcome.prompt_tokens, outcome.output_tokens]
    return [*sizes, outcome.first_token_s, outcome.finished_s]


def measure(given: argparse.Namespace) -> None:
    """Serve every policy and note everything; one policy is asked while the others sleep."""
    workload = scaled(load_trace(given.trace) if given.trace else parametric(given.workload), given.scale)
    model = tiny_llama(Path(given.python).resolve().parent.parent / "models" / "tiny-llama")
    policies = given.policies.split(",")
    engines = [engine(given, model, policy) for policy in policies]
    with serving(*engines, python=given.python, logs=given.out) as servers:
        for policy, server in zip(policies, servers, strict=True):
            served = Served(given, server.url)
            served.ask("warm", _items(workload, given, 98, seconds=10.0), 98)
            served.ask("alone", ALONE, 97)
            for phase, seed in LOADS:
                served.ask(phase, _items(workload, given, seed, given.seconds), seed)
            time.sleep(SETTLE_S)
            record = {"policy": policy, "slo": [given.ttft, given.tpot], "budget": given.budget}
            record |= {"rps": given.rps, "workload": workload.name, "phases": served.phases}
            record_of(given, policy).write_text(json.dumps(record))
            print(f"{policy}: measured", flush=True)


def _items(workload: Workload, given: argparse.Namespace, seed: int, seconds: float) -> Sequence[Item]:
    count = max(8, round(given.rps * seconds))
    return make_items(workload, rps=given.rps, arrivals=given.arrivals, requests=count, seed=seed)


# What is made of it


def report(given: argparse.Namespace) -> None:
    """Calibrate on the first policy's steps, simulate every policy, and show both side by side."""
    policies = [policy for policy in given.policies.split(",") if record_of(given, policy).exists()]
    if not policies:
        raise SystemExit(f"{given.out}: nothing was measured there")
    records = [json.loads(record_of(given, policy).read_text()) for policy in policies]
    cluster = calibrated(given, records[0])
    rows: list[tuple[str, ...]] = []
    for record in records:
        steps = steps_in(given, record, "truth", given.out / "truth.csv")
        show_errors(f"{record['policy']}, seed 2", cluster.pools[0], steps)
        rows += compare(record, simulated(cluster, record))
    columns = [Column("policy", text=True), Column("what", text=True)]
    columns += [Column("measured"), Column("simulated"), Column("off"), Column("aim")]
    title = f"{records[0]['workload']} × {given.scale:g}, {records[0]['rps']:g} requests/s, seed 2"
    Console(width=110).print(to_rich(Grid(title, tuple(columns), tuple(rows)), width=110))


def calibrated(given: argparse.Namespace, record: dict[str, Any]) -> ClusterSpec:
    """Fit the engine to the steps of seeds 1 and 3; write OUT/calibration.csv and OUT/cluster.toml."""
    steps = steps_in(given, record, "calibration", given.out / "calibration.csv")
    gap_s = host_gap_s(steps)
    own = without_gap(steps, gap_s)
    costs = fit_hinge(own)
    alone = next(phase for phase in record["phases"] if phase["phase"] == "alone")
    dispatch_s, answer_s = front_latencies(alone, read_rows(steps_of(given, record["policy"])))
    text = CLUSTER.format(
        ttft_s=record["slo"][0],
        tpot_s=record["slo"][1],
        dispatch_s=dispatch_s,
        answer_s=answer_s,
        budget=record["budget"],
        seats=SEATS,
        costs=to_toml(costs, host_gap_s=gap_s, jitter=jitter(costs, own)),
    )
    (given.out / "cluster.toml").write_text(text)
    print(text)
    cluster = ClusterSpec.from_toml(given.out / "cluster.toml")
    show_errors(f"{record['policy']}, seeds 1 and 3", cluster.pools[0], steps)
    return cluster


def steps_in(given: argparse.Namespace, record: dict[str, Any], phase: str, path: Path) -> list[Step]:
    """Write the steps of one kind of load into a file, and read it as `headway calibrate` does."""
    begins_s = [each["start_s"] for each in record["phases"]]
    names = ["", *(each["phase"] for each in record["phases"])]
    rows = read_rows(steps_of(given, record["policy"]))
    own = [row for row in rows if names[bisect(begins_s, row["ended_s"])] == phase]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, own[0].keys())
        writer.writeheader()
        writer.writerows(own)
    return read_steps(path)


def show_errors(what: str, pool: PoolSpec, steps: Sequence[Step]) -> None:
    """Say how far the fit is off: on steps it was not made of, a bias tells that the machine has changed."""
    assert isinstance(pool.costs, DenseCosts)
    for error in errors_by_regime(pool.costs, without_gap(steps, pool.host_gap_s)):
        shares = f"bias {error.bias:+6.1%}, mean error {error.mean:5.1%}"
        print(f"{what}: {error.regime:8} {error.steps:6} steps, {shares}")


#: vLLM's CPU blocks; 1 GiB of KV, 4 layers, 2 heads of 64 in float32, keys and values; one block is its own.
CLUSTER = """\
kv_bytes_per_token = 4096
[slo]
ttft_s = {ttft_s}
tpot_s = {tpot_s}
[network]
dispatch_latency_s = {dispatch_s:.6f}
answer_latency_s = {answer_s:.6f}
[[pools]]
role = "aggregated"
lockstep = false
token_cap = {budget}
max_running = {seats}
kv_blocks = 2047
block_tokens = 128
{costs}"""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read recorded steps; numbers as numbers."""
    with path.open(newline="") as file:
        return [
            {name: text if name == "phase" else float(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def front_latencies(alone: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Return medians, in s: from sending to the step's begin, and from its end to the first token."""
    first_s = alone["start_s"]
    last_s = first_s + max(outcome[4] for outcome in alone["outcomes"])
    steps = [row for row in rows if row["phase"] == "prefill" and first_s < row["ended_s"] < last_s]
    if len(steps) != len(alone["outcomes"]):
        raise SystemExit(f"{len(alone['outcomes'])} requests alone, but {len(steps)} prefill steps")
    ways = [
        (step["ended_s"] - step["duration_s"] - first_s - sent_s, first_s + token_s - step["ended_s"], prompt)
        for step, (sent_s, prompt, _, token_s, _) in zip(steps, alone["outcomes"], strict=True)
    ]
    for prompt in sorted({way[2] for way in ways}):
        there, back = (1e3 * median([way[i] for way in ways if way[2] == prompt]) for i in (0, 1))
        print(f"front end, prompt of {prompt}: {there:.2f} ms there, {back:.2f} ms back")
    return median([way[0] for way in ways]), median([way[1] for way in ways])


def simulated(cluster: ClusterSpec, record: dict[str, Any]) -> list[Outcome]:
    """Serve all that the real engine was sent, when it was sent; return the outcomes of seed 2."""
    begun_s = record["phases"][0]["start_s"]
    items = [
        Item(phase["start_s"] - begun_s + sent_s, prompt, output)
        for phase in record["phases"]
        for sent_s, prompt, output, _, _ in phase["outcomes"]
    ]
    result = simulate(cluster, items, "round-robin", record["policy"], slo=Slo(*record["slo"]))
    names = [phase["phase"] for phase in record["phases"] for _ in phase["outcomes"]]
    return [outcome for outcome, name in zip(result.outcomes, names, strict=True) if name == "truth"]


def compare(record: dict[str, Any], outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return rows: percentiles measured and simulated."""
    real = []
    truth = next(phase for phase in record["phases"] if phase["phase"] == "truth")
    for number, (sent_s, prompt, output, token_s, end_s) in enumerate(truth["outcomes"]):
        real.append(Outcome(str(number), sent_s, prompt, output, Slo(*record["slo"])))
        real[-1].first_token_s, real[-1].finished_s = token_s, end_s
    rows = []
    there, here = (
        summarise(each, policy=record["policy"], batch="", load=None, rps=record["rps"], seed=2)
        for each in (real, outcomes)
    )
    for name, unit in (("ttft_s", "TTFT"), ("tpot_s", "TPOT")):
        for quantile, aim in (("p50", 0.05), ("p90", None), ("p99", 0.15)):
            measured, guessed = getattr(there, name)[quantile], getattr(here, name)[quantile]
            off = guessed / measured - 1.0
            told = "" if aim is None else f"{aim:.0%} {'met' if abs(off) <= aim else 'missed'}"
            cells = (f"{1e3 * measured:.1f} ms", f"{1e3 * guessed:.1f} ms", f"{off:+.1%}", told)
            rows.append((record["policy"], f"{unit} {quantile}", *cells))
    shares = (f"{there.slo_attainment:.3f}", f"{here.slo_attainment:.3f}")
    rows.append((record["policy"], "in SLO", *shares, "", ""))
    return rows


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_truth", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="of the environment with vLLM")
    parser.add_argument("--trace", type=Path, help="a recorded trace (default: the fitted workload)")
    parser.add_argument("--workload", default="azure-conv", help="a fitted workload")
    parser.add_argument("--scale", type=float, default=0.5, help="of the trace's lengths")
    parser.add_argument("--policies", default="vllm-v1,fair,triage")
    parser.add_argument("--budget", type=int, default=2048, help="--max-num-batched-tokens")
    parser.add_argument("--arrivals", default="poisson", help="poisson, gamma:CV or recorded")
    parser.add_argument("--rps", type=float, default=3.0, help="requests/s")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals in each load")
    parser.add_argument("--ttft", type=float, default=1.0, help="target, s")
    parser.add_argument("--tpot", type=float, default=0.08, help="target, s")
    parser.add_argument("--out", type=Path, default=Path("out"))
    return parser.parse_args()


def main() -> None:
    """Measure, then show."""
    given = options()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.what == "run":
        measure(given)
    report(given)


if __name__ == "__main__":
    main()
