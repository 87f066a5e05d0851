"""What a policy may know of a request: its prompt, its targets, never its output length."""

import math
from dataclasses import dataclass, field

from headway.core.errors import ConfigError

__all__ = ["Request", "Slo"]


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency targets of one request.

    `ttft_s`: time to first token, from arrival. `tpot_s`: time per output token after the first. Raises
    ConfigError for a target that is not a positive finite number.
    """

    ttft_s: float = 2.0
    tpot_s: float = 0.05

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if not (0.0 < value < math.inf):
                raise ConfigError(f"SLO {name} must be a positive number of seconds, got {value!r}")

    def deadline_s(self, arrival_s: float, token: int) -> float:
        """When output token `token` (0 is the first) is due: FairBatching's line (§ "envelope")."""
        return arrival_s + self.ttft_s + token * self.tpot_s


DEFAULT_SLO = Slo()


@dataclass(frozen=True, slots=True)
class Request:
    """A request as a scheduler sees it.

    `prefix` holds one hash per full block of `prefix_block_tokens` prompt tokens, from the start of the
    prompt (as Mooncake's traces and vLLM's block hashes have it); empty when unknown. `max_output_tokens` is
    the client's own limit, None when it gave none; never the true length. `model`: the name that an instance
    must serve (a base model or an adapter); None: any instance will do.
    """

    id: str
    arrival_s: float
    prompt_tokens: int
    slo: Slo = DEFAULT_SLO
    priority: int = 0
    max_output_tokens: int | None = None
    prefix: tuple[int, ...] = field(default=(), repr=False)
    prefix_block_tokens: int = 0
    model: str | None = None

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise ConfigError(
                f"request {self.id}: prompt_tokens must be at least 1, got {self.prompt_tokens}"
            )
        if self.prefix and self.prefix_block_tokens < 1:
            raise ConfigError(f"request {self.id}: a prefix needs prefix_block_tokens of at least 1")
