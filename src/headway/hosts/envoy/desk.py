"""What a stream asks of those who decide, and is told: the seam between speaking with Envoy and picking.

`Picks` answers in the same process; `remote.py` carries the questions to it from another one. So nothing here
holds a body or a message of Envoy's.
"""

from dataclasses import dataclass, field
from typing import Protocol

from headway.core.events import Role
from headway.core.request import Slo

__all__ = ["Answer", "Asked", "Desk", "Served"]


@dataclass(frozen=True, slots=True)
class Asked:
    """A generation that wants a place: what is kept of a request while it is held.

    `arrived_s`: the loop's clock, which all processes of a machine share. `tokens`: of its prompt, `exact`
    where they were counted. `size`: bytes it counts for in the buffer. `flow`: its fairness id. `subset`: the
    only endpoints it may go to. `prefix`, `block_tokens`: as in `Request`, where the policy reads them.
    """

    request_id: str
    arrived_s: float
    path: str
    model: str | None
    stream: bool
    max_tokens: int | None
    tokens: int
    exact: bool
    slo: Slo
    priority: int
    size: int
    flow: str = ""
    phase: Role | None = None
    subset: frozenset[str] | None = None
    prefix: tuple[int, ...] = ()
    block_tokens: int = 0


@dataclass(slots=True)
class Answer:
    """Where Envoy is to go: `ip:port[,ip:port…]`, headers for the engine, and the key it is known by."""

    endpoints: str
    key: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Served:
    """How a request ended, as it was told. `status` 0: its client went away, or nobody knows.

    `ttft_s`, `duration_s`: since it arrived; None: not told. `endpoint`: who served it. `unreached`: Envoy
    could not connect to it. `blame`: whether a bad status is the engine's; some are Envoy's own.
    `retry_after_s`: what the engine's `Retry-After` says.
    """

    status: int
    ttft_s: float | None = None
    duration_s: float | None = None
    endpoint: str | None = None
    unreached: bool = False
    blame: bool = True
    retry_after_s: float | None = None


class Desk(Protocol):
    """Places requests and keeps account of them. What asks raises Refusal; cancelled, it withdraws."""

    async def place(self, asked: Asked) -> Answer:
        """Hold a generation until it has its place."""

    async def second(self, request_id: str, subset: frozenset[str] | None) -> Answer:
        """Place the decode of a request whose prefill was placed before."""

    async def aside(self, role: Role | None, subset: frozenset[str] | None) -> Answer:
        """Pick for what the policy has no say in."""

    def told(self, key: str, envoy_id: str, peer: str = "") -> None:
        """Note by which id Envoy knows a request that is on its way, and which connection carries it."""

    def first_byte(self, key: str) -> None:
        """Note that the first piece of the answer passed by."""

    def tokens(self, key: str, prompt_tokens: int | None, output_tokens: int | None) -> None:
        """Note what the engine counted."""

    def over(self, key: str, served: Served, peer: str = "") -> None:
        """Note that a request is over. `peer`: the connection that reports it, if one does."""

    def broke_off(self, envoy_id: str, served: Served, peer: str = "") -> None:
        """Note that a request is over of which Envoy may not have read where it was to go."""

    def broke(self, peer: str) -> None:
        """Note that a connection of Envoy's is gone."""
