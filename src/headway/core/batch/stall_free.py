"""Sarathi-Serve's stall-free batching (arXiv 2403.02310): vLLM v1's order under a smaller, fixed token
budget.

[P] All decodes, then the prompts begun, then new ones, chunked to fill one token budget: 512 for strict
targets, 2048 for relaxed ones. The budget bounds how long a chunk holds up the decodes.
"""

from dataclasses import dataclass
from typing import ClassVar

from headway.core.batch.contract import BatchPolicy, BatchView, Plan, batch_policies
from headway.core.batch.fill import fill
from headway.core.registry import Rng
from headway.core.settings import Settings, setting

__all__ = ["StallFree", "StallFreeSettings"]


@dataclass(frozen=True, slots=True)
class StallFreeSettings(Settings):
    """One number, chosen offline from the step time a TPOT target allows."""

    token_budget: int = setting(
        512,
        "most new tokens in a step, decodes included (512 strict, 2048 relaxed)",
        unit="tokens",
        at_least=1,
    )


@batch_policies.register("stall-free")
class StallFree(BatchPolicy):
    """Decodes never stall: chunks of prompts take what the token budget leaves."""

    Settings: ClassVar = StallFreeSettings
    settings: StallFreeSettings
    summary: ClassVar[str] = "Sarathi: all decodes, then chunks of prompts, under one token budget"
    decodes_always_run: ClassVar[bool] = True

    def __init__(self, settings: StallFreeSettings, rng: Rng) -> None:
        super().__init__(settings, rng)

    def plan(self, view: BatchView, now: float) -> Plan:
        """Run every decode and fill the rest of the budget with prompts."""
        budget = min(self.settings.token_budget, view.token_cap)
        return fill(view, budget - len(view.decodes))
