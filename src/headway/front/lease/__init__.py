"""One leader per pool: who of several replicas places its requests (`core/leadership.py` has the rules)."""

import importlib.util
import secrets
import socket
import time
from collections.abc import Callable

from headway.core.errors import ConfigError
from headway.core.events import Event
from headway.core.leadership import Leadership
from headway.core.sharding import preference
from headway.front.config import FrontConfig, LeaderSpec
from headway.front.lease.contract import Store
from headway.front.lease.elector import Elector

__all__ = ["Elector", "create_elector"]


def create_elector(
    config: FrontConfig,
    *,
    clock: Callable[[], float],
    feed: Callable[[Event], object],
    on_lead: Callable[[], None] = lambda: None,
) -> Elector:
    """Build what `[leader]` asks for. Raises ConfigError when it cannot be."""
    spec, pool = config.leader, config.pool_name
    rank = preference(pool, spec.replicas).index(spec.replica) if spec.replica and spec.replicas else 0
    leadership = Leadership(spec.lease_s, rank=rank)
    store = _store(config, spec, pool, leadership.patience_s, clock) if spec.shared else None
    return Elector(pool, store, leadership, clock=clock, feed=feed, on_lead=on_lead)


def _store(
    config: FrontConfig, spec: LeaderSpec, pool: str, timeout_s: float, clock: Callable[[], float]
) -> Store:
    # A process that is started again is another: it must not take over the lease of the life before.
    holder = f"{spec.replica or socket.gethostname()}/{secrets.token_hex(4)}"
    if spec.backend == "valkey":
        if importlib.util.find_spec("valkey") is None:
            raise ConfigError("leader.backend: valkey is missing: pip install 'headway[leader]'")
        from headway.front.lease.valkey import ValkeyStore

        password = config.secret(spec.password_env, "leader.password_env")
        assert spec.url is not None
        return ValkeyStore(spec.url, pool, holder, spec.lease_s, timeout_s=timeout_s, password=password)
    from headway.front.discovery.api import Api, own_namespace
    from headway.front.lease.kubernetes import KubernetesStore

    api = Api(spec.api_server, token_file=spec.token_file, ca_file=spec.ca_file, table="leader")
    namespace = spec.namespace or own_namespace()
    name = f"headway-{pool}"
    return KubernetesStore(api, namespace, name, holder, spec.lease_s, clock=clock, wall=time.time)
