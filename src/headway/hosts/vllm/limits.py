"""Keeps the limits that vLLM counts over the requests of one step, while running requests sit it out.

`schedule()` checks some limits against what it schedules in the step, and takes for granted that every
running request is part of it. A request that sits a step out still holds what it was given. Limits of this
kind in vLLM 0.30 to 0.32, and what protects each:

- LoRA adapters (`max_loras`): a request that sits out keeps its adapter, but vLLM does not count it, begins a
  request of another adapter, and asserts in the next step. `AdapterLimit` counts it.
- Encoder budgets and the encoder cache: a prompt begun that still has encoder inputs holds entries of the
  cache. Such a prompt never sits out (`steering.py`).
- KV and encoder connectors: a request that sits out looks like one that found no token in the budget, which
  connectors handle in any case.
- Seats (`max_num_seqs`, `max_num_active_seqs`), KV blocks, and blocks reserved for prompts under way: counted
  over all running requests, whether they are scheduled or not.
- Token and draft-slot budgets: counted anew in each step; steering only lowers them.
- Grammar bitmasks, dynamic speculation and prefill balancing: depend only on what the step runs.
"""

from typing import Any

__all__ = ["AdapterLimit", "StepAdapters", "last_token_under_way"]


class StepAdapters:
    """Stands in for the scheduler's `lora_config` during one step. The scheduler reads only `max_loras`."""

    __slots__ = ("max_loras",)

    def __init__(self, max_loras: int) -> None:
        self.max_loras = max_loras


def last_token_under_way(inner: Any) -> bool:
    """Return whether a step under way computes the request's last token: vLLM passes it over from then on."""
    under_way = inner.num_output_placeholders
    if not under_way:
        return False
    last: int = inner.num_prompt_tokens + inner.max_tokens
    return bool(inner.num_computed_tokens + 2 - under_way >= last)


class AdapterLimit:
    """Counts the adapters of running requests that sit the step out, from construction to `undo()`.

    Rule 1. An adapter all of whose running requests sit the step out takes one from the limit that vLLM sees,
            so that no request of another adapter begins in its place.
    Rule 2. If running requests hold more adapters than allowed, whatever the cause, those of the adapters
            beyond the limit sit the step out. The requests admitted first run.

    A request whose last token is under way holds nothing: it is gone before the next step is scheduled.
    """

    __slots__ = ("_config", "_eligible", "_scheduler")

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._config: Any = scheduler.lora_config
        self._eligible: list[tuple[Any, int]] = []
        if self._config is None:
            return
        step: int = scheduler.current_step + 1
        held: dict[int, bool] = {}  # adapter → whether a request of it may run in this step
        for inner in scheduler.running:
            lora = inner.lora_request
            if lora is not None and lora.lora_int_id > 0 and not last_token_under_way(inner):
                adapter = lora.lora_int_id
                held[adapter] = held.get(adapter, False) or inner.next_decode_eligible_step <= step
        if not held:
            return
        most: int = self._config.max_loras
        run = [adapter for adapter, may_run in held.items() if may_run]
        if len(run) > most:
            self._hold_back(set(run[most:]), step)
            run = run[:most]
        idle = len(held) - len(run)
        if idle:
            scheduler.lora_config = StepAdapters(max(most - idle, len(run)))

    def _hold_back(self, adapters: set[int], step: int) -> None:
        for inner in self._scheduler.running:
            lora = inner.lora_request
            if lora is not None and lora.lora_int_id in adapters:
                self._eligible.append((inner, inner.next_decode_eligible_step))
                inner.next_decode_eligible_step = max(inner.next_decode_eligible_step, step + 1)

    def undo(self) -> None:
        """Put back vLLM's own limit and who may run."""
        self._scheduler.lora_config = self._config
        for inner, step in self._eligible:
            inner.next_decode_eligible_step = step
