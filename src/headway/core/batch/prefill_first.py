"""Prefill first (Orca, vLLM v0): waiting prompts, whole, before any decode.

A baseline (algorithms.md §6). Best TTFT at low load; each burst of prompts stalls every decode.
"""

from typing import ClassVar

from headway.core.batch.contract import BatchPolicy, BatchView, Plan, batch_policies
from headway.core.batch.fill import fill

__all__ = ["PrefillFirst"]


@batch_policies.register("prefill-first")
class PrefillFirst(BatchPolicy):
    """A step is either whole prompts, up to the token cap, or every decode."""

    summary: ClassVar[str] = "whole prompts up to the token cap; decodes run only in steps without a prompt"
    decodes_always_run: ClassVar[bool] = True  # with no prompt there is nothing to come first

    def plan(self, view: BatchView, now: float) -> Plan:
        """Run the prompts that fit whole; without any, the decodes. A prompt over the cap takes several
        steps."""
        plan = fill(view, view.token_cap, whole=True)
        return Plan(plan.prefills, decode=not plan.prefills, blocked=plan.blocked)
