"""The simulated cluster carries out what a policy asks for, and makes the events that follow from it.

A request's way: arrival → policy → dispatch (on the wire, with its KV when it is prefilled) → engine →
first token → report → (to a decode instance by the same way) → last token → report. What a client sees is
timed at the engine, plus an answer latency; what the policy sees comes a report latency later. Whether a
request can still be taken back is decided by the host's view, as at a real front door: until its first token
was reported, what an engine made of it is thrown away.

Simplification: once its KV left for, or waits for, a decode instance, the death of the prefill instance
does not hurt it.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from headway.core.actions import Action, Dispatch, Poll, Recall, Reject
from headway.core.batch.contract import BatchPolicy
from headway.core.cluster.contract import ClusterPolicy
from headway.core.errors import ConfigError, InvariantError, unknown_name
from headway.core.events import (
    Arrived,
    Event,
    Failed,
    Finished,
    InstanceDown,
    InstanceUp,
    PassEnded,
    PrefillDone,
    Role,
)
from headway.core.request import Request, Slo
from headway.hosts.sim.counters import PassCounters
from headway.hosts.sim.driver import Driver, Observer
from headway.hosts.sim.faults import Fault
from headway.hosts.sim.kernel import ARRIVAL, DELIVERY, FAULT, PASS_END, REPORT, START, Kernel
from headway.model.cluster import ClusterSpec
from headway.model.engine import PassOutcome, Work
from headway.model.instance import Group, Instance
from headway.report.metrics import Outcome, PassRecord
from headway.workload.items import Item

__all__ = ["Flight", "SimCluster"]

#: When only timers and polls have happened for so long, nothing else will: what is left is given up.
PATIENCE_S = 600.0


@dataclass(slots=True, eq=False)
class Flight:
    """A request that is not resolved.

    `work` is what of it is at an instance or on its way there; None: the policy has it.
    """

    request: Request
    outcome: Outcome
    work: Work | None = None
    instance: Instance | None = None
    rank: int = 0

    @property
    def prefilled(self) -> bool:
        """Whether the client has its first token."""
        return self.outcome.first_token_s is not None


class SimCluster:
    """One run: `run()` it once, then read `outcomes`, `passes`, `counters` and `kernel.now`.

    `make_batch` and the seeds are by name, so that the engines of two policies draw the same random
    numbers. Raises ConfigError for a fault of an unknown instance and arrivals that go backwards,
    InvariantError when the policy breaks its contract.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        policy: ClusterPolicy,
        make_batch: Callable[[str], BatchPolicy],
        *,
        seed: int = 0,
        slo: Slo | None = None,
        faults: Iterable[Fault] = (),
        observers: Sequence[Observer] = (),
        keep_passes: bool = False,
        on_resolved: Callable[[], None] = lambda: None,
    ) -> None:
        self.kernel = Kernel()
        self.counters = PassCounters()
        self.outcomes: list[Outcome] = []
        self.passes: list[PassRecord] = []
        self._spec = spec
        self._network = spec.network
        self._slo = slo or spec.slo
        self._keep_passes = keep_passes
        self._on_resolved = on_resolved
        self._driver = Driver(policy, self.kernel, self._carry_out, observers, self._woken)
        self._instances = {
            name: Instance(
                name,
                pool,
                make_batch,
                lambda group: random.Random(f"{seed}/engine/{group}"),
                tells_pab=policy.reads_pab,
            )
            for pool in spec.pools
            for name in pool.instance_names()
        }
        self._faults = [self._known(fault) for fault in faults]
        self._flights: dict[str, Flight] = {}
        self._arrivals: Iterator[Item] = iter(())
        self._expected = 0
        self._progress_s = 0.0

    def run(self, items: Sequence[Item]) -> None:
        """Serve the items. In the end each has an outcome: completed, or rejected and why."""
        self._expected = len(items)
        self._arrivals = iter(items)
        for fault in self._faults:
            self.kernel.at(fault.at_s, FAULT, self._inject, fault)
        self._expect_arrival(0.0)
        for instance in self._instances.values():
            self._driver.feed(instance.up(), 0.0)
        self.kernel.run()
        for flight in list(self._flights.values()):
            self._resolve(flight, rejected="timed-out")

    # What the policy asks for.

    def _carry_out(self, now: float, action: Action) -> None:
        if isinstance(action, Dispatch):
            self._dispatch(now, action)
        elif isinstance(action, Reject):
            self._resolve(self._in_hand(action), rejected=action.why)
        elif isinstance(action, Recall):
            self._recall(action)
        else:
            self._poll(now, action)

    def _dispatch(self, now: float, action: Dispatch) -> None:
        flight = self._in_hand(action)
        instance = self._named(action)
        if not 0 <= action.rank < instance.pool.ranks:
            raise InvariantError(f"{action}: {instance.name} has {instance.pool.ranks} ranks")
        if flight.prefilled != (instance.pool.role is Role.DECODE):
            raise InvariantError(
                f"{action}: request is {'' if flight.prefilled else 'not '}prefilled already"
            )
        latency_s = self._network.dispatch_latency_s
        if flight.prefilled:
            latency_s += self._spec.kv_transfer_s(flight.request.prompt_tokens)
        else:
            flight.outcome.dispatched_s = now
        flight.instance, flight.rank = instance, action.rank
        flight.work = self._work(flight)
        if instance.told_epoch == instance.epoch:
            instance.inbox.expect(action.number)
        self.kernel.at(
            now + latency_s,
            DELIVERY,
            self._deliver,
            flight,
            flight.work,
            instance,
            instance.told_epoch,
            action.number,
        )

    def _work(self, flight: Flight) -> Work:
        work = Work(flight.request, flight.outcome.output_tokens, flight.prefilled)
        work.first_token_s = flight.outcome.first_token_s
        return work

    def _recall(self, action: Recall) -> None:
        flight = self._flights.get(action.request_id)
        if flight is None or flight.work is None or flight.prefilled:
            raise InvariantError(f"{action}: it is not there, or the client has its first token")
        if flight.instance is not None:
            group, _ = flight.instance.locate(flight.rank)
            group.engine.cancel(action.request_id)
        flight.work = flight.instance = None

    def _poll(self, now: float, action: Poll) -> None:
        self.kernel.at(now + self._network.dispatch_latency_s, DELIVERY, self._polled, self._named(action))

    def _named(self, action: Dispatch | Poll) -> Instance:
        if action.instance not in self._instances:
            raise InvariantError(f"{action}: this cluster has no such instance")
        return self._instances[action.instance]

    def _in_hand(self, action: Dispatch | Reject) -> Flight:
        flight = self._flights.get(action.request_id)
        if flight is None or flight.work is not None:
            raise InvariantError(f"{action}: the policy does not have this request")
        return flight

    # What happens at the engines.

    def _deliver(
        self, now: float, flight: Flight, work: Work, instance: Instance, epoch: int, number: int
    ) -> None:
        if not instance.alive or instance.epoch != epoch:
            if flight.work is work and flight.instance is instance:
                self._lose(now, [flight])
            return
        self._progress_s = now
        instance.inbox.receive(number)
        if flight.work is work:  # else it was recalled on its way
            group, rank = instance.locate(flight.rank)
            group.engine.submit(work, rank, now)
            self._wake(now, group)

    def _polled(self, now: float, instance: Instance) -> None:
        if instance.works:
            self._tell(now, instance.snapshot(now))

    def _wake(self, now: float, group: Group) -> None:
        """Have the group start a pass when this instant is over, if it can."""
        engine = group.engine
        if group.starting or engine.busy or not engine.has_work or not group.instance.works:
            return
        if self.kernel.quiet():
            self._start_pass(now, group)
        else:
            group.starting = True
            self.kernel.at(now, START, self._start, group, group.generation)

    def _start(self, now: float, group: Group, generation: int) -> None:
        if group.generation != generation:
            return
        group.starting = False
        if not group.instance.hung:
            self._start_pass(now, group)

    def _start_pass(self, now: float, group: Group) -> None:
        duration_s = group.engine.start_pass(now)
        if duration_s is not None:
            group.started_s = now
            self.kernel.at(now + duration_s, PASS_END, self._pass_due, group, group.generation)

    def _pass_due(self, now: float, group: Group, generation: int) -> None:
        if group.generation != generation:
            return
        if group.instance.hung:
            group.overdue = True
        else:
            self._end_pass(now, group)

    def _end_pass(self, now: float, group: Group) -> None:
        passed = group.engine.end_pass(now)
        pool = group.instance.pool
        self._progress_s = now
        self.counters.add(passed, pool.token_cap)
        if self._keep_passes:
            self.passes.append(_record(group, passed, now))
        report = group.report(passed, now)
        self.kernel.at(
            now + self._network.report_latency_s,
            REPORT,
            self._pass_reported,
            passed.first_tokens,
            passed.finished,
            report,
            now,
        )
        self._wake(now, group)

    # What the policy is told.

    def _expect_arrival(self, now: float) -> None:
        item = next(self._arrivals, None)
        if item is None:
            return
        if item.arrival_s < now:
            raise ConfigError(
                f"item {len(self.outcomes)} arrives at {item.arrival_s!r} s, before the one ahead of it"
            )
        self.kernel.at(item.arrival_s, ARRIVAL, self._arrive, item)

    def _arrive(self, now: float, item: Item) -> None:
        self._progress_s = now
        request = Request(
            f"r{len(self.outcomes)}",
            now,
            item.prompt_tokens,
            self._slo,
            prefix=item.prefix,
            prefix_block_tokens=item.prefix_block_tokens,
        )
        outcome = Outcome(request.id, now, item.prompt_tokens, item.output_tokens, self._slo)
        self.outcomes.append(outcome)
        self._flights[request.id] = Flight(request, outcome)
        self._expect_arrival(now)
        self._driver.feed(Arrived(request), now)

    def _pass_reported(
        self,
        now: float,
        first_tokens: Sequence[Work],
        finished: Sequence[Work],
        report: PassEnded,
        ended_s: float,
    ) -> None:
        for work in first_tokens:
            self._first_token(now, work, ended_s)
        for work in finished:
            self._finished(now, work, ended_s)
        self._driver.feed(report, now)

    def _first_token(self, now: float, work: Work, ended_s: float) -> None:
        flight = self._flights.get(work.request.id)
        if flight is None or flight.work is not work:
            return  # recalled since
        flight.outcome.first_token_s = ended_s
        if work.finished:
            return  # its first token was its last: `Finished` says it all
        if self._spec.disaggregated:
            flight.outcome.lateness_s = work.lateness_s
            flight.work = flight.instance = None
        self._driver.feed(PrefillDone(work.request.id), now)

    def _finished(self, now: float, work: Work, ended_s: float) -> None:
        flight = self._flights.get(work.request.id)
        if flight is None or flight.work is not work:
            return
        outcome = flight.outcome
        outcome.finished_s = ended_s
        outcome.output_tokens = work.generated_tokens  # fewer than asked for when the rank's KV holds no more
        outcome.lateness_s = max(outcome.lateness_s, work.lateness_s)
        self._resolve(flight)
        self._driver.feed(Finished(work.request.id, outcome.output_tokens), now)

    def _tell(self, now: float, event: Event) -> None:
        self.kernel.at(now + self._network.report_latency_s, REPORT, self._told, event)

    def _told(self, now: float, event: Event) -> None:
        if isinstance(event, InstanceUp):
            self._instances[event.instance].told_epoch = event.epoch
        self._driver.feed(event, now)

    def _resolve(self, flight: Flight, rejected: str | None = None) -> None:
        flight.outcome.rejected = rejected
        _delay(flight.outcome, self._network.answer_latency_s)
        del self._flights[flight.request.id]
        self._on_resolved()
        if not self._flights and len(self.outcomes) == self._expected:
            self.kernel.stop()

    def _woken(self, now: float) -> None:
        """Give up when a policy goes on waking up, or polling the dead, and nothing can come of it."""
        if now > self._progress_s + PATIENCE_S and not self.kernel.pending(FAULT, ARRIVAL, PASS_END):
            self.kernel.stop()

    # Faults.

    def _known(self, fault: Fault) -> Fault:
        if fault.instance not in self._instances:
            raise unknown_name("instance", fault.instance, self._instances, where=f"fault {fault.kind}")
        return fault

    def _inject(self, now: float, fault: Fault) -> None:
        self._progress_s = now
        instance = self._instances[fault.instance]
        if fault.kind == "die":
            self._die(now, instance)
        elif fault.kind == "hang":
            instance.hung = instance.alive
        elif fault.kind == "slow":
            instance.slow_down(fault.factor)
        else:
            self._recover(now, instance)

    def _die(self, now: float, instance: Instance) -> None:
        if not instance.alive:
            return
        instance.die()
        there = [f for f in self._flights.values() if f.instance is instance]
        self._tell(now, InstanceDown(instance.name))
        self._lose(now, there)

    def _lose(self, now: float, flights: list[Flight]) -> None:
        """Report what was at, or on its way to, a dead instance."""
        for flight in flights:
            flight.instance = None
            self.kernel.at(now + self._network.report_latency_s, REPORT, self._failed, flight, flight.work)

    def _failed(self, now: float, flight: Flight, work: Work) -> None:
        if flight.work is not work or flight.request.id not in self._flights:
            return  # recalled since
        retry = not flight.prefilled
        flight.work = None
        if not retry:
            self._resolve(flight, rejected="instance-failed")
        self._driver.feed(Failed(flight.request.id, "instance-failed", retry), now)

    def _recover(self, now: float, instance: Instance) -> None:
        instance.slow_down(1.0)
        if not instance.alive:
            instance.restart()
            self._tell(now, instance.up())
        elif instance.hung:
            instance.hung = False
            for group in instance.groups:
                self._resume(now, group)
            self._tell(now, instance.snapshot(now))

    def _resume(self, now: float, group: Group) -> None:
        if group.overdue:
            group.overdue = False
            self._end_pass(now, group)
        else:
            self._wake(now, group)


def _delay(outcome: Outcome, latency_s: float) -> None:
    """Count the way from the engine to the client."""
    if outcome.first_token_s is not None:
        outcome.first_token_s += latency_s
        outcome.lateness_s += latency_s
    if outcome.finished_s is not None:
        outcome.finished_s += latency_s


def _record(group: Group, passed: PassOutcome, now: float) -> PassRecord:
    instance = group.instance
    return PassRecord(
        instance.name,
        str(instance.pool.role),
        group.first_rank,
        group.started_s,
        now,
        instance.pool.token_cap,
        passed.ran_tokens,
        passed.decodes,
    )
