"""Serves a request from door to end: room for it, its places, its legs, again where that is allowed.

Rule 1. Load is reserved when the policy decides and released in `finally`: every request that arrived
        ends in exactly one of `Finished`, `Failed(retry=False)` and `Cancelled`, unless the policy
        refused it.
Rule 2. A request is tried again only before the client has a byte, at most `retries` times, within a budget
        over all requests, and at another instance if there is one. Whose fault a failure is, and whether it
        is tried again, is decided by `core/fault_attribution.py`.
Rule 3. A client that is gone cancels the task, which ends the wait or cuts the legs: nothing is computed
        for nobody.
"""

import asyncio
from collections.abc import Callable, Mapping
from itertools import count

from headway.core.actions import Dispatch
from headway.core.events import Cancelled, Failed, Role
from headway.core.fault_attribution import EngineFailure, Fault, Verdict
from headway.core.request import Request, Slo
from headway.front.buffer import Buffer, ReceivedBytes, RetryBudget
from headway.front.driver import Driver
from headway.front.errors import Refusal, engine_failed, unavailable
from headway.front.headers import error_for_client
from headway.front.lease import Elector
from headway.front.lengths import Lengths
from headway.front.model_field import with_model
from headway.front.models import schedulable_length
from headway.front.requests import Call, targets_for_engines
from headway.front.transport import Sink, Transport
from headway.front.worker import State, Worker
from headway.front.workers import Workers
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.dialects import way_of
from headway.hosts.gateway.flight import EngineSaysNo, Flight, LegError, RecalledError
from headway.hosts.gateway.legs import Legs
from headway.hosts.gateway.tracing import Trace, Tracing

__all__ = ["Done", "Serving"]

#: Sees a request when it is over, with the status the client was given.
Done = Callable[[Flight, int], None]

#: What of a client's headers goes on to the engines.
_PASSED_ON = ("accept", "baggage")

#: A recalled request is at most so often recalled again; a policy that does it more does it for ever.
MOST_RECALLS = 20


class Serving:
    """All requests in the gateway. `on_done` hears of each when it is over."""

    def __init__(
        self,
        config: GatewayConfig,
        driver: Driver,
        workers: Workers,
        transport: Transport,
        lengths: Lengths,
        *,
        elector: Elector,
        clock: Callable[[], float],
        engine_headers: Mapping[str, str],
        on_done: Done = lambda flight, status: None,
        on_retry: Callable[[str], None] = lambda reason: None,
        tracing: Tracing | None = None,
    ) -> None:
        self.buffer = Buffer(config.limits, clock)
        self._config = config
        self._driver = driver
        self._workers = workers
        self._lengths = lengths
        self._clock = clock
        self._on_done = on_done
        self._on_retry = on_retry
        self._tracing = tracing or Tracing()
        self._budget = RetryBudget(config.limits.retry_budget)
        self._numbers = count(1)
        self._flights: set[Flight] = set()
        self._way = way_of(config)
        self._passes_authorization = not config.auth.checks_keys
        self._legs = Legs(
            workers,
            transport,
            driver.feed,
            config.limits,
            elector=elector,
            clock=clock,
            dispatched=self._dispatched,
            engine_headers=engine_headers,
        )

    @property
    def reads_prefixes(self) -> bool:
        """Whether the policy looks at the hashes of a prompt's beginning."""
        return self._driver.reads_prefixes

    def undecided(self) -> bool:
        """Whether a request may still need a place: it has no byte of its answer yet."""
        return any(not flight.sink.started for flight in self._flights)

    async def take_in(
        self,
        call: Call,
        headers: Mapping[str, str],
        request_id: str,
        slo: Slo,
        priority: int,
        sink: Sink,
        received: ReceivedBytes | None = None,
    ) -> Flight:
        """Make room for a request, which is to be served at once. Raises Refusal when there is none."""
        arrived_s = self._clock()
        model = await self._workers.catalog.resolve(call.model)
        call = with_model(call, model)
        tokens = schedulable_length(
            model or call.model,
            self._lengths.measure(call),
            self._workers.models(),
            self._config.server.max_prompt_tokens,
            (each.told or each.up_event() for each in self._workers if each.serves(model)),
            exact=self._lengths.exact(call),
        )
        trace = self._tracing.begin(call.path, headers, arrived_s)
        passed_on = self._to_engines(headers, trace)
        # Two clients may choose one id; engines and policies need one for each request.
        name = f"{request_id}-{next(self._numbers)}"
        request = Request(
            name,
            arrived_s,
            tokens,
            slo,
            priority,
            call.max_tokens,
            call.prefix,
            call.block_tokens(tokens),
            model,
        )
        self.buffer.admit(tokens, len(call.body), received)
        self._budget.earn()
        return Flight(
            request,
            call,
            passed_on,
            sink,
            role_of=self._role_of,
            clock=self._clock,
            retries=self._config.limits.retries,
            trace=trace,
        )

    async def serve(self, flight: Flight) -> None:
        """Serve a request to its end. Raises Refusal when the client is to be told no, and ConnectionError
        when it is gone or does not read.
        """
        flight.waits = True
        self._flights.add(flight)
        status = 499  # unless somebody says otherwise the client went away
        try:
            self._driver.arrive(flight.request, flight)
            status = await self._until_over(flight)
        except Refusal as refusal:
            status, flight.code = refusal.status, refusal.code
            raise
        except ConnectionError:
            raise  # nobody is there any more, or reads: the connection ends
        except Exception:
            status = 500
            raise
        finally:
            self._end(flight, status)

    async def _until_over(self, flight: Flight) -> int:
        recalls = 0
        while True:
            if flight.refusal is not None:
                raise flight.refusal
            flight.tries += 1
            try:
                async with flight:
                    await self._way(self._legs, flight)
                return flight.status
            except RecalledError:
                recalls += 1
                if recalls > MOST_RECALLS:
                    raise unavailable("recalled", "The engines fall silent again and again.") from None
                flight.hold_began_s = None
                self._wait_again(flight)
            except LegError as error:
                status = await self._leg_failed(flight, error)
                if status is not None:
                    return status
            except EngineSaysNo as answer:
                return await _answer(flight, answer)

    async def _leg_failed(self, flight: Flight, error: LegError) -> int | None:
        """Have the request placed again and return None; else answer it, and return its status.

        Raises Refusal where the engine gave no answer of its own.
        """
        verdict = self._attribute(flight, error)
        flight.forget_places()
        flight.attempts = flight.faults.attempts
        again = verdict.retry and (not verdict.costs_budget or self._budget.spend())
        if again and not (verdict.hold and self._hold_is_over(flight)):
            if verdict.wait_s:
                await self._back_off(flight, verdict.wait_s)
            else:
                self._place_again(flight, error, hold=verdict.hold)
            return None
        flight.over = True
        self._driver.feed(Failed(flight.request.id, str(error), retry=False))
        flight.code = engine_failed(error.status).code
        if error.answer is None or flight.sink.started:
            raise engine_failed(error.status) from None
        return await _answer(flight, error.answer)

    async def _back_off(self, flight: Flight, wait_s: float) -> None:
        """Take a request out of the policy's hands for a while: its place goes to others meanwhile."""
        self._wait_again(flight)
        self._driver.feed(Cancelled(flight.request.id))
        self._driver.leave(flight.request.id)
        await asyncio.sleep(wait_s)
        self._driver.arrive(flight.request, flight)

    def _hold_is_over(self, flight: Flight) -> bool:
        """Whether a request that an engine had no room for has waited for as long as it may."""
        began_s = flight.hold_began_s
        return began_s is not None and self._clock() - began_s >= self._config.limits.queue_timeout_s

    def _attribute(self, flight: Flight, error: LegError) -> Verdict:
        """Find out whose fault a failure is, and report it to the health of the engines concerned."""
        fault, worker = error.fault, error.worker
        if fault is Fault.SLOW:
            hung = [each for each in self._legs.hung(flight, error) if not self._kv_is_lost(flight, each)]
            if hung:
                fault, worker = Fault.SILENT, hung[0]
            for each in hung:
                self._workers.silent(each, str(error))
        elif worker is not None and self._kv_is_lost(flight, worker):
            fault = Fault.OURS
        if worker is None or fault is Fault.OURS:
            return flight.faults.failed(fault, None, begun=flight.sink.started)
        if fault is Fault.UNREACHABLE:
            self._workers.unreachable(worker, str(error))
        elif fault is Fault.BROKEN:
            self._workers.check_soon(worker)
        failure = EngineFailure(worker.name, worker.spec.role, str(error))
        verdict = flight.faults.failed(
            fault,
            failure,
            credible=worker.health.credible,
            elsewhere=self._workers.has_other(worker, flight.faults.tried(worker.spec.role)),
            begun=flight.sink.started,
            streams=flight.call.stream,
        )
        if fault is Fault.BACKPRESSURE and not verdict.wait_s:
            answer = error.answer
            self._workers.pushed_back(worker, None if answer is None else answer.retry_after_s)
        self._exonerate(verdict.exonerated)
        return verdict

    def _exonerate(self, failures: tuple[EngineFailure, ...]) -> None:
        for failure in failures:
            worker = self._workers.get(failure.engine)
            if worker is not None:
                self._workers.exonerated(worker)

    def _place_again(self, flight: Flight, error: LegError, *, hold: bool) -> None:
        """Have the policy place a request again, at an engine that has not failed it.

        `hold`: see `Verdict`.
        """
        worker = error.worker
        avoid: set[Worker] = set()
        if not hold:
            self._on_retry(error.fault.value)
            flight.hold_began_s = None
            avoid = {worker} if worker is not None else set(error.silent)
        for role in Role:
            found = (self._workers.get(name) for name in flight.faults.tried(role))
            avoid.update(each for each in found if each is not None)
        self._wait_again(flight)
        self._workers.send_elsewhere(avoid, Failed(flight.request.id, str(error), retry=True))

    def _kv_is_lost(self, flight: Flight, worker: Worker) -> bool:
        """Whether a decode engine failed because the prefill engine with its KV is gone: not its fault."""
        if worker.spec.role is not Role.DECODE:
            return False
        prefills = [w for name in flight.instances if (w := self._workers.get(name)) and w is not worker]
        return not (prefills and prefills[-1].state is State.UP)

    def _wait_again(self, flight: Flight) -> None:
        """Forget what the failed attempt had come to; the request is held once more."""
        flight.begin_again()
        if not flight.waits:
            flight.waits = True
            self.buffer.enter(flight.request.prompt_tokens, len(flight.call.body))

    def _dispatched(self, flight: Flight, dispatch: Dispatch) -> None:
        """Note that a request leaves the buffer."""
        if flight.waits:
            flight.waits = False
            flight.dispatched_s = self._clock()
            self.buffer.leave(flight.request.prompt_tokens, len(flight.call.body))
        flight.instances.append(dispatch.instance)

    def _end(self, flight: Flight, status: int) -> None:
        """Release everything the request holds, however it ended."""
        self._flights.discard(flight)
        if flight.waits:
            self.buffer.leave(flight.request.prompt_tokens, len(flight.call.body))
        self.buffer.done()
        self._settle_faults(flight)
        flight.ended_s = self._clock()
        if flight.prompt_tokens is not None:
            self._lengths.learn(flight.call, flight.prompt_tokens)
        try:
            if not flight.over and flight.refusal is None:
                self._driver.feed(Cancelled(flight.request.id))
        finally:
            flight.over = True
            self._driver.leave(flight.request.id)
            self._on_done(flight, status)

    def _settle_faults(self, flight: Flight) -> None:
        """Report the failures of a request that no engine served."""
        alone, exonerated = flight.faults.ended()
        self._exonerate(exonerated)
        for failure in alone:
            worker = self._workers.get(failure.engine)
            if worker is not None:
                self._workers.failed(worker, failure.reason, refused=False)

    # At the door

    def _role_of(self, instance: str) -> Role | None:
        worker = self._workers.get(instance)
        return None if worker is None else worker.spec.role

    def _to_engines(self, headers: Mapping[str, str], trace: Trace) -> dict[str, str]:
        passed = {name: headers[name] for name in _PASSED_ON if name in headers}
        passed |= {**targets_for_engines(headers), **trace.headers}
        if self._passes_authorization and "authorization" in headers:
            passed["Authorization"] = headers["authorization"]
        return passed


async def _answer(flight: Flight, answer: EngineSaysNo) -> int:
    """Pass an engine's own error on to the client; return its status."""
    headers = {"Content-Type": answer.content_type}
    if answer.status in (429, 503):
        headers["Retry-After"] = f"{answer.retry_after_s or 1:.0f}"
    body = error_for_client(answer.body) if answer.status >= 500 else answer.body
    await flight.sink.answer(answer.status, headers, body)
    return answer.status
