"""Keeps the engines: adds, checks, drains and removes them, and tells the policy what becomes of them.

Whether an engine gets work is decided by `core/engine_health.py`, how much at once by
`core/concurrency_limit.py`. This file feeds both with health checks and with what becomes of requests, and
carries out what they decide. Everything the policy hears about instances comes from here: `InstanceUp`,
`InstanceDraining`, `InstanceDown`, `ConcurrencyLimited`, and the reports of passes, which the engine
publishes (`events.py`) or which are estimated (`inference.py`).

Rule 1. An ejected engine gets nothing new (`InstanceDraining`); what streams from it goes on.
Rule 2. When it is down, every request there without a first byte goes elsewhere.
Rule 3. Adding and removing go on when whoever asked for it is gone, and leave nothing half done.
"""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from headway.core.engine_health import HealthChange, OutcomeRate
from headway.core.errors import ConfigError, InvariantError, unknown_name
from headway.core.events import (
    ConcurrencyLimited,
    Event,
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    PassEnded,
    PassStarted,
    PrefillDone,
    Role,
    Snapshot,
)
from headway.front.addresses import Addresses
from headway.front.config import FrontConfig, InstanceSpec
from headway.front.driver import CallAt
from headway.front.events import Listener
from headway.front.inference import Inference
from headway.front.model_catalog import MOST_MODELS, REFRESH_S, ModelCatalog, base_names, same_models
from headway.front.pacing import Pacer
from headway.front.probe import EngineProbe
from headway.front.transport import ExhaustedError, Transport
from headway.front.worker import State, Worker

__all__ = ["Workers"]

log = logging.getLogger("headway.gateway")

_T = TypeVar("_T")

#: An engine that publishes events is given this long to introduce itself.
HELLO_S = 0.5
#: An ejected engine is looked at again this soon.
RECHECK_S = 0.2
#: Checks of all engines together: with more engines each is checked less often.
CHECKS_PER_S = 200.0
#: Checks that may begin in a second, and at once after a rest: those of engines that come all together wait.
STARTS_PER_S, STARTS_AT_ONCE = 400.0, 64
#: So many engines are added or removed before other work has its turn.
BEGIN_AT_ONCE = 16
#: How often a drained worker is looked at to see whether its last request is over.
DRAIN_LOOK_S = 0.05

#: Contradictions between an engine's metrics and its configured ranks that are logged, each once.
MOST_DOUBTS = 16
#: Engines that are asked for their models at the same time, after a client named an unknown one.
ASKED_AT_ONCE = 64


class Workers:
    """The engines by name. `feed` hands an event to the policy. `on_removed` hears the name of each that is
    removed.
    """

    def __init__(
        self,
        config: FrontConfig,
        transport: Transport,
        feed: Callable[[Event], Any],
        *,
        clock: Callable[[], float],
        call_at: CallAt,
        engine_headers: dict[str, str] | None = None,
        fence: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self.config = config
        self._feed = feed
        self._clock = clock
        self._call_at = call_at
        asked_with = engine_headers or {}
        self._probe = EngineProbe(transport, config.health, lambda: {**asked_with, **fence()})
        self._workers: dict[str, Worker] = {}
        self._addresses = Addresses()
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._kicks: dict[str, asyncio.Event] = {}
        self._errands: set[asyncio.Task[Any]] = set()
        self._reconciling = asyncio.Lock()
        self._pacer = Pacer(STARTS_PER_S, STARTS_AT_ONCE, clock)
        self._waiting: set[asyncio.Future[None]] = set()
        self._missing_since_s: dict[Role, float] = dict.fromkeys(self._roles(), clock())
        self._model_missing_since_s: dict[tuple[Role, str], float | None] = {}  # kept until an engine changes
        self._takers: dict[Role, set[Worker]] = {role: set() for role in Role}
        self.on_removed: Callable[[str], None] = lambda name: None
        self.catalog = ModelCatalog(config.server, self._workers.values, self._ask_for_models, clock=clock)

    def __iter__(self) -> Iterator[Worker]:
        return iter(list(self._workers.values()))

    def get(self, name: str) -> Worker | None:
        """Return a worker; None when there is none of that name (any more)."""
        return self._workers.get(name)

    def named(self, name: str) -> Worker:
        """Return a worker. Raises ConfigError when there is none of that name."""
        if name not in self._workers:
            raise unknown_name("worker", name, self._workers)
        return self._workers[name]

    def ready(self) -> bool:
        """Whether every role has an engine that takes work."""
        return not self._missing_since_s

    def _roles(self) -> set[Role]:
        return {Role.PREFILL, Role.DECODE} if self.config.disaggregated else {Role.AGGREGATED}

    def missing_since_s(self, roles: Iterable[Role], model: str | None = None) -> float | None:
        """Return since when one of these roles has no engine that takes work and serves the model.

        None if each role has one. -infinity if no engine of the role ever served the model.
        """
        times = [self._role_missing_since_s(role, model) for role in roles]
        return min([since_s for since_s in times if since_s is not None], default=None)

    def _role_missing_since_s(self, role: Role, model: str | None) -> float | None:
        if role in self._missing_since_s or model is None:
            return self._missing_since_s.get(role)
        known = self._model_missing_since_s
        if (role, model) not in known:
            if len(known) >= MOST_MODELS:
                known.clear()
            able = [worker for worker in self if worker.spec.role is role and worker.serves(model)]
            gone_s = max([worker.health.since_s for worker in able], default=-math.inf)
            known[role, model] = None if any(worker.takes_work() for worker in able) else gone_s
        return known[role, model]

    async def until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until a condition on the engines holds, and return whether it does in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiting.add(changed)
                    try:
                        await changed
                    finally:
                        self._waiting.discard(changed)
        return condition()

    def _changed(self, worker: Worker) -> None:
        """Follow a change of whether an engine takes work."""
        self._model_missing_since_s.clear()
        if worker.takes_work() and self._is_here(worker):
            self._takers[worker.spec.role].add(worker)
        else:
            self._takers[worker.spec.role].discard(worker)
        for role in self._roles():
            if self._takers[role]:
                self._missing_since_s.pop(role, None)
            else:
                self._missing_since_s.setdefault(role, self._clock())
        for changed in self._waiting:
            if not changed.done():
                changed.set_result(None)

    def models(self) -> dict[str, int | None]:
        """Return the models served with their longest context, where told."""
        return self.catalog.lengths()

    # Adding and removing

    async def start(self) -> None:
        """Add the configured engines and check each once."""
        await _all(self.add(spec) for spec in self.config.instances)

    async def stop(self) -> None:
        """Stop watching."""
        for errand in list(self._errands):
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        for name in list(self._workers):
            await self._forget(name)

    async def add(self, spec: InstanceSpec) -> Worker:
        """Add an engine; it gets work when its first check passes. Raises ConfigError when it cannot be."""
        return await asyncio.shield(self._run(self._add(spec)))

    async def _add(self, spec: InstanceSpec) -> Worker:
        worker = self._create(spec)
        try:
            await self._listen(worker)
            await self._pace()
            await self._check(worker)
        except BaseException:
            await self._discard(worker, "it could not be added")
            raise
        if self._is_here(worker):
            self._watches[spec.name] = asyncio.create_task(self._watch(worker))
        return worker

    def _create(self, spec: InstanceSpec) -> Worker:
        if spec.name in self._workers:
            raise ConfigError(f"there is a worker {spec.name!r} already")
        self.config.check_instance(spec)
        self._addresses.claim(spec)
        worker = Worker(spec, self.config.health.rules(), self._clock())
        self._workers[spec.name] = worker
        self.catalog.changed()
        worker.inference = Inference(
            worker,
            lambda event: self._inferred(worker, event),
            lambda request_id: self._tell(PrefillDone(request_id)),
            clock=self._clock,
            call_at=self._call_at,
            gather_s=self.config.inference.gather_s,
        )
        self._kicks[spec.name] = asyncio.Event()
        return worker

    async def _listen(self, worker: Worker) -> None:
        spec = worker.spec
        if spec.events is None:
            return
        listener = Listener(_Reporter(self, worker), spec.events, spec.snapshots, self._is_other(spec.name))
        await listener.start()
        worker.listener = listener
        if spec.snapshots is not None:
            with suppress(TimeoutError):  # else it would come up twice: as configured, and as it says it is
                async with asyncio.timeout(HELLO_S):
                    await worker.said_hello.wait()

    def drain(self, name: str) -> Worker:
        """Give an engine nothing new; it finishes what it has. Raises ConfigError for an unknown name."""
        worker = self.named(name)
        if not worker.draining:
            worker.draining = True
            if worker.told is not None:
                self._tell(InstanceDraining(name))
            self._changed(worker)
        return worker

    def undrain(self, name: str) -> Worker:
        """Take an engine back. Raises ConfigError for an unknown name."""
        worker = self.named(name)
        worker.draining = False
        if worker.state is State.UP:
            self._introduce(worker)
        self._changed(worker)
        return worker

    async def remove(self, name: str, *, timeout_s: float = 0.0) -> None:
        """Drain an engine for at most `timeout_s`, then remove it. Raises ConfigError for an unknown name."""
        worker = self.drain(name)
        await asyncio.shield(self._run(self._remove(worker, timeout_s)))

    async def _remove(self, worker: Worker, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while worker.legs:
                    await asyncio.sleep(DRAIN_LOOK_S)
        await self._discard(worker, "removed")

    async def _discard(self, worker: Worker, why: str) -> None:
        if self._is_here(worker):
            await self._forget(worker.name)
            self._carry_out(worker, worker.health.removed(self._clock(), why))
            self.on_removed(worker.name)

    async def reconcile(self, instances: tuple[InstanceSpec, ...], *, timeout_s: float = 0.0) -> None:
        """Make the workers those of a new configuration: what changed is removed and added anew.

        New ones are added before the old ones are drained. Raises ConfigError, before anything changes,
        when an instance does not belong into this cluster; also for one that then cannot be added.
        """
        for spec in instances:
            self.config.check_instance(spec)
        async with self._reconciling:  # another may still drain
            wanted = {spec.name: spec for spec in instances}
            known = {worker.name: worker.spec for worker in self}
            old = [name for name, spec in known.items() if wanted.get(name) != spec]
            new = {name: spec for name, spec in wanted.items() if known.get(name) != spec}
            # An address that goes from one name to another: the one that had it has to be gone first.
            last = [spec for name, spec in new.items() if self._addresses.owners(spec) - {name}]
            for spec in last:
                del new[spec.name]
            await _all(self.add(spec) for name, spec in new.items() if name not in known)
            await _all(self._replace(name, new.get(name), timeout_s) for name in old)
            await _all(self.add(spec) for spec in last)

    async def _replace(self, name: str, spec: InstanceSpec | None, timeout_s: float) -> None:
        if name in self._workers:
            await self.remove(name, timeout_s=timeout_s)
        if spec is not None:
            await self.add(spec)

    def _is_here(self, worker: Worker) -> bool:
        """Whether it is a worker still, and not another of its name."""
        return self._workers.get(worker.name) is worker

    async def _forget(self, name: str) -> None:
        worker = self._workers.pop(name)
        self._addresses.release(worker.spec)
        self.catalog.changed()
        self._kicks.pop(name, None)
        watch = self._watches.pop(name, None)
        if watch is not None and watch is not asyncio.current_task():
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        if worker.listener is not None:
            await worker.listener.stop()

    def _is_other(self, own: str) -> Callable[[str], bool]:
        return lambda name: name != own and name in self._workers

    def lead(self) -> None:
        """Begin a term: count dispatches anew, and look at every engine at once, which shows it the token."""
        for worker in self:
            worker.count_anew()
            if worker.name in self._kicks:
                self._kicks[worker.name].set()

    # What becomes of requests

    def worked(self, worker: Worker) -> None:
        """Note that an engine served a request, which is still among its legs."""
        now = self._clock()
        worker.health.served(now)
        if worker.limit.limit is not None:
            worker.limit.answered(now, worker.in_flight)
            self._limit(worker)

    def unreachable(self, worker: Worker, why: str) -> None:
        """Note that an engine refused a connection."""
        self._carry_out(worker, worker.health.unreachable(self._clock(), why))

    def at_fault(self, worker: Worker, why: str) -> None:
        """Note that an engine failed a request that another engine served."""
        self._carry_out(worker, worker.health.failed(self._clock(), why, last=not self._others(worker)))

    def failed(self, worker: Worker, why: str, *, refused: bool) -> None:
        """Note that an engine failed a request that no other engine tried. `refused`: no connection."""
        if refused:
            self.unreachable(worker, why)
            return
        others = self._others(worker)
        rate = sum((other.health.outcomes for other in others), OutcomeRate())
        change = worker.health.failed_alone(self._clock(), why, others=rate, last=not others)
        self._carry_out(worker, change)

    def exonerated(self, worker: Worker) -> None:
        """Note that an engine failed a request that other engines failed as well."""
        worker.health.exonerated()

    def silent(self, worker: Worker, why: str) -> None:
        """Note that an engine answered no request at all for as long as a request waits for its answer."""
        self._carry_out(worker, worker.health.silent(self._clock(), why))

    def pushed_back(self, worker: Worker, retry_after_s: float | None) -> None:
        """Note that an engine refused a request, no longer among its legs, because it has enough to do."""
        now = self._clock()
        worker.health.answered_s = now
        worker.limit.refused(now, worker.in_flight, retry_after_s)
        self._limit(worker)

    def check_soon(self, worker: Worker) -> None:
        """Check an engine's health now: something broke there."""
        if worker.name in self._kicks:
            self._kicks[worker.name].set()

    def has_other(self, worker: Worker, tried: frozenset[str]) -> bool:
        """Whether another engine of its role, not among those tried, takes work and has room for it."""
        now = self._clock()
        others = (other for other in self._others(worker) if other.name not in tried)
        return any((most := other.limit.allowed(now)) is None or other.in_flight < most for other in others)

    def _others(self, worker: Worker) -> list[Worker]:
        """Return the other engines of its role that take work and share a model with it."""
        role = worker.spec.role
        return [
            other
            for other in self
            if other is not worker
            and other.spec.role is role
            and other.takes_work()
            and other.shares_model(worker)
        ]

    def _limit(self, worker: Worker) -> None:
        """Tell the policy how many requests an engine takes at once, if that changed."""
        if worker.told is None:
            return
        now = self._clock()
        resumes_s = worker.limit.resumes_s(now)
        if resumes_s is not None:
            self._call_at(resumes_s, self._limit, worker)
        allowed = worker.limit.allowed(now)
        if allowed != worker.limit_told:
            worker.limit_told = allowed
            self._tell(ConcurrencyLimited(worker.name, allowed))

    def send_elsewhere(self, avoid: Iterable[Worker], failed: Event) -> None:
        """Hand in the failure of a request while the engines to avoid take nothing new.

        An engine is avoided only where another one of its role takes work.
        """
        avoided = [worker for worker in avoid if worker.takes_work()]
        avoided = [w for w in avoided if any(other not in avoided for other in self._others(w))]
        for worker in avoided:
            self._tell(InstanceDraining(worker.name))
        self._tell(failed)
        for worker in avoided:
            if worker.takes_work():
                self._introduce(worker)

    def poll(self, name: str) -> None:
        """Get a snapshot of an engine for the policy, in the background."""
        worker = self._workers.get(name)
        if worker is None:
            return
        if worker.listener is not None:
            worker.listener.poll()
        if not worker.reports(self._clock()):
            self._run(self._guarded(worker, self._scrape(worker)))

    # Health

    async def _watch(self, worker: Worker) -> None:
        kick = self._kicks[worker.name]
        share = random.random()  # of the first interval: engines that came together are not checked together
        scrape_s = self.config.inference.scrape_interval_s
        scraped_s = self._clock()
        while True:
            soon = worker.state is State.EJECTED and not worker.health.leaving
            with suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_S if soon else self._interval_s() * share):
                    await kick.wait()
            share = 1.0
            if not kick.is_set():
                await self._pace()
            kick.clear()
            await self._guarded(worker, self._check(worker))
            if scrape_s and worker.spec.role is not Role.PREFILL and self._clock() - scraped_s >= scrape_s:
                scraped_s = self._clock()
                if worker.takes_work() and not worker.reports(scraped_s):
                    await self._guarded(worker, self._scrape(worker))

    def _interval_s(self) -> float:
        """Return the time between checks of one engine: longer where there are thousands.

        That an engine fails is learned from its requests at once; checks are for those without any.
        """
        return max(self.config.health.interval_s, len(self._workers) / CHECKS_PER_S)

    async def _pace(self) -> None:
        """Wait for this check's turn."""
        if (delay_s := self._pacer.delay_s()) > 0.0:
            await asyncio.sleep(delay_s)

    async def _guarded(self, worker: Worker, look: Awaitable[None]) -> None:
        """Look at an engine. What goes wrong in a way nobody thought of must not end the watch over it."""
        try:
            await look
        except Exception as error:
            if type(error) not in worker.puzzles:  # it would say so with every look
                worker.puzzles.add(type(error))
                log.exception("a look at an engine failed", extra={"instance": worker.name})

    async def _check(self, worker: Worker) -> None:
        try:
            problem, refused = await self._probe.check(worker.spec)
        except ExhaustedError as error:
            log.error("no health check", extra={"instance": worker.name, "reason": str(error)})
            return
        if not self._is_here(worker):
            return
        now = self._clock()
        if problem is not None:
            self._carry_out(worker, worker.health.check_failed(now, problem, unreachable=refused))
            self._report(worker, now)
        elif worker.health.check_passed(now):
            await self._learn_models(worker)
            if self._is_here(worker) and not worker.health.leaving:
                self._carry_out(worker, worker.health.admit(self._clock()))
        elif worker.state is State.UP and now - worker.models_asked_s >= REFRESH_S:
            self._run(self._guarded(worker, self._refresh_models(worker)))

    def _report(self, worker: Worker, now: float) -> None:
        """Log why an engine is not up: at its first failed check, at each change, and every minute."""
        if worker.health.report_due(now):
            since_s = round(now - worker.health.since_s, 1)
            extra = {"instance": worker.name, "reason": worker.health.reason, "for_s": since_s}
            log.warning("engine not up", extra=extra | {"state": worker.state.value})

    def _carry_out(self, worker: Worker, change: HealthChange | None) -> None:
        """Follow a change of an engine's health."""
        if change is None:
            return
        if change.new is State.UP:
            self._came_up(worker, change)
        elif change.new is State.EJECTED:
            log.warning("worker ejected", extra={"instance": worker.name, "reason": change.reason})
            self._tell(InstanceDraining(worker.name))
            self.check_soon(worker)
        else:
            self._went_down(worker, change)
        worker.health.report_due(self._clock())  # this line said why
        self._changed(worker)

    def _came_up(self, worker: Worker, change: HealthChange) -> None:
        if change.old is State.DOWN:
            worker.begin_anew()
        log.info("worker up", extra={"instance": worker.name})
        if not worker.draining:
            self._introduce(worker)

    def _went_down(self, worker: Worker, change: HealthChange) -> None:
        log.warning("worker down", extra={"instance": worker.name, "reason": change.reason})
        self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        """Take an engine from the policy, and end the requests there that have no byte yet."""
        if worker.told is not None:
            worker.told = None
            self._tell(InstanceDown(worker.name))
        worker.limit.forget()
        worker.limit_told = None
        worker.rebase()
        worker.inference.clear()
        for leg in list(worker.legs):
            leg.abandon(worker)

    # Models

    async def _learn_models(self, worker: Worker) -> None:
        """Ask an engine for its models; without an answer it keeps those it listed before."""
        worker.models_asked_s = self._clock()
        models = await self._probe.models(worker.spec)
        if models is not None and not same_models(models, worker.models):
            worker.models = models
            self.catalog.changed()
            self._changed(worker)
        if not worker.asked_for_models:
            worker.asked_for_models = True
            self.catalog.changed()

    async def _refresh_models(self, worker: Worker) -> None:
        """Ask an engine that is up for its models, and tell the policy what changed."""
        before = worker.models
        await self._learn_models(worker)
        if worker.models.keys() == before.keys() or worker.told is None or not worker.takes_work():
            return  # unchanged, or it will be introduced with them
        if not self._is_here(worker):
            return
        change = _change(before, worker.models)
        log.info("models changed", extra={"instance": worker.name, "reason": change})
        if before and base_names(worker.models.values()).isdisjoint(base_names(before.values())):
            self._leave(worker)  # it is another engine now
        self._introduce(worker)

    async def _ask_for_models(self) -> None:
        """Ask every engine that takes work for its models."""
        at_once = asyncio.Semaphore(ASKED_AT_ONCE)

        async def ask(worker: Worker) -> None:
            async with at_once:
                await self._guarded(worker, self._refresh_models(worker))

        await asyncio.gather(*(ask(worker) for worker in self if worker.takes_work()))

    # What the policy is told

    def _introduce(self, worker: Worker) -> None:
        worker.told = worker.up_event()
        self._tell(worker.told)

    def _tell(self, event: Event) -> None:
        """Hand an event in. A bug in a policy must not end the watch over the engines."""
        try:
            self._feed(event)
        except InvariantError:
            log.exception("the policy contradicts itself")

    def _inferred(self, worker: Worker, event: PassEnded) -> None:
        if worker.told is not None and not worker.reports(self._clock()):
            self._tell(event)

    def reported(self, worker: Worker, event: PassStarted | PassEnded | Snapshot) -> None:
        """Hand on what the engine reports, in the epoch it is in."""
        worker.heard_s = self._clock()
        worker.sequence = max(worker.sequence, event.sequence)
        if worker.reached(event.epoch) and worker.told is not None and worker.takes_work():
            self._introduce(worker)
        if worker.told is not None:
            self._tell(event)

    def introduced(self, worker: Worker, event: InstanceUp) -> None:
        """Take in what the engine says it is."""
        worker.heard_s = self._clock()
        worker.said_hello.set()
        if worker.hello(event) and worker.takes_work():
            self._introduce(worker)

    def said_goodbye(self, worker: Worker, *, draining: bool) -> None:
        """Take in that an engine announces its end, though it may pass checks for a while."""
        now = self._clock()
        if draining:
            self._carry_out(worker, worker.health.drains(now, "it drains"))
        else:
            self._carry_out(worker, worker.health.left(now, "it said goodbye"))

    # The last resort

    async def _scrape(self, worker: Worker) -> None:
        """Tell the policy what the engine's public pages say; at least that it lives."""
        began_s = self._clock()
        load = await self._probe.load(worker.spec)
        try:
            problem, _ = await self._probe.check(worker.spec)
        except ExhaustedError:
            return
        if problem is not None or worker.told is None:
            return
        if load.doubt and load.doubt not in worker.load_doubts and len(worker.load_doubts) < MOST_DOUBTS:
            worker.load_doubts.add(load.doubt)
            log.warning("engine's ranks", extra={"instance": worker.name, "reason": load.doubt})
        blocks = worker.up_event().kv_blocks
        usage = load.kv_usage
        self._tell(
            worker.inference.snapshot(
                began_s,
                kv_blocks=tuple(round(u * blocks) for u in usage) if usage and blocks else None,
                running=load.running,
                waiting=load.waiting,
            )
        )

    def _run(self, errand: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        task = asyncio.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        return task


def _change(before: Iterable[str], after: Iterable[str]) -> str:
    """Say in few words which names came and went."""
    came, went = sorted(set(after) - set(before)), sorted(set(before) - set(after))
    return ", ".join([*(f"+{name}" for name in came), *(f"-{name}" for name in went)][:20])


async def _all(errands: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Bring all to their end, then raise the first error there was. They begin a few at a time."""
    tasks: list[asyncio.Future[object]] = []
    for number, errand in enumerate(errands, 1):
        tasks.append(asyncio.ensure_future(errand))
        if number % BEGIN_AT_ONCE == 0:
            await asyncio.sleep(0)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


class _Reporter:
    """What a worker's listener calls."""

    def __init__(self, workers: Workers, worker: Worker) -> None:
        self.name = worker.name
        self.acknowledged = worker.acknowledged
        self._workers = workers
        self._worker = worker

    def introduced(self, event: InstanceUp) -> None:
        self._workers.introduced(self._worker, event)

    def reported(self, event: PassStarted | PassEnded | Snapshot) -> None:
        self._workers.reported(self._worker, event)

    def said_goodbye(self, *, draining: bool) -> None:
        self._workers.said_goodbye(self._worker, draining=draining)
