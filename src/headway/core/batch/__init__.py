"""Batch policies: what runs in the next step of one rank. Importing this registers them all."""

from headway.core.batch import fair, prefill_first, stall_free, triage, vllm_v1
from headway.core.batch.contract import (
    BatchPolicy,
    BatchView,
    EngineRequest,
    Plan,
    StepReport,
    batch_policies,
)

__all__ = [
    "BatchPolicy",
    "BatchView",
    "EngineRequest",
    "Plan",
    "StepReport",
    "batch_policies",
    "fair",
    "prefill_first",
    "stall_free",
    "triage",
    "vllm_v1",
]
