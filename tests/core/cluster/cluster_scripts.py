"""Words the cluster tests share: a host from a spec, and what was done as short tuples."""

import random

from headway.core.actions import Dispatch, Reject
from headway.core.cluster import create_cluster
from headway.core.cluster.led import Led
from headway.core.events import LeaseLost, Snapshot
from headway.testing import ScriptedHost


def host_of(spec, *, disaggregated=False, seed=0, lateness_s=0.0, led=False, wait_s=4.0):
    """`led`: under a lease, which it does not hold yet."""
    policy = create_cluster(spec, disaggregated=disaggregated, rng=random.Random(seed))
    host = ScriptedHost(Led(policy, wait_s=wait_s) if led else policy, lateness_s=lateness_s)
    if led:
        host.feed(LeaseLost(), 0.0)
    return host


def dispatches(host):
    """Return (time, request, instance, rank) of each dispatch, in order."""
    return [(at, a.request_id, a.instance, a.rank) for at, a in host.actions if isinstance(a, Dispatch)]


def when(host):
    """Return the time of the last dispatch of each request."""
    return {a.request_id: at for at, a in host.actions if isinstance(a, Dispatch)}


def order(host):
    return [a.request_id for _, a in host.actions if isinstance(a, Dispatch)]


def rejects(host):
    return [(at, a.request_id, a.why) for at, a in host.actions if isinstance(a, Reject)]


def snapshot(name, sequence, *, acknowledged=0, busy=False, epoch=0, **values):
    return Snapshot(name, epoch, sequence, acknowledged, busy, **values)
