"""What a scheduler pays for each thing that happens, over the size of its pool: the numbers of docs/scale.md.

    python -m benchmarks.scale_units [policy] [pass] [wire] [memory]

"policy": the events of a simulation of a P/D cluster at 0.8 of its capacity, handed once more to the policy
alone, and its CPU time by kind of event. "pass": the end of a pass of one lockstep group in a decode pool,
with nothing held. "wire": one pass event from bytes to the core's event. "memory": what a held request and a
rank keep allocated in the policy. A front door's own part (HTTP, gRPC) is measured in docs/gateway.md and
docs/envoy.md.
"""

import gc
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import process_time_ns

from benchmarks import Figure, cpu_s, show
from headway.core.actions import Dispatch
from headway.core.cluster.compose import create_cluster
from headway.core.cluster.contract import ClusterPolicy
from headway.core.events import Arrived, Event, InstanceUp, PassEnded, Role, TimerFired
from headway.core.request import Request
from headway.hosts.sim import simulate
from headway.model.cluster import ClusterSpec
from headway.model.presets import load_cluster, nominal_capacity_rps
from headway.wire.schema import decode, encode
from headway.workload import make_items, parametric

#: A unit of the cluster: three prefill instances of EP8 and a decode instance of EP32.
UNIT_RANKS = 3 * 8 + 32
UNITS = (1, 2, 5, 9, 18)
RANKS = (32, 64, 128, 256, 512, 1024)
POLICY = "staggered"


def cluster_of(units: int) -> ClusterSpec:
    """Return DeepSeek-V3 with so many units of prefill and decode."""
    cluster = load_cluster("dsv3-h200-pd").with_pool(Role.PREFILL, instances=3 * units)
    return cluster.with_pool(Role.DECODE, instances=units)


@dataclass(frozen=True, slots=True)
class Replay:
    """What a stream of events cost a policy. `cpu_s`, `events`: by kind of event. `duration_s`: simulated."""

    requests: int
    duration_s: float
    cpu_s: dict[str, float]
    events: dict[str, int]

    @property
    def total_s(self) -> float:
        """CPU of all of it."""
        return sum(self.cpu_s.values())

    def each_us(self, kind: str) -> float:
        """CPU of one event of a kind; 0 where there was none."""
        return 1e6 * self.cpu_s.get(kind, 0.0) / max(1, self.events.get(kind, 0))


Stream = list[tuple[float, Event]]


class Recorder:
    """Observes a simulation and keeps its events."""

    def __init__(self) -> None:
        self.stream: Stream = []

    def __call__(self, now: float, event: Event, actions: object) -> None:
        """See `Observer`."""
        self.stream.append((now, event))


def replay(stream: Stream, from_s: float, until_s: float, runs: int = 2, policy: str = POLICY) -> Replay:
    """Hand a stream to fresh policies and return the cheapest run, of which a span of time counts."""
    heard = [(now, event) for now, event in stream if now <= until_s]
    return min((_replay(heard, from_s, policy) for _ in range(runs)), key=lambda run: run.total_s)


def _replay(stream: Stream, from_s: float, spec: str) -> Replay:
    policy = create_cluster(spec, disaggregated=True, rng=random.Random("0/policy"))
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    idle_ns = _clock_ns()
    gc.collect()
    for now, event in stream:
        kind = _kind(event)
        began_ns = process_time_ns()
        policy.handle(event, now)
        policy.wake_at()
        spent_ns = process_time_ns() - began_ns - idle_ns
        if now >= from_s:
            spent[kind] += spent_ns
            count[kind] += 1
    in_s = {kind: total_ns / 1e9 for kind, total_ns in spent.items()}
    return Replay(count["Arrived"], stream[-1][0] - from_s, in_s, dict(count))


def _clock_ns() -> int:
    """Return what reading the clock twice costs by itself: the median of many."""
    found = []
    for _ in range(2001):
        began_ns = process_time_ns()
        found.append(process_time_ns() - began_ns)
    return sorted(found)[1000]


def _kind(event: Event) -> str:
    if isinstance(event, PassEnded):
        return f"pass of {len(event.ran_tokens)} ranks"
    return type(event).__name__


# A request through the policy


def of_policy() -> list[Figure]:
    found = []
    for units in UNITS:
        done = at_load(units, "azure-conv", load=0.8, seconds=10.0)
        kinds = ("Arrived", "PrefillDone", "Finished", "pass of 8 ranks", "pass of 32 ranks")
        parts = ", ".join(f"{kind} {done.each_us(kind):.0f}" for kind in kinds)
        case = f"{UNIT_RANKS * units:,} ranks, {done.requests / done.duration_s:,.0f} requests/s"
        per_request = f"{1e6 * done.total_s / done.requests:.0f} µs of CPU a request in all"
        found.append(Figure("policy", case, f"{per_request}; each: {parts} µs"))
    return found


def at_load(units: int, workload: str, *, load: float, seconds: float) -> Replay:
    """Simulate a cluster and replay what its policy heard; the second half counts."""
    cluster, source = cluster_of(units), parametric(workload)
    capacity = nominal_capacity_rps(cluster, source.mean_prompt_tokens, source.mean_output_tokens)
    rps = load * capacity
    items = make_items(source, rps=rps, arrivals="poisson", requests=round(rps * seconds), seed=0)
    recorder = Recorder()
    simulate(cluster, items, POLICY, "vllm-v1", observers=[recorder])
    return replay(recorder.stream, seconds / 2, items[-1].arrival_s)


# The end of a pass


def of_pass() -> list[Figure]:
    found = []
    for ranks in RANKS:
        for instances in (1, 8):
            spent_s = pass_end_s(ranks, instances)
            case = f"{instances} × {ranks:,} ranks in lockstep, nothing held"
            found.append(Figure("pass ended", case, f"{1e6 * spent_s:.1f} µs"))
    return found


def pass_end_s(ranks: int, instances: int, passes: int = 400) -> float:
    """Return the CPU seconds of one report of one group."""
    policy = create_cluster(POLICY, disaggregated=True, rng=random.Random(0))
    policy.handle(InstanceUp("prefill", Role.PREFILL, 8, 4096), 0.0)
    names = [f"decode-{number}" for number in range(instances)]
    for name in names:
        policy.handle(InstanceUp(name, Role.DECODE, ranks, 4096, 20_000, 64, 128), 0.0)
    events = [
        pass_ended(name, ranks, sequence) for sequence in range(1, passes + 1) for name in names
    ]  # one stream, for every run a part of its own: a number that was heard is not heard again
    runs = 5
    part = len(events) // runs
    parts = iter([events[number * part : (number + 1) * part] for number in range(runs)])

    def hear() -> None:
        for event in next(parts):
            policy.handle(event, 0.04 * event.sequence)
            policy.wake_at()

    return cpu_s(hear, runs) / part


def pass_ended(name: str, ranks: int, sequence: int) -> PassEnded:
    """Return the report of a pass of a decode group."""
    rng = random.Random(sequence)
    return PassEnded(
        name,
        0,
        sequence,
        0,
        duration_s=0.035,
        ran_tokens=(0,) * ranks,
        queued_tokens=(0,) * ranks,
        kv_blocks=tuple(rng.randrange(20_000) for _ in range(ranks)),
        running=tuple(rng.randrange(128) for _ in range(ranks)),
        waiting=(0,) * ranks,
    )


# The wire


def of_wire() -> list[Figure]:
    found = []
    for ranks in (1, 8, *RANKS):
        data = encode(pass_ended("decode-0", ranks, 7))
        spent_s = cpu_s(lambda data=data: [decode(data) for _ in range(500)]) / 500  # type: ignore[misc]
        found.append(
            Figure("wire", f"pass event of {ranks:,} ranks, {len(data):,} bytes", f"{1e6 * spent_s:.1f} µs")
        )
    return found


# Memory


def of_memory() -> list[Figure]:
    found = []
    for ranks in (32, 1024):
        grown = kept_bytes(lambda policy, ranks=ranks: _up(policy, ranks)) / (16 * ranks)  # type: ignore[misc]
        found.append(Figure("memory", f"a rank, of 16 × {ranks:,}", f"{grown:,.0f} bytes"))
    for prefix in (0, 5, 50):
        grown = kept_bytes(lambda policy, prefix=prefix: _hold(policy, prefix)) / HELD  # type: ignore[misc]
        case = f"a held request, {prefix} hashes of its prefix"
        found.append(Figure("memory", case, f"{grown:,.0f} bytes"))
    return found


HELD = 10_000


def _up(policy: ClusterPolicy, ranks: int) -> None:
    for number in range(16):
        policy.handle(InstanceUp(f"{ranks}-{number}", Role.DECODE, ranks, 4096, 20_000, 64, 128), 0.0)


def _hold(policy: ClusterPolicy, prefix: int) -> None:
    """Let requests arrive where no engine is."""
    rng = random.Random(0)
    for number in range(HELD):
        hashes = tuple(rng.getrandbits(64) for _ in range(prefix))
        request = Request(
            f"req-{number:08x}", 0.0, rng.randint(16, 8192), prefix=hashes, prefix_block_tokens=256
        )
        actions = policy.handle(Arrived(request), 0.0)
        assert not any(isinstance(action, Dispatch) for action in actions)
    policy.handle(TimerFired(), 0.0)


def kept_bytes(work: Callable[[ClusterPolicy], object]) -> int:
    """Return how much more is allocated after `work` with a new policy than before."""
    policy = create_cluster(POLICY, disaggregated=True, rng=random.Random(0))
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    work(policy)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return after - before


PARTS = {"policy": of_policy, "pass": of_pass, "wire": of_wire, "memory": of_memory}


def figures(names: Iterable[str] = PARTS) -> list[Figure]:
    return [figure for name in names for figure in PARTS[name]()]


if __name__ == "__main__":
    show(figures(sys.argv[1:] or PARTS))
