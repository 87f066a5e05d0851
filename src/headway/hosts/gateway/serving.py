"""Serves a request from door to end: room for it, its places, its legs, again where that is allowed.

Rule 1. Load is reserved when the policy decides and released in `finally`: every request that arrived
        ends in exactly one of `Finished`, `Failed(retry=False)` and `Cancelled`, unless the policy
        refused it.
Rule 2. A leg is made again only before the client has a byte, at most `retries` times, within a budget
        over all requests, and at another instance if there is one.
Rule 3. A client that is gone cancels the task, which ends the wait or cuts the legs: nothing is computed
        for nobody.
"""

from collections.abc import Callable, Mapping
from itertools import count

from headway.core.actions import Dispatch
from headway.core.events import Cancelled, Failed, Role
from headway.core.request import Request, Slo
from headway.front.buffer import Buffer, ReceivedBytes, RetryBudget
from headway.front.driver import Driver
from headway.front.errors import Refusal, engine_failed, unavailable
from headway.front.lease import Elector
from headway.front.lengths import Lengths
from headway.front.models import check_model, schedulable_length
from headway.front.requests import Call, targets_for_engines
from headway.front.transport import Sink, Transport
from headway.front.worker import State, Worker
from headway.front.workers import Workers
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.dialects import way_of
from headway.hosts.gateway.flight import Flight, LegError, RecalledError
from headway.hosts.gateway.legs import EngineSaysNo, Legs
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
        known = self._workers.models()
        check_model(call.model, known)
        tokens = schedulable_length(
            call.model,
            self._lengths.measure(call),
            known,
            self._config.server.max_prompt_tokens,
            (worker.up_event() for worker in self._workers),
            exact=self._lengths.exact(call),
        )
        trace = self._tracing.begin(call.path, headers, arrived_s)
        passed_on = self._to_engines(headers, trace)
        # Two clients may choose one id; engines and policies need one for each request.
        name = f"{request_id}-{next(self._numbers)}"
        block_tokens = call.block_tokens(tokens)
        request = Request(name, arrived_s, tokens, slo, priority, call.max_tokens, call.prefix, block_tokens)
        self.buffer.admit(tokens, len(call.body), received)
        self._budget.earn()
        return Flight(request, call, passed_on, sink, role_of=self._role_of, clock=self._clock, trace=trace)

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
                return 200
            except RecalledError:
                recalls += 1
                if recalls > MOST_RECALLS:
                    raise unavailable("recalled", "The engines fall silent again and again.") from None
                self._wait_again(flight)
            except LegError as error:
                self._leg_failed(flight, error)
            except EngineSaysNo as answer:
                await flight.sink.answer(answer.status, {"Content-Type": answer.content_type}, answer.body)
                return answer.status

    def _leg_failed(self, flight: Flight, error: LegError) -> None:
        """Have the request placed again, or give up. Raises Refusal in that case."""
        blamed = self._to_blame(flight, error)
        for worker in blamed:
            self._workers.failed(worker, str(error), refused=error.refused)
        flight.forget_places()
        flight.attempts += 1
        request_id = flight.request.id
        if self._may_retry(flight, error, hung=bool(error.silent and blamed)):
            self._on_retry("refused" if error.refused else str(error.status))
            self._wait_again(flight)
            left = blamed[0] if blamed else error.worker
            self._workers.send_elsewhere(left, Failed(request_id, str(error), retry=True))
            return
        flight.over = True
        self._driver.feed(Failed(request_id, str(error), retry=False))
        raise engine_failed(error.status, error.said) from None

    def _to_blame(self, flight: Flight, error: LegError) -> list[Worker]:
        """Return the engines whose fault it is. Where one is only slow for this request, while it answers
        others, it is nobody's: three long answers without a stream must not cost a healthy engine its place.
        """
        if error.silent:
            suspects = self._legs.hung(flight, error)
        else:
            suspects = [] if error.worker is None else [error.worker]
        return [worker for worker in suspects if not self._kv_is_lost(flight, worker)]

    def _may_retry(self, flight: Flight, error: LegError, *, hung: bool) -> bool:
        """Whether to try elsewhere. The budget is for engines that live: requests of one that is dead, or
        answers nobody any more, must move.
        """
        if flight.sink.started or flight.attempts > self._config.limits.retries:
            return False
        return hung or not error.answered or self._budget.spend()

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
