"""How many tokens a prompt has, for hosts that see only its bytes: bytes over a learned bytes-per-token
ratio.

Engines report the true count once a request is done; the ratio follows the traffic (code and English have
about 4 bytes a token, Chinese fewer).
"""

from headway.core.errors import ConfigError

__all__ = ["PromptLength"]


class PromptLength:
    """Belief about bytes per token. `decay`: weight of what is known when a new prompt is seen (0.99: the
    last hundred prompts count). Long prompts weigh more, as they do in the work to schedule.
    """

    __slots__ = ("_bytes", "_decay", "_tokens")

    def __init__(self, bytes_per_token: float = 4.0, decay: float = 0.99) -> None:
        if bytes_per_token <= 0.0 or not 0.0 < decay <= 1.0:
            raise ConfigError(f"need bytes_per_token > 0 and decay in (0, 1], got {bytes_per_token}, {decay}")
        # The first belief weighs as much as one prompt of 256 tokens: a guess, soon outvoted.
        self._tokens = 256.0
        self._bytes = 256.0 * bytes_per_token
        self._decay = decay

    @property
    def bytes_per_token(self) -> float:
        """The learned ratio."""
        return self._bytes / self._tokens

    def observe(self, prompt_bytes: int, tokens: int) -> None:
        """Learn from a prompt whose token count came back; an empty one teaches nothing."""
        if prompt_bytes > 0 and tokens > 0:
            self._bytes = self._decay * self._bytes + prompt_bytes
            self._tokens = self._decay * self._tokens + tokens

    def estimate(self, prompt_bytes: int) -> int:
        """Return the likely tokens of a prompt, at least 1."""
        return max(1, round(prompt_bytes / self.bytes_per_token))
