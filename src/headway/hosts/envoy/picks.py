"""Takes requests in, holds them until the policy dispatches, and keeps account of them until they are over.

Rule 1. Load is reserved when the policy decides. Every request that arrived ends in exactly one of
        `Finished`, `Failed(retry=False)` and `Cancelled`, unless the policy refused it.
Rule 2. What Envoy was told cannot be taken back: from then on a recalled request, and one whose engine is
        gone, is off the policy's books. Envoy may try its fallbacks; nobody here decides on that.
Rule 3. That a request is over is told from outside (`accounting.py`, `stream.py`), by its key. What a broken
        connection of Envoy's carried is given up after `reconnect_s` (`carriers.py`), and a key nobody tells
        of after `forget_after_s`: a counter that leaks would starve an engine of work.
Rule 4. In phases, a request is joined by its `x-request-id`: its decode is placed when its prefill is over,
        and when nobody comes for it within the time its KV is kept, it is over.
"""

import asyncio
import logging
import secrets
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from headway.core.actions import Action, Dispatch
from headway.core.events import (
    Cancelled,
    Event,
    Failed,
    Finished,
    PassEnded,
    PrefillDone,
    Role,
    Snapshot,
)
from headway.core.request import Request
from headway.front.buffer import Buffer
from headway.front.driver import CallAt, Driver
from headway.front.errors import Refusal, bad_request, not_leader, overloaded, unavailable
from headway.front.lease import Elector
from headway.front.models import schedulable_length
from headway.front.over import Over
from headway.front.place_wait import PlaceWait
from headway.front.requests import Call
from headway.front.worker import Worker
from headway.front.workers import Workers
from headway.hosts.envoy.carriers import Carriers
from headway.hosts.envoy.config import EppConfig
from headway.hosts.envoy.desk import Answer, Asked, Served
from headway.hosts.envoy.endpoints import Endpoints
from headway.hosts.envoy.pick import Pick

__all__ = ["Picks"]

log = logging.getLogger("headway.picker")

#: How often it is looked for requests of which nothing was heard.
SWEEP_S = 5.0


@dataclass(slots=True)
class _UnderWay:
    """A request in Envoy's hands; `pick` None: one the policy had no say in."""

    pick: Pick | None
    leg: "Pick | _Aside"
    role: Role
    worker: Worker
    endpoint: str
    since_s: float
    envoy_id: str = ""


class _Aside:
    """A request beside the policy, as a worker's leg."""

    scheduled = False

    def abandon(self, worker: Worker) -> None:
        """Envoy will find out."""


class Picks:
    """All requests of the picker: a `Desk`. `on_done` hears of each that is over, with its answer's status.

    `count_as(what)` counts what does not go as it should, by a word.
    """

    def __init__(
        self,
        config: EppConfig,
        driver: Driver,
        workers: Workers,
        *,
        elector: Elector,
        clock: Callable[[], float],
        call_at: CallAt,
        on_done: Callable[[Over, int], None],
        count_as: Callable[[str], None],
    ) -> None:
        self.buffer = Buffer(config.limits, clock)
        self.endpoints = Endpoints(workers)
        self._config = config
        self._driver = driver
        self._workers = workers
        self._elector = elector
        self._clock = clock
        self._call_at = call_at
        self._on_done = on_done
        self._count_as = count_as
        self._wait_bounds = PlaceWait(workers, config.limits, _loop_time)
        self._numbers = count(1)
        self._carriers = Carriers(config.accounting.reconnect_s)
        self._under_way: dict[str, _UnderWay] = {}
        self._keys: dict[str, str] = {}  # by Envoy's id of a request
        self._in_phases: dict[str, Pick] = {}  # whose decode is to come, by the id that joins them
        self._flows: Counter[str] = Counter()
        self._dispatched: defaultdict[str, deque[tuple[int, str]]] = defaultdict(deque)  # (number, key)
        self._sweeper = call_at(clock() + SWEEP_S, self._sweep)

    @property
    def under_way(self) -> int:
        """How many requests Envoy has."""
        return len(self._under_way)

    def stop(self) -> None:
        """Look for lost requests no more."""
        self._sweeper.cancel()

    # Where to

    async def place(self, asked: Asked) -> Answer:
        """Hold a generation until it has its place; within a hint the policy could not keep to, at once.

        Raises Refusal: 429 when there is no room or it is shed, 4xx for what no engine could serve, 503
        when no engine comes up in time and where another replica may place. Cancelled, withdraws it.
        """
        roles = self._roles(asked.phase)
        if asked.subset is not None and not all(self.endpoints.able(role) for role in roles):
            raise unavailable("no_engine", "No engine is up that could take the request.")
        model = await self._workers.catalog.resolve(asked.model)
        if self.endpoints.leaves_out(asked.subset, roles, model):
            return self._within(asked.subset, roles, model)
        pick = self._take_in(asked, model)
        try:
            self._driver.arrive(pick.request, pick)
            answer = self._answer(pick, await self._place(pick, roles), asked.subset)
        except BaseException as error:
            self._end(pick, error.status if isinstance(error, Refusal) else 499, error)
            raise
        if asked.phase is Role.PREFILL:
            self._begin_phases(pick)
        return answer

    def _within(self, subset: frozenset[str] | None, roles: tuple[Role, ...], model: str | None) -> Answer:
        """Pick within a hint that leaves out engines: a policy knows no subsets."""
        if not self._elector.leads():
            raise not_leader()
        self._count_as("subset")
        answer = self._beside(roles[-1], subset, model)
        if len(roles) > 1:
            worker, rank = self.endpoints.least_busy(roles[0], subset, model)
            answer.headers["x-prefiller-host-port"] = self.endpoints.of(worker)[rank]
        return answer

    def _take_in(self, asked: Asked, model: str | None) -> Pick:
        """Make room for a request. `model`: what the policy places it by."""
        tokens = schedulable_length(
            model or asked.model,
            asked.tokens,
            self._workers.models(),
            self._config.server.max_prompt_tokens,
            (each.told or each.up_event() for each in self._workers if each.serves(model)),
            exact=asked.exact,
        )
        request = Request(
            f"{asked.request_id}-{next(self._numbers)}",
            asked.arrived_s,
            tokens,
            asked.slo,
            asked.priority,
            asked.max_tokens,
            asked.prefix,
            asked.block_tokens,
            model,
        )
        self._check_flow(asked.flow)
        self.buffer.admit(tokens, asked.size)
        self._flows[asked.flow] += 1
        pick = Pick(
            request,
            Call(path=asked.path, model=asked.model, stream=asked.stream, max_tokens=asked.max_tokens),
            size=asked.size,
            flow=asked.flow,
            role_of=self._role_of,
            taken_back=self._taken_back,
            abandoned=self._abandoned,
        )
        pick.waits = True
        return pick

    async def second(self, request_id: str, subset: frozenset[str] | None) -> Answer:
        """Place the decode of a request whose prefill was placed here. Raises Refusal as `place`."""
        pick = self._in_phases.pop(request_id, None)
        if pick is None or pick.over:
            # Its prefill was another picker's, or too long ago. Its body says where its KV is: it can go on.
            self._count_as("unknown_phase")
            return self._beside(Role.DECODE, subset)
        pick.waits, pick.answered = True, False
        self._flows[pick.flow] += 1
        self.buffer.enter(pick.request.prompt_tokens, pick.size)
        try:
            self._prefill_done(pick)
            return self._answer(pick, await self._place(pick, (Role.DECODE,)), subset)
        except BaseException as error:
            self._end(pick, error.status if isinstance(error, Refusal) else 499, error)
            raise

    async def aside(self, role: Role | None, subset: frozenset[str] | None) -> Answer:
        """Pick for what the policy has no say in. Raises Refusal (503) without an endpoint."""
        if subset is None:  # within a subset no other engine would do
            timeout_s = self._config.limits.no_engine_timeout_s
            await self._workers.until(lambda: bool(self.endpoints.able(role)), timeout_s)
        return self._beside(role, subset)

    def _beside(self, role: Role | None, subset: frozenset[str] | None, model: str | None = None) -> Answer:
        worker, rank = self.endpoints.least_busy(role, subset, model)
        endpoint = self.endpoints.of(worker)[rank]
        leg = _Aside()
        key = self._remember(_UnderWay(None, leg, worker.spec.role, worker, endpoint, self._clock()))
        return Answer(self._with_fallbacks(endpoint, worker, subset, model), key)

    def _roles(self, phase: Role | None) -> tuple[Role, ...]:
        if not self._config.disaggregated:
            return (Role.AGGREGATED,)
        if self._config.picker.handover == "sidecar":
            return (Role.PREFILL, Role.DECODE)
        if phase is not Role.PREFILL:
            raise bad_request("The header EPP-Profile must be prefill or decode.", param="epp-profile")
        return (Role.PREFILL,)

    def _check_flow(self, flow: str) -> None:
        """Keep one flow from taking the whole buffer."""
        share = self._config.picker.flow_share
        most = max(1, int(share * self._config.limits.buffer_requests))
        if share < 1.0 and self._flows[flow] >= most:
            raise overloaded("flow_full", f"{most} requests of this flow wait already.")

    async def _place(self, pick: Pick, roles: tuple[Role, ...]) -> list[tuple[Worker, Dispatch]]:
        while True:
            dispatches = await self._wait(pick, roles)
            places = [(self._workers.get(each.instance), each) for each in dispatches]
            found = [(worker, dispatch) for worker, dispatch in places if worker is not None]
            leads = self._elector.leads()
            if leads and len(found) == len(places):
                return found
            pick.attempts += 1  # in this very moment
            why = "its engine was removed" if leads else "this replica leads no more"
            self._driver.feed(Failed(pick.request.id, why, retry=True))

    async def _wait(self, pick: Pick, roles: tuple[Role, ...]) -> list[Dispatch]:
        began_s = _loop_time()
        while (
            places := await pick.place(roles, self._wait_bounds.left_s(began_s, roles, pick.request.model))
        ) is None:
            self._wait_bounds.check(began_s, roles, pick.request.model)
        return places

    def _answer(
        self, pick: Pick, places: list[tuple[Worker, Dispatch]], subset: frozenset[str] | None
    ) -> Answer:
        """Note where a request goes, and say so."""
        now = self._clock()
        self._leave_buffer(pick)
        pick.answered = True
        if pick.dispatched_s is None:
            pick.dispatched_s = now
        worker, dispatch = places[-1]
        endpoint = self.endpoints.at(worker, dispatch.rank)
        headers = self._elector.headers()
        if len(places) > 1:
            prefill, first = places[0]
            headers["x-prefiller-host-port"] = self.endpoints.at(prefill, first.rank)
        else:  # behind a sidecar both engines would see one number
            headers["x-headway-dispatch"] = str(worker.wire_number(dispatch.number))
        if worker.ranks > 1 and worker.spec.rank_by == "header":
            headers["x-data-parallel-rank"] = str(dispatch.rank)
        for each, placed in places:
            pick.instances.append(each.name)
            pick.workers.append(each)
            each.legs.add(pick)
            self._expect(pick, each, placed, alone=len(places) == 1)
        key = self._remember(_UnderWay(pick, pick, worker.spec.role, worker, endpoint, now))
        if self._config.accounting.by == "events":
            self._dispatched[worker.name].append((dispatch.number, key))
        return Answer(self._with_fallbacks(endpoint, worker, subset, pick.request.model), key, headers)

    def _expect(self, pick: Pick, worker: Worker, dispatch: Dispatch, *, alone: bool) -> None:
        """Have the pass worked out that computes the prompt, where no engine tells of it."""
        if worker.spec.role is Role.DECODE and alone:
            return
        streams = self._config.accounting.by == "response" and pick.call.stream and alone
        request = pick.request
        worker.inference.sent(
            request.id, dispatch.rank, dispatch.number, request.prompt_tokens, streams=streams
        )

    def _with_fallbacks(
        self, endpoint: str, worker: Worker, subset: frozenset[str] | None, model: str | None
    ) -> str:
        most = self._config.picker.fallbacks
        return ",".join([endpoint, *self.endpoints.fallbacks(worker, most, subset, model)])

    def _remember(self, under_way: _UnderWay) -> str:
        key = secrets.token_urlsafe(16)  # who knows it may end the request
        self._under_way[key] = under_way
        under_way.worker.legs.add(under_way.leg)
        return key

    # Phases

    def _prefill_done(self, pick: Pick) -> None:
        if not pick.prefilled:
            pick.prefilled = True
            self._feed(PrefillDone(pick.request.id))
            for worker in pick.workers:
                worker.inference.prefilled(pick.request.id)

    def _begin_phases(self, pick: Pick) -> None:
        """Remember a request whose decode is to come."""
        request_id = _joined_by(pick)
        before = self._in_phases.get(request_id)
        if before is not None:
            self._end(before, 499)
        self._in_phases[request_id] = pick

    def _first_is_over(self, pick: Pick, *, well: bool) -> None:
        """Note that a prefill is over; its decode may be on its way already."""
        request_id = _joined_by(pick)
        if self._in_phases.get(request_id) is not pick:
            return
        if not well:
            del self._in_phases[request_id]
            return
        pick.answered = False  # a place for its decode is not Envoy's yet
        self._prefill_done(pick)
        self._call_at(self._clock() + self._config.limits.kv_lease_s, self._no_second, request_id, pick)

    def _no_second(self, request_id: str, pick: Pick) -> None:
        if self._in_phases.get(request_id) is pick:
            del self._in_phases[request_id]
            self._count_as("no_decode")
            self._end(pick, 499)

    # What becomes of it

    def first_byte(self, key: str) -> None:
        """Note that the first piece of the answer passed by."""
        under_way = self._under_way.get(key)
        if under_way is None or under_way.pick is None or under_way.pick.first_byte_s is not None:
            return
        pick = under_way.pick
        pick.first_byte_s = self._clock()
        under_way.worker.health.answered_s = pick.first_byte_s
        if under_way.role is not Role.PREFILL:  # of a phase, that is the end
            self._prefill_done(pick)

    def tokens(self, key: str, prompt_tokens: int | None, output_tokens: int | None) -> None:
        """Note what the engine counted."""
        under_way = self._under_way.get(key)
        if under_way is not None and under_way.pick is not None:
            under_way.pick.prompt_tokens, under_way.pick.output_tokens = prompt_tokens, output_tokens

    def told(self, key: str, envoy_id: str, peer: str = "") -> None:
        """See `Desk.told`."""
        under_way = self._under_way.get(key)
        if under_way is None:
            return
        self._carriers.carry(key, peer)
        if envoy_id:
            under_way.envoy_id = envoy_id
            self._keys[envoy_id] = key

    def over(self, key: str, served: Served, peer: str = "") -> None:
        """Note that a request is over. One that is not known (any more) is counted, that is all."""
        for claimed in self._carriers.prove(key, peer) if peer else ():
            if claimed != key:
                self._over(claimed, Served(0))
        self._over(key, served)

    def _over(self, key: str, served: Served) -> None:
        self._carriers.over(key)
        under_way = self._under_way.pop(key, None)
        if under_way is None:
            self._count_as("unknown_key")
            return
        if self._keys.get(under_way.envoy_id) == key:
            del self._keys[under_way.envoy_id]
        worker, pick = under_way.worker, under_way.pick
        if 0 < served.status < 400 and not self._went_elsewhere(under_way, served):
            self._workers.worked(worker)
        worker.legs.discard(under_way.leg)
        self._judge(under_way, served)
        if pick is None or pick.over:
            return
        if under_way.role is Role.PREFILL:
            well = 0 < served.status < 400
            self._first_is_over(pick, well=well)
            if well:
                return
        if served.ttft_s is not None:
            pick.first_byte_s = pick.request.arrival_s + served.ttft_s
        if served.duration_s is not None:
            pick.ended_s = pick.request.arrival_s + served.duration_s
        self._end(pick, served.status or 499, served=served)

    def broke_off(self, envoy_id: str, served: Served, peer: str = "") -> None:
        """See `Desk.broke_off`."""
        key = self._keys.get(envoy_id)
        if key is None:
            return
        if self._carriers.believes(key, peer):
            self._over(key, served)
        else:
            self._count_as("not_its_envoy")

    def broke(self, peer: str) -> None:
        """Let what a broken connection carried be lost in a while, unless its Envoy comes back."""
        self._carriers.broke(peer, self._clock())
        self._wait_for_lost()

    def _wait_for_lost(self) -> None:
        at_s = self._carriers.wake_at()
        if at_s is not None:
            self._call_at(at_s, self._give_up_lost)

    def _give_up_lost(self) -> None:
        lost = self._carriers.lost(self._clock())
        if lost:
            log.warning("an Envoy is gone, what it carried counts as over", extra={"requests": len(lost)})
        for key in lost:
            self._count_as("envoy_gone")
            self._over(key, Served(0))
        self._wait_for_lost()

    def reported(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """Let an engine's report take over what it accounts for: an observer of the driver."""
        if isinstance(event, PassEnded | Snapshot) and self._dispatched.get(event.instance):
            self._call_at(now, self._acknowledged, event.instance, event.acknowledged)

    def _acknowledged(self, instance: str, number: int) -> None:
        waiting = self._dispatched[instance]
        while waiting and waiting[0][0] <= number:
            self.over(waiting.popleft()[1], Served(200))

    def _judge(self, under_way: _UnderWay, served: Served) -> None:
        """Report to an engine's health that it failed a request.

        Only Envoy could try the request at another engine, so no failure here has been tried elsewhere.
        """
        worker = under_way.worker
        if self._went_elsewhere(under_way, served):
            self._count_as("elsewhere")
            if not worker.health.failures:
                extra = {"instance": worker.name, "endpoint": served.endpoint}
                log.warning("Envoy went elsewhere", extra=extra)
            self._workers.at_fault(worker, f"Envoy went to {served.endpoint} instead")
        elif served.unreached:
            self._workers.unreachable(worker, "Envoy cannot connect to it")
        elif served.status in (429, 503) and served.blame:
            self._count_as("backpressure")
            self._workers.pushed_back(worker, served.retry_after_s)
        elif served.status >= 500 and served.blame:
            self._workers.failed(worker, f"{worker.name} answers {served.status}", refused=False)
            if served.status == 502:  # it broke off
                self._workers.check_soon(worker)
        elif 400 <= served.status < 500:
            self._workers.worked(worker)

    def _went_elsewhere(self, under_way: _UnderWay, served: Served) -> bool:
        return served.endpoint is not None and served.endpoint != under_way.endpoint

    def _taken_back(self, pick: Pick) -> None:
        """The policy recalls what Envoy has (rule 2). It has its place in the policy's buffer by now."""
        self._count_as("recalled_late")
        self._call_at(self._clock(), self._end, pick, 499)

    def _abandoned(self, pick: Pick, worker: Worker) -> None:
        """Its engine is gone (rule 2)."""
        if not pick.over:
            self._end(pick, 503, served=Served(503))

    def _end(
        self, pick: Pick, status: int, error: BaseException | None = None, served: Served | None = None
    ) -> None:
        """Release everything a request holds, however it ended."""
        if pick.over:
            return
        pick.over = True
        self._leave_buffer(pick)
        self.buffer.done()
        for worker in pick.workers:
            worker.legs.discard(pick)
            worker.inference.gone(pick.request.id)
        if pick.ended_s is None:
            pick.ended_s = self._clock()
        if isinstance(error, Refusal):
            pick.code = error.code
        try:
            if not pick.refused:
                self._feed(_last_event(pick, status, served))
        finally:
            self._driver.leave(pick.request.id)
            self._on_done(pick, status)

    def _leave_buffer(self, pick: Pick) -> None:
        if pick.waits:
            pick.waits = False
            self._flows[pick.flow] -= 1
            if not self._flows[pick.flow]:
                del self._flows[pick.flow]
            self.buffer.leave(pick.request.prompt_tokens, pick.size)

    def _feed(self, event: Event) -> None:
        self._driver.feed(event)

    def _sweep(self) -> None:
        now = self._clock()
        patience_s = self._config.accounting.forget_after_s
        for key, under_way in list(self._under_way.items()):
            if now - under_way.since_s < patience_s:
                break  # they are in order of time
            self._count_as("forgotten")
            self.over(key, Served(0))
        self._sweeper = self._call_at(now + SWEEP_S, self._sweep)

    def _role_of(self, instance: str) -> Role | None:
        worker = self._workers.get(instance)
        return None if worker is None else worker.spec.role


def _loop_time() -> float:
    """Return the time by which a request's wait ends."""
    return asyncio.get_running_loop().time()


def _last_event(pick: Pick, status: int, served: Served | None) -> Event:
    if served is None or status == 499 or 400 <= status < 500:
        return Cancelled(pick.request.id)
    if status >= 500:
        return Failed(pick.request.id, f"it was answered {status}", retry=False)
    return Finished(pick.request.id, pick.output_tokens or 0)


def _joined_by(pick: Pick) -> str:
    """Return the id that both phases of a request carry."""
    return pick.request.id.rpartition("-")[0]
