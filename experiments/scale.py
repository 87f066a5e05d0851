"""10,000 ranks and 10,000 requests/s, cut into shards: what the size of a shard costs, and what it saves.

    python -m experiments.scale [UNITS …] [--policy staggered] [--seconds 60] [--load 1.0]

The cluster is DeepSeek-V3 on H200, three prefill instances of EP8 to one decode instance of EP32 (a unit of
56 ranks), at DeepSeek-R1 lengths and one request per second and rank. A shard is a scheduler of its own with
a part of the units; the clients' requests are spread over the shards by hash, so that each sees a Poisson
stream of its own. One shard is simulated; all are alike. Each row says what the policy's decisions cost: the
events that it heard, handed to the policy alone once more, in CPU time.

A request that is still under way at the end is run to its end; the latencies are those of requests that came
in the second half, when the decode pool has filled up.
"""

import argparse

from benchmarks import cpu_s
from benchmarks.scale_units import UNIT_RANKS, Recorder, cluster_of, replay

from experiments.table import head, row
from headway.core.events import PassEnded
from headway.hosts.sim import simulate
from headway.report.metrics import summarise
from headway.wire.schema import decode, encode
from headway.workload import make_items, parametric

RANKS, RPS = 10_000, 10_000
COLUMNS = (
    "shards",
    "ranks of one",
    "requests/s",
    "mean TTFT s",
    "p99 TTFT s",
    "mean TPOT ms",
    "in SLO",
    "pass events/s",
    "policy µs/request",
    "policy, share of a core",
    "wire, share of a core",
    "cores for all, policy and wire",
)


def main() -> None:
    """Print one row per size of a shard."""
    parser = argparse.ArgumentParser()
    parser.add_argument("units", nargs="*", type=int, default=[1, 2, 6, 12, 22], help="of one shard")
    parser.add_argument("--policy", default="staggered")
    parser.add_argument("--seconds", type=float, default=60.0, help="simulated")
    parser.add_argument("--load", type=float, default=1.0, help="requests per second and rank")
    given = parser.parse_args()
    title = f"{RANKS:,} ranks, {given.load * RPS:,.0f} requests/s of deepseek-r1, {given.policy}"
    head(f"{title}, {given.seconds:g} s each", *COLUMNS)
    for units in given.units:
        row(*shard(units, given.policy, given.seconds, given.load))


def shard(units: int, policy: str, seconds: float, per_rank_rps: float) -> tuple[object, ...]:
    """Simulate one shard and return its row."""
    ranks = units * UNIT_RANKS
    rps = per_rank_rps * ranks * RPS / RANKS
    requests = round(rps * seconds)
    items = make_items(parametric("deepseek-r1"), rps=rps, arrivals="poisson", requests=requests, seed=units)
    recorder = Recorder()
    result = simulate(cluster_of(units), items, policy, "vllm-v1", seed=units, observers=[recorder])
    late = [outcome for outcome in result.outcomes if outcome.arrival_s >= seconds / 2]
    run = summarise(late, policy=policy, batch="vllm-v1", load=None, rps=rps, seed=units)
    half_s, end_s = seconds / 2, items[-1].arrival_s
    cost = replay(recorder.stream, half_s, end_s, policy=policy)
    passes = [
        event for now, event in recorder.stream if half_s <= now <= end_s and isinstance(event, PassEnded)
    ]
    passes_s = len(passes) / cost.duration_s
    wire_share = passes_s * wire_s(passes)
    share = cost.total_s / cost.duration_s
    shards = RANKS / ranks
    return (
        f"{shards:.0f}",
        f"{ranks:,}",
        f"{rps:,.0f}",
        f"{run.ttft_s['mean']:.3f}",
        f"{run.ttft_s['p99']:.2f}",
        f"{1e3 * run.tpot_s['mean']:.1f}",
        f"{run.slo_attainment:.3f}",
        f"{passes_s:,.0f}",
        f"{1e6 * cost.total_s / cost.requests:.0f}",
        f"{100 * share:.1f}%",
        f"{100 * wire_share:.1f}%",
        f"{shards * (share + wire_share):.1f}",
    )


def wire_s(passes: list[PassEnded]) -> float:
    """Return the CPU seconds of reading one of these events from its bytes, on average."""
    some = [encode(event) for event in passes[:: max(1, len(passes) // 400)]]
    return cpu_s(lambda: [decode(data) for data in some]) / len(some)


if __name__ == "__main__":
    main()
