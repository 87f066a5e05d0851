"""Triage, our own [+]: in overload first come first serves nobody in time, so serve those who can still
make it.

Rule 1. The step is `fair`'s, its deadline line anchored at the first token, and steps short enough for late
   decodes to catch up (`least_budget`). Beyond that only the order of prompts differs.
Rule 2. A prompt that would miss its TTFT target even if it came next is relegated: it is served with what the
   others leave, prompts begun first (they hold KV), then first come first.
Rule 3. The others come in order of arrival while all of them make it that way; under pressure shortest
   remaining first, less `aging_tokens_s` for each second waited, so that long prompts are not passed over
   for ever.
Rule 4. After `relegated_wait_s` a relegated prompt is served in turn again, ahead of the others, but such
   prompts get at most `relegated_share` of the prompt tokens: without the bound a lasting overload would
   put the lost ahead of everyone, and that is first come first again.
Rule 5. The first 256 prompts that can make it are put in order, the others come behind them first come first:
   the cost of a step does not grow with the queue.

Neither half of rule 2 and 3 works alone (algorithms.md §9).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import ClassVar, Literal

from headway.core.batch.contract import (
    BatchView,
    EngineRequest,
    Plan,
    batch_policies,
    may_have_arrived_by,
    open_prompts,
)
from headway.core.batch.fair import LOOKAHEAD, Fair, FairSettings
from headway.core.batch.fill import Prompt, first_come
from headway.core.registry import Rng
from headway.core.settings import setting

__all__ = ["Triage", "TriageSettings"]


@dataclass(frozen=True, slots=True)
class TriageSettings(FairSettings):
    """`fair`'s settings, the anchor moved, and how the order of prompts weighs length against waiting."""

    anchor: Literal["arrival", "first-token"] = setting(
        "first-token",
        "where the deadline line starts: arrival + TTFT target (paper), or the first token if sooner",
    )
    least_budget: float = setting(
        0.8,
        "least time budget of a step, of the TPOT target: under 1 a late decode catches up",
        unit="share",
        at_least=0.1,
        at_most=1.0,
    )
    aging_tokens_s: float = setting(
        2000.0, "tokens a prompt counts shorter for each second it waited", unit="tokens/s", at_least=0.0
    )
    relegated_wait_s: float = setting(
        30.0, "after this wait a relegated prompt is served in turn again", unit="s", at_least=0.0
    )
    relegated_share: float = setting(
        0.05,
        "most of the prompt tokens that go to prompts so served",
        unit="share",
        at_least=0.0,
        at_most=1.0,
    )


@batch_policies.register("triage")
class Triage(Fair):
    """`fair`, with prompts that can still make their TTFT before those that cannot."""

    Settings: ClassVar = TriageSettings
    settings: TriageSettings
    summary: ClassVar[str] = (
        "fair, and prompts that still make their TTFT first: shortest first under pressure"
    )

    def __init__(self, settings: TriageSettings, rng: Rng) -> None:
        super().__init__(settings, rng)
        # Tokens that prompts past `relegated_wait_s` may take ahead of the others.
        self._credit_tokens = 0.0
        self._ahead: EngineRequest | None = None

    def plan(self, view: BatchView, now: float) -> Plan:
        """Form the next step as `fair` does, and account for what went to the relegated (rule 4)."""
        self._ahead = None
        plan = super().plan(view, now)
        if plan.prefills:
            share = self.settings.relegated_share
            for work, chunk in plan.prefills:
                self._credit_tokens += chunk * share - (chunk if work is self._ahead else 0)
            self._credit_tokens = min(self._credit_tokens, share * view.token_cap)
        return plan

    def _order(self, view: BatchView, now: float, fixed_s: float, room_s: float) -> Iterator[Prompt]:
        if not self.step_time.trained("mixed"):
            yield from super()._order(view, now, fixed_s, room_s)
            return
        hopeful, pressure = self._hopeful(view, now, fixed_s, room_s)
        taken = {id(work) for work, _ in hopeful}
        ahead = self._overdue(view, taken, now)
        if ahead is not None:
            self._ahead = ahead[0]
            taken.add(id(ahead[0]))
            yield ahead
        if pressure:
            aging = self.settings.aging_tokens_s
            # Waiting makes every prompt shorter at one rate, so `now` drops out of the comparison.
            hopeful.sort(key=lambda prompt: prompt[0].todo_tokens + aging * prompt[0].request.arrival_s)
        yield from hopeful
        for prompt in first_come(view):
            if id(prompt[0]) not in taken:
                yield prompt

    def _hopeful(
        self, view: BatchView, now: float, fixed_s: float, room_s: float
    ) -> tuple[list[Prompt], bool]:
        """Return the prompts that can make their TTFT, and whether they must hurry (rules 2 and 3).

        Work of `s` seconds takes `s / room` steps, at least one, and each costs `fixed_s` beside it.
        """
        costs = self.step_time.coefficients("mixed")
        hopeful: list[Prompt] = []
        pressure, before_s = False, 0.0
        steps_per_s = 1.0 / max(room_s, 1e-9)
        waiting = zip(open_prompts(view, now), repeat(True))
        for work, begins in chain(zip(view.prefilling, repeat(False)), waiting):
            request = work.request
            left_s = request.arrival_s + request.slo.ttft_s - now - fixed_s
            if left_s < 0.0:  # spares the arithmetic
                continue
            work_s = costs.prefill_s(work.todo_tokens, work.context_tokens)
            if work_s + fixed_s * max(0.0, work_s * steps_per_s - 1.0) > left_s:
                continue
            before_s += work_s
            pressure = pressure or before_s + fixed_s * max(0.0, before_s * steps_per_s - 1.0) > left_s
            hopeful.append((work, begins))
            if len(hopeful) >= LOOKAHEAD:
                break
        return hopeful, pressure

    def _overdue(self, view: BatchView, hopeful: set[int], now: float) -> Prompt | None:
        """Return the first relegated prompt past its wait, if there is credit for it (rule 4)."""
        if self._credit_tokens <= 0.0:
            return None
        since_s = now - self.settings.relegated_wait_s
        sight = LOOKAHEAD if may_have_arrived_by(view, LOOKAHEAD, since_s) else 0
        for prompt in islice(first_come(view), len(view.prefilling) + sight):
            if prompt[0].request.arrival_s <= since_s and id(prompt[0]) not in hopeful:
                return prompt
        return None
