"""Estimates how many tokens a prompt has from its length in bytes, for hosts that have no tokenizer.

tokens = intercept + slope · bytes

The intercept is what a chat template puts around every prompt, the slope is tokens per byte (code and English
have about 0.25, Chinese 0.4). Engines report the true count once a request is done; both follow the traffic
by a weighted least-squares fit that forgets and starts from a prior.

Rule 1. Short prompts alone say nothing of the slope: what they have beyond the prior is the intercept.
Rule 2. One report moves little: residuals far outside of the noise count less (Huber's weight).
Rule 3. Numbers that cannot be are not learned from: negative, not whole, more tokens than bytes allow, or
        hardly any.
"""

from headway.core.errors import ConfigError

__all__ = ["PromptLength"]

#: Standard deviations of the prior: of the intercept in tokens, of the slope relative to its mean.
PRIOR_INTERCEPT, PRIOR_SLOPE = 100.0, 0.3
#: Standard deviation of a report: so many tokens, and this share of the prompt.
NOISE_TOKENS, NOISE_SHARE = 4.0, 0.1
#: Residuals beyond so many standard deviations are outliers.
HUBER = 3.0
#: Tokens per byte are never outside of these: a byte is at most a token, and no text has 64 bytes a token.
LEAST_SLOPE, MOST_SLOPE = 1 / 64, 1.0
#: A prompt with more bytes a token than this was not read whole.
MOST_BYTES = 256
#: A template of more tokens than this is none.
MOST_INTERCEPT = 50_000.0
#: Weight of the error so far when a new one is seen.
ERROR_DECAY = 0.95
#: A relative error counts as at most this.
MOST_ERROR = 10.0


class PromptLength:
    """A fit of tokens to bytes. `decay`: weight of what is known when a new prompt is seen (0.98: the last
    fifty prompts count).
    """

    __slots__ = ("_decay", "_error", "_s0", "_sx", "_sxx", "_sxy", "_sy", "intercept", "prior_slope", "slope")

    def __init__(self, bytes_per_token: float = 4.0, decay: float = 0.98) -> None:
        if bytes_per_token <= 0.0 or not 0.0 < decay <= 1.0:
            raise ConfigError(f"need bytes_per_token > 0 and decay in (0, 1], got {bytes_per_token}, {decay}")
        self._decay = decay
        self.prior_slope = 1.0 / bytes_per_token
        self.intercept = 0.0
        self.slope = self.prior_slope
        self._s0 = self._sx = self._sxx = self._sy = self._sxy = 0.0
        self._error: float | None = None

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that make up one token, beyond the intercept."""
        return 1.0 / self.slope

    @property
    def error(self) -> float | None:
        """Mean relative error of recent estimates, each made before its report; None before any."""
        return self._error

    def estimate(self, text_bytes: int) -> int:
        """Return the likely tokens of a prompt, at least 1."""
        return max(1, round(self.intercept + self.slope * text_bytes))

    def observe(self, text_bytes: int, tokens: object) -> None:
        """Learn from a prompt whose token count was reported; an empty prompt and an impossible count teach
        nothing.
        """
        if not isinstance(tokens, int) or isinstance(tokens, bool) or text_bytes <= 0:
            return
        if not max(1.0, text_bytes / MOST_BYTES) <= tokens <= MOST_INTERCEPT + MOST_SLOPE * text_bytes:
            return
        expected = self.estimate(text_bytes)
        error = min(MOST_ERROR, abs(expected - tokens) / tokens)
        self._error = error if self._error is None else ERROR_DECAY * self._error + (1 - ERROR_DECAY) * error
        noise = NOISE_TOKENS + NOISE_SHARE * max(expected, self.prior_slope * text_bytes)
        outlier = abs(expected - tokens) / (HUBER * noise)
        weight = 1.0 / (noise * noise) / max(1.0, outlier)
        keep, x, y = self._decay, float(text_bytes), float(tokens)
        self._s0 = keep * self._s0 + weight
        self._sx = keep * self._sx + weight * x
        self._sxx = keep * self._sxx + weight * x * x
        self._sy = keep * self._sy + weight * y
        self._sxy = keep * self._sxy + weight * x * y
        self._fit()

    def _fit(self) -> None:
        """Solve the two normal equations, the prior being two more reports."""
        of_intercept = 1.0 / PRIOR_INTERCEPT**2
        of_slope = 1.0 / (PRIOR_SLOPE * self.prior_slope) ** 2
        a, b, d = self._s0 + of_intercept, self._sx, self._sxx + of_slope
        e, f = self._sy, self._sxy + of_slope * self.prior_slope
        self.slope = min(max((a * f - b * e) / (a * d - b * b), LEAST_SLOPE), MOST_SLOPE)
        self.intercept = min(max((e - b * self.slope) / a, 0.0), MOST_INTERCEPT)
        if self.intercept == 0.0:
            self.slope = min(max(f / d, LEAST_SLOPE), MOST_SLOPE)
