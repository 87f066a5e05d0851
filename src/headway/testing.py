"""Tools to test a cluster policy with: a host that runs a script of literal times, and checks the contract.

    host = ScriptedHost(create_cluster("least-tokens", disaggregated=False, rng=random.Random(0)))
    host.run([
        (0.0, up("engine-0", ranks=2, chunk=512)),
        (1.0, arrived("r1", at=1.0, prompt=300)),
        (1.5, pass_ended("engine-0", 1, ran=(300, 0), acknowledged=1)),
    ])
    assert host.dispatched == {"r1": ("engine-0", 0)}

`ContractCheck` is an observer like `DecisionLog`: any host can carry it. A breach raises InvariantError.
"""

import math
from collections.abc import Iterable, Sequence

from headway.core.actions import Action, Dispatch, Poll, Recall, Reject
from headway.core.cluster.contract import ClusterPolicy
from headway.core.decision_log import DecisionLog
from headway.core.errors import InvariantError
from headway.core.events import (
    Arrived,
    Cancelled,
    ConcurrencyLimited,
    Event,
    Failed,
    Finished,
    InstanceDown,
    InstanceDraining,
    InstanceUp,
    LeaseHeld,
    LeaseLost,
    PassEnded,
    PrefillDone,
    Role,
    TimerFired,
)
from headway.core.request import Request, Slo

__all__ = ["ContractCheck", "Script", "ScriptedHost", "arrived", "pass_ended", "request", "up"]

#: What happens, and when (monotonic seconds, in order).
Script = Iterable[tuple[float, Event]]

#: A policy may be woken for nothing at one instant this often; then it would be so for ever.
MAX_IDLE_WAKES = 100


class ContractCheck:
    """Watches a policy from outside.

    1. It acts only on requests that arrived and are not over (cancelled, finished, rejected, failed for
    good). 2. It dispatches a request once; again only after `Recall` or `Failed(retry=True)`, or, after
    `PrefillDone`, once
       more to a decode instance.
    3. It dispatches only to instances that are up and not draining, to ranks they have, prompts to prefill or
       aggregated ones, prefilled requests to decode ones, and to instances that serve the request's model.
    4. `Dispatch.number` counts from 1 for each instance, anew when the instance came up after it was down.
    5. It recalls only what is at that instance and has no first token, and rejects only what it holds.
    6. It dispatches nothing to an instance that has as many requests as its concurrency limit allows.
    7. It dispatches nothing from `LeaseLost`, or the end of a lease, until the next `LeaseHeld`.
    """

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.prefilled: set[str] = set()
        self.placed: dict[str, tuple[str, int]] = {}
        self.numbers: dict[str, int] = {}
        self._models: dict[str, str] = {}  # of requests that name one
        self._up: dict[str, InstanceUp] = {}
        self._draining: set[str] = set()
        self._limits: dict[str, int | None] = {}
        self._lost: set[str] = set()  # placed at an instance that restarted since
        self._leads_until_s = math.inf

    def __call__(self, now: float, event: Event, actions: Sequence[Action]) -> None:
        """Take in the event, then check every action. Raises InvariantError for a breach."""
        self._note(event)
        for action in actions:
            try:
                self._check(action, now)
            except InvariantError as breach:
                raise InvariantError(f"at {now!r} s, on {type(event).__name__}: {action}: {breach}") from None

    def _note(self, event: Event) -> None:
        match event:
            case Arrived(req):
                self.held.add(req.id)
                if req.model is not None:
                    self._models[req.id] = req.model
            case Cancelled(request_id) | Finished(request_id):
                self._forget(request_id)
            case PrefillDone(request_id):
                self._prefill_done(request_id)
            case Failed(request_id, retry=retry):
                self._failed(request_id, retry)
            case InstanceUp(name):
                self._draining.discard(name)
                if name in self._up and event.epoch > self._up[name].epoch:
                    self._lost.update(request for request, (at, _) in self.placed.items() if at == name)
                self._up[name] = event
                self.numbers.setdefault(name, 0)
            case InstanceDraining(name):
                self._draining.add(name)
            case ConcurrencyLimited(name, requests):
                if name in self._up:
                    self._limits[name] = requests
            case InstanceDown(name):
                self._limits.pop(name, None)
                self._lost.update(request for request, (at, _) in self.placed.items() if at == name)
                self._up.pop(name, None)
                self.numbers.pop(name, None)
            case LeaseHeld(until_s):
                self._leads_until_s = until_s
            case LeaseLost():
                self._leads_until_s = -math.inf

    def _forget(self, request_id: str) -> None:
        self._give_up_place(request_id)
        self._models.pop(request_id, None)

    def _give_up_place(self, request_id: str) -> None:
        self.held.discard(request_id)
        self.prefilled.discard(request_id)
        self.placed.pop(request_id, None)
        self._lost.discard(request_id)

    def _prefill_done(self, request_id: str) -> None:
        """From a prefill instance it comes back into the policy's hands, to be placed for its decode."""
        self.prefilled.add(request_id)
        name, _ = self.placed.get(request_id, ("", 0))
        if name in self._up and self._up[name].role is Role.PREFILL:
            del self.placed[request_id]
            self.held.add(request_id)

    def _failed(self, request_id: str, retry: bool) -> None:
        if retry and (request_id in self.held or request_id in self.placed):
            self._give_up_place(request_id)
            self.held.add(request_id)
        else:
            self._forget(request_id)

    def _check(self, action: Action, now: float) -> None:
        match action:
            case Dispatch():
                self._require(now < self._leads_until_s, "another replica may lead the pool")
                self._check_dispatch(action)
            case Reject(request_id):
                self._require(request_id in self.held, "the request is not in the policy's hands")
                self._forget(request_id)
            case Recall(request_id, instance):
                at, _ = self.placed.pop(request_id, (None, 0))
                self._require(at == instance, f"the request is at {at}")
                self._require(request_id not in self.prefilled, "its first token is with the client")
                self.held.add(request_id)
            case Poll(instance):
                self._require(instance in self._up, "the instance is not up")

    def _check_dispatch(self, action: Dispatch) -> None:
        request_id, name = action.request_id, action.instance
        self._require(request_id not in self.placed, "the request is placed already")
        self._require(request_id in self.held, "the request is not in the policy's hands")
        self._require(name in self._up and name not in self._draining, "the instance takes no work")
        model = self._models.get(request_id)
        self._require(self._up[name].serves(model), f"the instance does not serve {model!r}")
        self._require(0 <= action.rank < self._up[name].ranks, f"it has {self._up[name].ranks} ranks")
        limit = self._limits.get(name)
        if limit is not None:
            there = sum(at == name and r not in self._lost for r, (at, _) in self.placed.items())
            self._require(there < limit, f"the instance has {there} requests, its limit is {limit}")
        decodes = self._up[name].role is Role.DECODE
        self._require(decodes == (request_id in self.prefilled), "the wrong role for what is left to do")
        self._require(
            action.number == self.numbers[name] + 1, f"the number after {self.numbers[name]} is due"
        )
        self.numbers[name] = action.number
        self.held.remove(request_id)
        self.placed[request_id] = (name, action.rank)

    def _require(self, kept: bool, otherwise: str) -> None:
        if not kept:
            raise InvariantError(otherwise)


class ScriptedHost:
    """Runs scripts through a policy, waking it when it wants to be woken.

    `log` is its decision log, `actions` the (time, action) pairs, `check` the contract's. With `lateness_s`
    every timer fires that late, as on a busy host, unless a scripted event comes first.
    """

    def __init__(self, policy: ClusterPolicy, *, lateness_s: float = 0.0) -> None:
        self.policy = policy
        self.lateness_s = lateness_s
        self.now = -math.inf
        self.log = DecisionLog()
        self.check = ContractCheck()
        self.actions: list[tuple[float, Action]] = []

    @property
    def dispatched(self) -> dict[str, tuple[str, int]]:
        """Where each request is that is placed now: (instance, rank)."""
        return dict(self.check.placed)

    def run(self, script: Script, until: float | None = None) -> list[tuple[float, Action]]:
        """Run a script, then wait until `until` (None: its last event). Return what was done meanwhile.

        Timers come after the events of the same instant. Raises InvariantError when the policy breaks its
        contract, or the script goes back in time.
        """
        before = len(self.actions)
        for at_s, event in script:
            self.wait(at_s, inclusive=False)
            self.feed(event, at_s)
        self.wait(self.now if until is None else until)
        return self.actions[before:]

    def feed(self, event: Event, now: float) -> list[Action]:
        """Hand over one event; return the actions."""
        if not now >= self.now:
            raise InvariantError(f"the script goes back from {self.now!r} s to {now!r} s")
        self.now = now
        actions = self.policy.handle(event, now)
        self.log(now, event, actions)
        self.check(now, event, actions)
        self.actions.extend((now, action) for action in actions)
        return actions

    def wait(self, until: float, *, inclusive: bool = True) -> None:
        """Let time pass and fire the timers that come due before `until`, or at it when `inclusive`."""
        idle = 0
        while (due := self._due()) is not None and (due < until or (inclusive and due == until)):
            idle = 0 if due > self.now else idle + 1
            if self.feed(TimerFired(), due):
                idle = 0
            if idle > MAX_IDLE_WAKES:
                raise InvariantError(
                    f"the policy wants to be woken at {due!r} s again and again and does nothing"
                )

    def _due(self) -> float | None:
        wake_s = self.policy.wake_at()
        return None if wake_s is None else max(wake_s + self.lateness_s, self.now)


def request(
    request_id: str,
    *,
    at: float = 0.0,
    prompt: int = 100,
    slo: Slo | None = None,
    priority: int = 0,
    model: str | None = None,
) -> Request:
    """Build a request that arrives at `at` seconds with `prompt` tokens."""
    return Request(request_id, at, prompt, slo or Slo(), priority, model=model)


def arrived(
    request_id: str,
    *,
    at: float = 0.0,
    prompt: int = 100,
    slo: Slo | None = None,
    priority: int = 0,
    model: str | None = None,
) -> Arrived:
    """Build the event of its arrival."""
    return Arrived(request(request_id, at=at, prompt=prompt, slo=slo, priority=priority, model=model))


def up(
    name: str,
    *,
    ranks: int = 1,
    chunk: int = 1000,
    role: Role | None = None,
    kv_blocks: int | None = None,
    block_tokens: int = 16,
    max_running: int | None = None,
    lockstep: bool = True,
    epoch: int = 0,
    models: Iterable[str] | None = None,
    adapters: Iterable[str] = (),
) -> InstanceUp:
    """Announce an instance. Without a `role` its name tells it: "prefill-0", "decode-1", else aggregated.

    `models`: its base models (None: it serves any model). `adapters`: names it serves on top of them.
    """
    told = next((r for r in (Role.PREFILL, Role.DECODE) if name.startswith(r)), Role.AGGREGATED)
    base = frozenset(models or ())
    return InstanceUp(
        name,
        role or told,
        ranks,
        chunk,
        kv_blocks,
        block_tokens,
        max_running,
        lockstep,
        epoch,
        None if models is None else base | frozenset(adapters),
        base,
    )


def pass_ended(
    name: str,
    sequence: int,
    *,
    ran: tuple[int, ...],
    acknowledged: int,
    queued: tuple[int, ...] | None = None,
    kv_blocks: tuple[int, ...] | None = None,
    running: tuple[int, ...] | None = None,
    waiting: tuple[int, ...] | None = None,
    pab_tokens: tuple[int, ...] | None = None,
    duration: float = 0.1,
    epoch: int = 0,
    first_rank: int = 0,
) -> PassEnded:
    """Report a pass; `ran` are the prompt tokens per rank. Nothing is queued unless said."""
    return PassEnded(
        name,
        epoch,
        sequence,
        acknowledged,
        duration,
        ran,
        (0,) * len(ran) if queued is None else queued,
        kv_blocks,
        running,
        waiting,
        pab_tokens,
        first_rank,
    )
