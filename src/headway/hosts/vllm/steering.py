"""Decides how a plan is brought about with the few hooks of vLLM's `schedule()`, which is never copied.

vLLM walks `running` in list order, then `waiting` from its front, and gives each request all the tokens it
can take until the step's budget is used up. So:

Rule 1. A plan that takes all that vLLM would take, in vLLM's order, changes nothing: the step is vLLM's own.
Rule 2. Otherwise the budget (`max_num_scheduled_tokens`) is the sum of what is planned; decodes go to the
        front of `running`, the planned prompts behind them in the order of the plan, and the planned waiting
        requests to the front of `waiting` (not under the priority policy: vLLM's order of priorities stands,
        and the plan says only how much).
Rule 3. A decode that is to sit out, and a prompt begun that is not planned, are made ineligible for this one
        step (`next_decode_eligible_step`). They keep their KV. A prompt begun that has encoder inputs
        (images, audio) never sits out: it holds entries of the encoder cache (`limits.py`).
Rule 4. vLLM serves prompts begun before waiting ones, and cuts only the last. Where the plan cuts a prompt
        begun and has waiting ones beside it, the cut is made with `long_prefill_token_threshold`, which caps
        every prompt of the step, if no other would feel it. Else the prompt sits this step out: the tokens
        that the plan had left over for it are lost, the order is kept.
Rule 5. A prompt that only KV blocks keep out of the plan comes behind the planned ones, with the tokens the
        step has left: vLLM begins it if its prefix cache holds so much of it that the blocks do.
Rule 6. Where prompts must not be cut (`enable_chunked_prefill` off), order and sitting out are all that is
        done: a budget below the next prompt's length would keep it out for ever.

Approximate by nature: what the prefix cache holds of a waiting prompt, what LoRA, encoder budgets, connectors
or a grammar keep vLLM from starting, and preemption. The tokens freed or not wanted go to the next in order.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from headway.core.batch import Plan
from headway.hosts.vllm.queueing import Moved
from headway.hosts.vllm.view import View, comes_from_elsewhere

__all__ = ["Applied", "Steering", "steer"]

#: How far from the front requests are looked for whose KV is elsewhere.
_LOOKAHEAD = 64


@dataclass(slots=True)
class Steering:
    """What to set for one step: vLLM's requests, in the order they are to be looked at.

    `budget`, `threshold`: tokens; None leaves vLLM's. `prompts`: those of `running`, to come last there.
    """

    budget: int | None = None
    threshold: int | None = None
    prompts: list[Any] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)
    sit_out: list[Any] = field(default_factory=list)


def steer(plan: Plan, view: View, scheduler: Any) -> Steering | None:
    """Return what to set for the plan; None where vLLM's own schedule is the plan (rule 1)."""
    skipped = {id(work) for work in (plan.skipped if plan.decode else view.decodes)}
    if not skipped and _takes_all(plan, view):
        return None
    budget = sum([work.step_tokens for work in view.decodes if id(work) not in skipped])
    budget += sum([chunk for _, chunk in plan.prefills])
    if plan.blocked is not None:
        budget += plan.blocked[1]
    if not budget:
        return None  # a plan of nothing: vLLM knows better
    steering = Steering(budget + view.ahead_tokens)
    running = zip(view.decodes, view.decodes_running, strict=True)
    steering.sit_out = [inner for work, inner in running if id(work) in skipped]
    chunked = scheduler.scheduler_config.enable_chunked_prefill
    _order_prompts(steering, plan, view, scheduler, may_cut=chunked)
    _fetch_from_elsewhere(steering, scheduler)
    if not chunked:
        steering.budget = None
    return steering


class Applied:
    """A steering in force, from its construction to `undo()`, which puts everything back."""

    __slots__ = ("_budget", "_eligible", "_running", "_scheduler", "_threshold", "_waiting")

    def __init__(self, scheduler: Any, steering: Steering) -> None:
        config = scheduler.scheduler_config
        self._scheduler = scheduler
        self._budget: int = scheduler.max_num_scheduled_tokens
        self._threshold: int = config.long_prefill_token_threshold
        self._eligible = [(inner, inner.next_decode_eligible_step) for inner in steering.sit_out]
        self._running = list(scheduler.running) if steering.prompts else None
        self._waiting = Moved(scheduler.waiting)
        try:
            self._apply(scheduler, steering)
        except BaseException:
            self.undo()
            raise

    def _apply(self, scheduler: Any, steering: Steering) -> None:
        self._waiting.to_front(steering.waiting)
        if self._running is not None:
            running = {id(inner) for inner in self._running}
            last = [inner for inner in steering.prompts if id(inner) in running]
            moved = {id(inner) for inner in last}
            scheduler.running[:] = [inner for inner in self._running if id(inner) not in moved] + last
        if steering.budget is not None:
            scheduler.max_num_scheduled_tokens = min(self._budget, steering.budget)
        if steering.threshold is not None:
            scheduler.scheduler_config.long_prefill_token_threshold = steering.threshold
        for inner, step in self._eligible:  # `schedule()` counts the step before it compares
            inner.next_decode_eligible_step = max(step, scheduler.current_step + 2)

    def undo(self) -> None:
        """Put back what was changed, but for what vLLM did meanwhile."""
        scheduler = self._scheduler
        scheduler.max_num_scheduled_tokens = self._budget
        scheduler.scheduler_config.long_prefill_token_threshold = self._threshold
        for inner, step in self._eligible:
            inner.next_decode_eligible_step = step
        if self._running is not None:
            _put_back_running(scheduler, self._running)
        self._waiting.undo()


def _takes_all(plan: Plan, view: View) -> bool:
    """Whether vLLM, left alone, would do what the plan says."""
    prefills = plan.prefills
    whole = all(chunk >= work.todo_tokens for work, chunk in prefills)
    own = list(islice(chain(view.prefilling, view.waiting), len(prefills) + 1))
    if whole and len(own) <= len(prefills):
        return True  # every prompt there is, all of it
    if any(work is not other for (work, _), other in zip(prefills, own, strict=False)):
        return False
    begins = len(prefills) - len(view.prefilling)
    if whole and begins >= view.free_seats and begins >= 0:
        return True
    tokens = len(view.decodes) + sum([chunk for _, chunk in prefills])
    if plan.blocked is not None and plan.blocked[0] is own[-1]:
        tokens += plan.blocked[1]
    return tokens >= view.token_cap


def _order_prompts(steering: Steering, plan: Plan, view: View, scheduler: Any, *, may_cut: bool) -> None:
    """Put the prompts in order; hold back those begun that are not planned, or cannot be cut (rules 2 to
    4).
    """
    inners = {id(work): inner for work, inner in zip(view.prefilling, view.prompts_running, strict=True)}
    begun = [(work, chunk) for work, chunk in plan.prefills if id(work) in inners]
    waiting = [(work, chunk) for work, chunk in plan.prefills if id(work) not in inners]
    run = []
    for place, (work, chunk) in enumerate(begun):
        is_last = place == len(begun) - 1 and not waiting
        if (
            chunk < work.todo_tokens
            and may_cut
            and not is_last
            and not _cap(steering, plan, chunk, scheduler)
        ):
            assert steering.budget is not None
            steering.budget -= chunk
            continue
        run.append(inners.pop(id(work)))
    held = list(inners.values())
    steering.prompts = run + held
    steering.sit_out += [inner for inner in held if not inner.has_encoder_inputs]
    if isinstance(scheduler.waiting, deque):
        requests = scheduler.requests
        blocked = [] if plan.blocked is None else [plan.blocked]
        steering.waiting = [requests[work.request.id] for work, _ in waiting + blocked]


def _cap(steering: Steering, plan: Plan, chunk: int, scheduler: Any) -> bool:
    """Cap every prompt of the step at `chunk`, if only the one it is meant for feels it."""
    config = scheduler.scheduler_config
    own: int = config.long_prefill_token_threshold
    if getattr(config, "long_prefill_token_threshold_adaptive", False) or 0 < own < chunk:
        return False
    if any(other > chunk for _, other in plan.prefills):
        return False
    steering.threshold = chunk
    return True


def _fetch_from_elsewhere(steering: Steering, scheduler: Any) -> None:
    """Let vLLM start the transfers of requests whose KV is elsewhere: they take no tokens, and no plan should
    hold them up. But vLLM looks at waiting requests only while a token is left.
    """
    if scheduler.connector is None or not isinstance(scheduler.waiting, deque):
        return
    coming = [inner for inner in islice(scheduler.waiting, _LOOKAHEAD) if comes_from_elsewhere(inner)]
    if coming and steering.budget is not None:
        steering.budget += 1
        planned = {id(inner) for inner in coming}
        steering.waiting = coming + [inner for inner in steering.waiting if id(inner) not in planned]


def _put_back_running(scheduler: Any, order: list[Any]) -> None:
    """Restore the order of admission: the last is who vLLM preempts first."""
    running = scheduler.running
    still = {id(inner) for inner in running}
    known = {id(inner) for inner in order}
    new = [inner for inner in running if id(inner) not in known]
    running[:] = [inner for inner in order if id(inner) in still] + new
