"""Measures the steps of an engine: what each computed, and how long it took.

Rule 1. A step lasts from the end of the one before to its own end, if there was work all along: what the host
        does between steps is part of what a token waits for. After a pause it lasts from `schedule()` on.
Rule 2. With asynchronous scheduling the next step is scheduled while one runs: by rule 1 it still lasts from
        end to end. Steps end in the order in which they were scheduled.
Rule 3. A decode counts as one new token however many were speculated for it: that is how plans count it.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from headway.core.batch import StepReport

__all__ = ["Step", "Steps"]


@dataclass(slots=True)
class Step:
    """A step on its way. `scheduled_s`, `formed_s`: when `schedule()` began and ended. `prompt_tokens`:
    computed of prompts; `prompt_context_tokens`: their part of the context; the rest as in `StepReport`.
    """

    output: Any
    scheduled_s: float
    formed_s: float
    prompt_tokens: int = 0
    decodes: int = 0
    context_tokens: int = 0
    prompt_context_tokens: int = 0
    attention: float = 0.0

    @property
    def new_tokens(self) -> int:
        """New tokens, as plans count them."""
        return self.prompt_tokens + self.decodes

    def lasted(self, duration_s: float) -> StepReport:
        """Return what there is to learn from it."""
        return StepReport(self.new_tokens, self.decodes, self.context_tokens, self.attention, duration_s)


class Steps:
    """The steps under way, and when the last one ended."""

    def __init__(self) -> None:
        self.ended_s = 0.0
        self._under_way: deque[Step] = deque()
        self._worked_on = False  # since the last one ended there was work all along

    @property
    def latest(self) -> Step | None:
        """The step scheduled last, if it is still under way."""
        return self._under_way[-1] if self._under_way else None

    def begin(
        self, output: Any, requests: dict[str, Any], speculated: int, scheduled_s: float, now: float
    ) -> Step:
        """Note a step that vLLM has just scheduled; `scheduled_s`: when it began to. `speculated`: tokens a
        decode.
        """
        step = Step(output, scheduled_s, now)
        most = 1 + speculated
        for request_id, tokens in output.num_scheduled_tokens.items():
            inner = requests[request_id]
            context = inner.num_computed_tokens - tokens  # vLLM has counted the step's tokens already
            step.context_tokens += context
            if tokens <= most and context >= inner.num_prompt_tokens:
                step.decodes += 1
            else:
                step.prompt_tokens += tokens
                step.prompt_context_tokens += context
                step.attention += tokens * (context + tokens / 2)
        self._under_way.append(step)
        return step

    def end(self, output: Any, now: float) -> tuple[Step, float, float] | None:
        """Return the step that ended, its duration, and how much of that was the host's before the step was
        formed, in s; None if it is unknown.
        """
        while self._under_way:
            step = self._under_way.popleft()
            if step.output is output:
                begun_s = self.ended_s if self._worked_on else max(self.ended_s, step.scheduled_s)
                self.ended_s, self._worked_on = now, True
                return step, now - begun_s, max(0.0, step.formed_s - begun_s)
        self.ended_s = now
        return None

    def tokens_under_way(self) -> dict[str, int]:
        """Return the tokens of each request in the steps that have not ended."""
        tokens: dict[str, int] = {}
        for step in self._under_way:
            for request_id, count in step.output.num_scheduled_tokens.items():
                tokens[request_id] = tokens.get(request_id, 0) + count
        return tokens

    def rest(self) -> None:
        """Note that the engine stands still: it has nothing to go on with, or it was told to."""
        self._worked_on = False
