"""From a spec to a policy that a host can drive.

staggered                       prefill + its natural decode partner (P/D), or alone (aggregated engines)
least-tokens+iqr-lexicographic  prefill + decode
"""

from headway.core.actions import Action, Reject
from headway.core.cluster.contract import ClusterPolicy, Held
from headway.core.cluster.pool import PoolPolicy, cluster_policies
from headway.core.errors import ConfigError
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
    PassStarted,
    PrefillDone,
    Role,
    Snapshot,
    TimerFired,
)
from headway.core.registry import Rng
from headway.core.request import Request

__all__ = ["Disaggregated", "check_cluster", "create_cluster"]


def create_cluster(spec: str, *, disaggregated: bool, rng: Rng) -> ClusterPolicy:
    """Build the policy of a cluster: of its two pools if `disaggregated`, of its one pool otherwise.

    Raises ConfigError for an unknown name or setting, and for a policy that does not suit the pool.
    """
    check_cluster(spec, disaggregated=disaggregated)
    policies = [_create(part, rng) for part in _parts(spec, disaggregated)]
    return Disaggregated(*policies) if disaggregated else policies[0]


def check_cluster(spec: str, *, disaggregated: bool) -> None:
    """Raise the ConfigError that `create_cluster` would raise, without building anything."""
    roles = (Role.PREFILL, Role.DECODE) if disaggregated else (Role.AGGREGATED,)
    for part, role in zip(_parts(spec, disaggregated), roles, strict=True):
        cls, _ = cluster_policies.find(part)
        if role not in cls.roles:
            fit = ", ".join(sorted(cls.roles))
            raise ConfigError(f"policy {part!r} cannot place {role} work, it is for: {fit}")


def _create(part: str, rng: Rng) -> PoolPolicy:
    policy: PoolPolicy = cluster_policies.create(part, rng)
    return policy


def _parts(spec: str, disaggregated: bool) -> list[str]:
    parts = [part.strip() for part in spec.split("+")]
    if not disaggregated:
        if len(parts) > 1:
            raise ConfigError(f"policy {spec!r} names two policies, but the cluster's engines are aggregated")
        return parts
    if len(parts) > 2:
        raise ConfigError(f"policy {spec!r} must be prefill or prefill+decode")
    if len(parts) == 1:
        cls, _ = cluster_policies.find(parts[0])
        parts.append(cls.partner or parts[0])
    return parts


class Disaggregated(ClusterPolicy):
    """Two pools in a row. A request arrives in the decode pool when its prefill is done, and is placed
    late."""

    def __init__(self, prefill: PoolPolicy, decode: PoolPolicy) -> None:
        self.prefill = prefill
        self.decode = decode
        self.reads_pab = prefill.reads_pab or decode.reads_pab
        self.reads_prefixes = prefill.reads_prefixes or decode.reads_prefixes
        self._pool_of: dict[str, PoolPolicy] = {}  # by instance
        self._requests: dict[str, Request] = {}
        self._decoding: set[str] = set()

    def handle(self, event: Event, now: float) -> list[Action]:
        """See `ClusterPolicy.handle`."""
        match event:
            case Arrived(request):
                return self._arrived(event, request, now)
            case PassEnded(instance) | PassStarted(instance) | Snapshot(instance):
                known = self._pool_of.get(instance)
                return known.handle(event, now) if known else []
            case PrefillDone(request_id):
                return self._prefill_done(event, request_id, now)
            case Cancelled(request_id) | Finished(request_id):
                pool = self._pool(request_id)
                self._forget(request_id)
                return pool.handle(event, now)
            case Failed(request_id):
                return self._failed(event, request_id, now)
            case InstanceUp(instance, role):
                self._pool_of[instance] = self.decode if role is Role.DECODE else self.prefill
                return self._pool_of[instance].handle(event, now)
            case TimerFired():
                return self._due(event, now)
            case LeaseHeld() | LeaseLost():
                # Decode first: what Paired places in one pool, it places in the other.
                return self._note(self.decode.handle(event, now) + self.prefill.handle(event, now))
            case InstanceDraining(instance) | ConcurrencyLimited(instance) | InstanceDown(instance):
                known = self._pool_of.get(instance)
                return known.handle(event, now) if known else []

    def _arrived(self, event: Arrived, request: Request, now: float) -> list[Action]:
        if not self.decode.ledger.fits(request):
            return self.decode.handle(event, now)  # which refuses it, before its prefill is wasted
        self._requests[request.id] = request
        return self._note(self.prefill.handle(event, now))

    def _prefill_done(self, event: PrefillDone, request_id: str, now: float) -> list[Action]:
        request = self._requests.get(request_id)
        actions = self.prefill.handle(event, now)
        if request is not None and request_id not in self._decoding:
            self._decoding.add(request_id)
            actions = actions + self.decode.handle(Arrived(request), now)
        return self._note(actions)

    def _failed(self, event: Failed, request_id: str, now: float) -> list[Action]:
        """With its KV gone, a request that may be retried starts again from its prompt."""
        request = self._requests.get(request_id)
        if request is not None and event.retry and request_id in self._decoding:
            actions = self.decode.handle(Cancelled(request_id), now)
            self._decoding.discard(request_id)
            return self._note(actions + self.prefill.handle(Arrived(request), now))
        pool = self._pool(request_id)
        if not event.retry:
            self._forget(request_id)
        return self._note(pool.handle(event, now))

    def _due(self, event: TimerFired, now: float) -> list[Action]:
        """Wake the pools whose time has come."""
        actions: list[Action] = []
        for pool in (self.prefill, self.decode):
            wake_s = pool.wake_at()
            if wake_s is not None and wake_s <= now:
                actions += pool.handle(event, now)
        return self._note(actions)

    def _pool(self, request_id: str) -> PoolPolicy:
        return self.decode if request_id in self._decoding else self.prefill

    def _note(self, actions: list[Action]) -> list[Action]:
        """Forget the requests that were refused."""
        for action in actions:
            if isinstance(action, Reject):
                self._forget(action.request_id)
        return actions

    def _forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._decoding.discard(request_id)

    def wake_at(self) -> float | None:
        """See `ClusterPolicy.wake_at`."""
        first_s, other_s = self.prefill.wake_at(), self.decode.wake_at()
        if first_s is None or other_s is None:
            return other_s if first_s is None else first_s
        return min(first_s, other_s)

    def held(self) -> list[Held]:
        """See `ClusterPolicy.held`."""
        return self.prefill.held() + self.decode.held()
