"""How engines of a kind want a request: one file a kind, each a way from the policy's places to legs."""

from headway.core.events import Role
from headway.hosts.gateway.config import GatewayConfig
from headway.hosts.gateway.dialects import sglang, vllm
from headway.hosts.gateway.dialects.contract import Way
from headway.hosts.gateway.flight import Flight
from headway.hosts.gateway.legs import Legs

__all__ = ["Way", "way_of"]

_BODY = {"vllm": vllm.body_for, "sglang": sglang.body_for}


def way_of(config: GatewayConfig) -> Way:
    """Return how requests go through the engines of a cluster."""
    if not config.disaggregated:
        return aggregated
    return sglang.prefill_and_decode if config.both_legs_at_once else vllm.prefill_then_decode


async def aggregated(legs: Legs, flight: Flight) -> None:
    """One leg."""
    worker, dispatch = await legs.place(flight, Role.AGGREGATED)
    body = _BODY[worker.spec.dialect](flight.call.body, worker, dispatch.rank)
    await legs.stream(flight, worker, dispatch, body)
