"""vLLM v1: every decode, then the prompts begun, then the waiting ones first come first, up to the token cap.

A baseline (algorithms.md §6). Decodes never wait, so they bank slack while prompts queue.
"""

from typing import ClassVar

from headway.core.batch.contract import BatchPolicy, BatchView, Plan, batch_policies
from headway.core.batch.fill import fill

__all__ = ["VllmV1"]


@batch_policies.register("vllm-v1")
class VllmV1(BatchPolicy):
    """Running requests first, `max_num_batched_tokens` as the only budget."""

    summary: ClassVar[str] = "all decodes, then prompts first come first, up to the engine's token cap"
    decodes_always_run: ClassVar[bool] = True

    def plan(self, view: BatchView, now: float) -> Plan:
        """Run every decode and fill the rest of the cap with prompts."""
        return fill(view, view.token_cap - len(view.decodes))
