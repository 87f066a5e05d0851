"""FairBatching (arXiv 2510.14392): every token has a deadline; the tightest one bounds the step.

Rule 1. [P] Output token j is due at `arrival + ttft + j·tpot`. The line does not move: a token delivered
   early banks slack, a late one can be made good. [+] With `anchor=first-token` the line starts at the
   first token if that came before `arrival + ttft`: TPOT as users measure it.
Rule 2. [P; scope R] The time budget of a step is `max(least slack, least tpot)` over the running decodes.
   With none running nobody waits for the step to end: the engine's token cap is the only limit. [+] With
   `least_budget` under 1 it is `max(least slack, least_budget · least tpot)`: a decode that is a little late
   catches up, where steps of a whole TPOT would keep it as late as it is to its end.
Rule 3. [P] Three groups, each by slack: decodes whose slack is under `budget + least tpot` (urgent),
   prompts begun and then waiting ones, the other decodes. Added while the predicted time stays within the
   budget; the chunk of a prompt is what the budget leaves. A decode with slack that is left out keeps its
   KV and gets no token.
Rule 4. [R] Urgent decodes all run, even if they exceed the budget alone; the tightest decode is always
   urgent, so no step is empty.
Rule 5. [R] The token cap keeps a token for each decode with slack while decodes take at most half of it. So
   where no deadline binds, the step is vLLM v1's.
Rule 6. [+] Step times are learned from nothing (`StepTime`). Until the regime at hand was seen often
   enough, steps are stall-free with `learning_tokens` of prompt; afterwards no step beside decodes has more
   than twice the new tokens of the largest one measured, for what lies beyond was never seen.
Rule 7. [+] The margin takes at most half of the time that the urgent decodes leave: on an engine whose steps
   vary much it would take all of it, and prompts would starve for what is unlikely.
Rule 8. [+] Where decodes alone use up every budget, each ninth step has `learning_tokens` of prompt all the
   same: prompts must not starve.
Rule 9. [+] A TPOT target that cannot be met binds nothing, neither the budget of a step nor who sits it out:
   else one client's target would cost all others theirs. Out of reach is a target that no step is as short
   as, however few decodes it runs; one shorter than a step of all present decodes, where others ask for less;
   and one that such a step leaves less than a quarter more time for, if half of the decodes ask for less. A
   decode whose target is out of reach is served as if it asked for the tightest of the others. Where that is
   half of the decodes or more, steps have at most `learning_tokens` of prompt.
Rule 10. [+] The admission budget takes the median of the TTFT targets in sight, and no TPOT target that is
   out of reach: no single request makes the rank look full, or empty.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import ClassVar, Literal

from headway.core.batch.contract import (
    BatchPolicy,
    BatchView,
    EngineRequest,
    Plan,
    StepReport,
    batch_policies,
    by_deadline,
    in_order_of_deadline,
)
from headway.core.batch.deadlines import Tightness, TimeLeft, least_target, relaxed_decodes, sit_out
from headway.core.batch.fill import Prompt, fill
from headway.core.estimate.step_time import Coefficients, Regime, StepTime
from headway.core.registry import Rng
from headway.core.request import Slo
from headway.core.settings import Settings, setting

__all__ = ["LOOKAHEAD", "Fair", "FairSettings"]

#: Waiting prompts that are put in order of deadline; beyond, first come first. Bounds the cost of a step
#: however long the queue is: many times what one step can take.
LOOKAHEAD = 256
#: Waiting prompts whose TTFT targets count for the admission budget.
_SIGHT = 32
#: Steps without time for a prompt after which one is served all the same (rule 8).
_DRY_STEPS = 8
#: Of the time left, what a margin may take (rule 7).
_MOST_MARGIN = 0.5
#: The budget of a step that no deadline bounds: finite, so that its arithmetic stays so.
_UNBOUND_S = 1e6
_EVERY_DECODE = Plan()


@dataclass(frozen=True, slots=True)
class FairSettings(Settings):
    """What to hold against what is promised, and how to learn step times."""

    anchor: Literal["arrival", "first-token"] = setting(
        "arrival",
        "where the deadline line starts: arrival + TTFT target (paper), or the first token if sooner",
    )
    margin_quantile: float = setting(
        0.9, "share of steps that should end within their budget", unit="share", at_least=0.0, at_most=1.0
    )
    least_budget: float = setting(
        1.0,
        "least time budget of a step, of the TPOT target: under 1 a late decode catches up",
        unit="share",
        at_least=0.1,
        at_most=1.0,
    )
    forgetting: float = setting(
        0.99,
        "weight of past steps at each new one, in learning step times",
        unit="factor",
        at_least=0.5,
        at_most=1.0,
    )
    learning_tokens: int = setting(
        512, "prompt tokens beside decodes in a step while step times are unknown", unit="tokens", at_least=1
    )


@batch_policies.register("fair")
class Fair(BatchPolicy):
    """Slack of running decodes is spent on prompts, as far as every deadline allows."""

    Settings: ClassVar = FairSettings
    settings: FairSettings
    summary: ClassVar[str] = (
        "FairBatching: deadlines set the step's time budget; decodes with slack yield to prompts"
    )

    def __init__(self, settings: FairSettings, rng: Rng) -> None:
        super().__init__(settings, rng)
        self.step_time = StepTime(settings.forgetting, settings.margin_quantile)
        self._largest_tokens = 0
        self._dry_steps = 0  # in a row that had no time for the prompts that wait
        self._ttft_s = Slo().ttft_s

    def plan(self, view: BatchView, now: float) -> Plan:
        """Form the next step (rules 2 to 9)."""
        decodes = view.decodes
        prompts = bool(view.prefilling or view.waiting)
        if not decodes:
            return fill(view, view.token_cap, self._alone(view, now))
        if not self.step_time.trained("mixed" if prompts else "decode"):
            tokens = min(self.settings.learning_tokens, view.token_cap - len(decodes))
            return fill(view, tokens)
        tightness = self._tightness(view, now)
        if not prompts:
            return self._decodes_only(view, tightness)
        return self._mixed(view, now, tightness)

    def observe(self, step: StepReport, now: float) -> None:
        """Learn what a step costs."""
        self.step_time.observe(step)
        if step.new_tokens > step.decodes:
            self._largest_tokens = max(self._largest_tokens, step.new_tokens)

    def admission_budget(self, view: BatchView, now: float) -> int | None:
        """PAB (§5 [P concept; formula R]): prompt tokens this rank can still finish within the TTFT target H.

        `PAB = max(0, H − a·S − Σ need_i·(b + c·ctx_i) − T_queued) / b`, at most the free KV less what the
        queue will take. `need_i = max(0, ⌊(H − slack_i)/tpot_i⌋ + 1)` tokens fall due within H; they take at
        least S = max(1, max need_i) steps [R]. H is the median of the targets in sight (rule 10), else the
        last one known [R]. None until mixed steps are known.
        """
        if not self.step_time.trained("mixed"):
            return None
        costs = self.step_time.coefficients("mixed")
        horizon_s = self._ttft_s = self._median_ttft_s(view)
        queued_s, queued_tokens = _queued(view, costs, horizon_s)
        free_tokens = view.free_blocks * view.block_tokens - queued_tokens
        if queued_s >= horizon_s or free_tokens <= 0:
            return 0  # the decodes cannot change it, so they are not counted
        left_s = horizon_s - queued_s - self._reserved_s(view, now, horizon_s, costs)
        if left_s <= 0.0:
            return 0
        return free_tokens if left_s >= costs.b_s * free_tokens else int(left_s / costs.b_s + 1e-9)

    def _order(self, view: BatchView, now: float, fixed_s: float, room_s: float) -> Iterator[Prompt]:
        """Prompts in the order they are served: begun ones, then waiting ones, by TTFT deadline.

        For policies that derive: a step takes `fixed_s` whatever its prompts, and has `room_s` for them.
        """
        for work in in_order_of_deadline(view.prefilling):
            yield work, False
        for work in by_deadline(view, LOOKAHEAD):
            yield work, True
        for work in islice(view.waiting, LOOKAHEAD, None):
            yield work, True

    def _alone(self, view: BatchView, now: float) -> Iterator[Prompt]:
        costs = self.step_time.coefficients("mixed")
        return self._order(view, now, costs.a_s, costs.prefill_s(view.token_cap, 0))

    def _tightness(self, view: BatchView, now: float) -> Tightness:
        """Return what the decodes' deadlines demand of the step (rules 1, 2 and 9)."""
        decodes = view.decodes
        least_s, unmet = self._least_target(view)
        slacks = self._slacks(decodes, now, least_s)
        if not unmet:
            binding = slacks
        else:
            pairs = zip(slacks, decodes, strict=True)
            binding = [slack for slack, work in pairs if work.request.slo.tpot_s >= least_s]
        least_slack_s = min(binding, default=_UNBOUND_S)
        budget_s = max(least_slack_s, self.settings.least_budget * least_s)
        return Tightness(slacks, budget_s, least_s, 2 * unmet >= len(slacks))

    def _least_target(self, view: BatchView) -> tuple[float, int]:
        regime: Regime = "decode" if self.step_time.trained("decode") else "mixed"
        return least_target(view, self.step_time.coefficients(regime))

    def _slacks(self, decodes: Collection[EngineRequest], now: float, floor_s: float) -> list[float]:
        """Return the seconds until each decode's next token is due, in their order.

        Targets below `floor_s` count as `floor_s`.
        """
        from_first_token = self.settings.anchor == "first-token"
        slacks: list[float] = []
        for work in decodes:
            request = work.request
            slo = request.slo
            start_s = request.arrival_s + slo.ttft_s
            if from_first_token:
                first_s = work.first_token_s
                if first_s is not None and first_s < start_s:
                    start_s = first_s
            tpot_s = slo.tpot_s
            if tpot_s < floor_s:
                tpot_s = floor_s
            slacks.append(start_s + work.generated_tokens * tpot_s - now)
        return slacks

    def _decodes_only(self, view: BatchView, tightness: Tightness) -> Plan:
        costs = self.step_time.coefficients("decode")
        budget_s_net = tightness.budget_s / self.step_time.margin("decode")
        running = len(tightness.slacks)
        if running <= view.token_cap and costs.predict(running, view.decode_context_tokens) <= budget_s_net:
            return _EVERY_DECODE
        relaxed, relaxed_context = relaxed_decodes(view.decodes, tightness)
        urgent = running - len(relaxed)
        left_s = budget_s_net - costs.predict(urgent, view.decode_context_tokens - relaxed_context)
        return Plan(skipped=sit_out(relaxed, relaxed_context, costs, left_s, view.token_cap - urgent))

    def _mixed(self, view: BatchView, now: float, tightness: Tightness) -> Plan:
        costs = self.step_time.coefficients("mixed")
        budget_s = tightness.budget_s
        relaxed, relaxed_context = relaxed_decodes(view.decodes, tightness)
        urgent = len(tightness.slacks) - len(relaxed)
        fixed_s = costs.predict(urgent, view.decode_context_tokens - relaxed_context)
        net_s = max(budget_s / self.step_time.margin("mixed") - fixed_s, _MOST_MARGIN * (budget_s - fixed_s))
        time = TimeLeft(costs, net_s)
        plan = _EVERY_DECODE
        order = self._order(view, now, fixed_s, max(time.left_s, 0.0))
        has_time = time.left_s > 0.0
        tokens = self._prompt_tokens(view, urgent)
        few_tokens = min(tokens, self.settings.learning_tokens)
        if has_time:
            plan = fill(view, few_tokens if tightness.stall_free else tokens, order, allow=time.allow)
        elif self._dry_steps >= _DRY_STEPS:
            plan = fill(view, few_tokens, order)
        prefills = plan.prefills
        self._dry_steps = 0 if prefills else self._dry_steps + 1
        left_tokens = view.token_cap - urgent - sum(chunk for _, chunk in prefills)
        skipped = sit_out(relaxed, relaxed_context, costs, time.left_s, left_tokens)
        blocked = plan.blocked
        if blocked is not None and has_time:
            tokens = 0 if skipped else time.left_after(len(relaxed), relaxed_context, blocked[1])
            blocked = (blocked[0], tokens) if tokens else None
        return Plan(prefills, skipped, blocked=blocked)

    def _prompt_tokens(self, view: BatchView, urgent: int) -> int:
        """Prompt tokens the cap and what was measured allow (rules 5 and 6)."""
        running = len(view.decodes)
        kept = running if 2 * running <= view.token_cap else urgent
        return min(view.token_cap, 2 * self._largest_tokens) - kept

    def _median_ttft_s(self, view: BatchView) -> float:
        sight = chain(islice(view.waiting, _SIGHT), view.prefilling, view.decodes)
        targets = sorted([work.request.slo.ttft_s for work in sight])
        return targets[len(targets) // 2] if targets else self._ttft_s

    def _reserved_s(self, view: BatchView, now: float, horizon_s: float, costs: Coefficients) -> float:
        """`a·S + Σ need_i·(b + c·ctx_i)`: what the running decodes need of the horizon."""
        b_s, c_s = costs.b_s, costs.c_s
        steps, tokens_s = 1, 0.0
        decodes = view.decodes
        least_s = self._least_target(view)[0] if decodes else 0.0
        for work, slack_s in zip(decodes, self._slacks(decodes, now, least_s), strict=True):
            left_s = horizon_s - slack_s
            if left_s >= 0.0:
                need = int(left_s / max(work.request.slo.tpot_s, least_s)) + 1
                tokens_s += need * (b_s + c_s * work.context_tokens)
                if need > steps:
                    steps = need
        return costs.a_s * steps + tokens_s


def _queued(view: BatchView, costs: Coefficients, enough_s: float) -> tuple[float, int]:
    """Return the seconds and tokens of the prompts queued; counting stops where they alone take `enough_s`.

    Beyond the first 256 that wait, the others count as their mean.
    """
    seconds, tokens = 0.0, 0
    for work in view.prefilling:
        seconds += costs.prefill_s(work.todo_tokens, work.context_tokens)
        tokens += work.todo_tokens
    waiting_s, waiting_tokens, seen = 0.0, 0, 0
    for work in islice(view.waiting, LOOKAHEAD):
        if seconds + waiting_s >= enough_s:
            return seconds + waiting_s, tokens + waiting_tokens
        waiting_s += costs.prefill_s(work.todo_tokens, work.context_tokens)
        waiting_tokens += work.todo_tokens
        seen += 1
    share = len(view.waiting) / seen if seen == LOOKAHEAD else 1.0
    return seconds + share * waiting_s, tokens + int(share * waiting_tokens)
