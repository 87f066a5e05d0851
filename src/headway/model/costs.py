"""Decides how long a forward pass takes, from what each rank runs in it.

Two forms, fitted to measured operator tables (docs/engine-model.md has source and errors):

    lockstep   t = max over ranks of local(rank) + sync(mean or max over ranks of new tokens)
    dense      t = a + b0·min(N, n0) + b1·max(N − n0, 0) + d·max(D − d0, 0) + c·K + q·Q, largest over ranks

`N` new tokens of a rank (prompt tokens and decodes), `D` its decodes, `K` context tokens its *decodes* attend
to (a prompt's own context is in Q), `Q = Σ chunk·(context + chunk/2)` over its prompts. Seconds, tokens and
tokens² throughout.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from headway.core.errors import ConfigError

__all__ = ["Costs", "DenseCosts", "LockstepCosts", "PhaseCosts"]


def _check(owner: object, where: str) -> None:
    for field in fields(owner):  # type: ignore[arg-type]
        value = getattr(owner, field.name)
        if isinstance(value, int | float) and not 0.0 <= value < math.inf:
            raise ConfigError(f"{where} {field.name} must be a number of at least 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class PhaseCosts:
    """Coefficients of one kind of pass: the rank's own part, then what all ranks do together.

    local = `fixed_s + token_s·N + context_token_s·K + attention_s·Q`; sync = `sync_fixed_s + sync_token_s·N`.
    Raises ConfigError for a negative or infinite one.
    """

    fixed_s: float
    token_s: float
    context_token_s: float = 0.0
    attention_s: float = 0.0
    sync_fixed_s: float = 0.0
    sync_token_s: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "costs")

    def local_s(self, tokens: float, context_tokens: float, attention: float) -> float:
        """Return the rank's own time."""
        return (
            self.fixed_s
            + self.token_s * tokens
            + self.context_token_s * context_tokens
            + self.attention_s * attention
        )


@dataclass(frozen=True, slots=True)
class LockstepCosts:
    """DP attention with expert parallelism: ranks wait for each other at every layer's all-to-all.

    `mixed` is for passes with prompts and decodes; None: as prefill, plus the decode's context term (an
    assumption: no mixed pass was measured). `sync_over`: experts are spread over all ranks, so their work
    follows the mean number of tokens; "max" is the pessimist's choice.
    """

    prefill: PhaseCosts
    decode: PhaseCosts
    mixed: PhaseCosts | None = None
    sync_over: Literal["mean", "max"] = "mean"
    form: Literal["lockstep"] = "lockstep"

    def __post_init__(self) -> None:
        if self.mixed is None:
            own = replace(self.prefill, context_token_s=self.decode.context_token_s)
            object.__setattr__(self, "mixed", own)

    def decode_step_s(self, decodes: Sequence[float], contexts: Sequence[float]) -> float:
        """Return the time of a pass without prompts. Arguments of shape (ranks,)."""
        cost = self.decode
        per_token, per_context = cost.token_s, cost.context_token_s
        slowest = max([n * per_token + k * per_context for n, k in zip(decodes, contexts, strict=True)])
        tokens = sum(decodes) / len(decodes) if self.sync_over == "mean" else max(decodes)
        return cost.fixed_s + slowest + cost.sync_fixed_s + cost.sync_token_s * tokens

    def step_s(
        self,
        chunks: Sequence[float],
        decodes: Sequence[float],
        contexts: Sequence[float],
        attentions: Sequence[float],
    ) -> float:
        """Return the time of any pass. Arguments of shape (ranks,): prompt tokens, decodes, K, Q."""
        local = max(
            self._phase(chunk, n).local_s(chunk + n, k, q)
            for chunk, n, k, q in zip(chunks, decodes, contexts, attentions, strict=True)
        )
        tokens = [chunk + n for chunk, n in zip(chunks, decodes, strict=True)]
        shared = self._phase(sum(chunks), sum(decodes))
        share = sum(tokens) / len(tokens) if self.sync_over == "mean" else max(tokens)
        return local + shared.sync_fixed_s + shared.sync_token_s * share

    def _phase(self, chunk_tokens: float, decodes: float) -> PhaseCosts:
        if not chunk_tokens:
            return self.decode
        return self.mixed if decodes and self.mixed else self.prefill


@dataclass(frozen=True, slots=True)
class DenseCosts:
    """One model per rank, no traffic between ranks: prefill, decode and mixed passes on one curve.

    Below `knee_tokens` a pass is bound by reading the weights, beyond by computing. The output layer runs for
    tokens that are sampled only, so it has a knee of its own: a decode beyond `decode_knee` costs `decode_s`
    more than its token; prompts' last tokens are not counted. Raises ConfigError for a negative or infinite
    coefficient.
    """

    fixed_s: float
    knee_tokens: int
    token_s: float
    beyond_knee_token_s: float
    context_token_s: float
    attention_s: float
    decode_knee: int = 0
    decode_s: float = 0.0
    form: Literal["dense"] = "dense"

    def __post_init__(self) -> None:
        _check(self, "costs")

    def decode_step_s(self, decodes: Sequence[float], contexts: Sequence[float]) -> float:
        """Return the time of a pass without prompts. Arguments of shape (ranks,)."""
        if len(decodes) == 1:  # the common case: independent ranks
            return self._rank_s(decodes[0], decodes[0], contexts[0], 0.0)
        return max([self._rank_s(n, n, k, 0.0) for n, k in zip(decodes, contexts, strict=True)])

    def step_s(
        self,
        chunks: Sequence[float],
        decodes: Sequence[float],
        contexts: Sequence[float],
        attentions: Sequence[float],
    ) -> float:
        """Return the time of any pass. Arguments of shape (ranks,): prompt tokens, decodes, K, Q."""
        return max(
            self._rank_s(chunk + n, n, k, q)
            for chunk, n, k, q in zip(chunks, decodes, contexts, attentions, strict=True)
        )

    def _rank_s(self, tokens: float, decodes: float, context_tokens: float, attention: float) -> float:
        knee = self.knee_tokens
        if tokens <= knee:
            compute = self.token_s * tokens
        else:
            compute = self.token_s * knee + self.beyond_knee_token_s * (tokens - knee)
        if decodes > self.decode_knee:
            compute += self.decode_s * (decodes - self.decode_knee)
        return self.fixed_s + compute + self.context_token_s * context_tokens + self.attention_s * attention


Costs = LockstepCosts | DenseCosts
