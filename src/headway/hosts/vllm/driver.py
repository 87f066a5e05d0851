"""The driver of a vLLM scheduler, the only file here that touches the batch policy: ask, measure, learn,
tell.

Whatever goes wrong in here is counted, logged once, and leaves the step to vLLM: the engine is never taken
down by what only improves it.
"""

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging import Logger
from typing import Any

from headway.core.batch import BatchPolicy
from headway.core.batch.vllm_v1 import VllmV1
from headway.hosts.vllm.limits import AdapterLimit
from headway.hosts.vllm.recorder import Recorder
from headway.hosts.vllm.reports import Shown, Tally
from headway.hosts.vllm.settings import VllmSettings
from headway.hosts.vllm.slo import DISPATCH
from headway.hosts.vllm.steering import Applied, steer
from headway.hosts.vllm.steps import Steps
from headway.hosts.vllm.view import Adopter, View
from headway.hosts.vllm.waiting import WaitingAccount

__all__ = ["Driver"]

#: Steps in a row that planned prompts and ran none, after which vLLM has one step to itself: it may have
#: reasons that no view shows (encoder budgets, adapters, connectors).
_UNMET_STEPS = 8


class Driver:
    """Between one vLLM scheduler and one batch policy. Times are `time.monotonic()`.

    `recorder`: where steps are written down, if anywhere.
    """

    def __init__(
        self, scheduler: Any, settings: VllmSettings, rank: int, log: Logger, recorder: Recorder | None = None
    ) -> None:
        self.policy: BatchPolicy = settings.make_policy(random.Random(f"{settings.seed}/batch/{rank}"))
        self.tally = Tally()
        self._only_measures = isinstance(self.policy, VllmV1)
        self._scheduler = scheduler
        self._adopter = Adopter(settings.slo)
        self._account = WaitingAccount(scheduler, self._adopter)
        self._steps = Steps()
        self._recorder = recorder
        self._log = log
        self._logged = False
        self._planned = False  # prompts, in the step that is being scheduled
        self._unmet = 0
        self._leave_alone = False
        self._schedule_s = 0.0
        self._in_force: list[Applied | AdapterLimit] = []  # what is set in vLLM's scheduler for this step
        self._view: View | None = None  # of the present state, if it was looked at already
        self._came = False  # whether requests came since

    # The calls of a step, in order

    def before(self, *, throttled: bool) -> None:
        """Steer the coming step, or leave it to vLLM."""
        self._schedule_s = now = time.monotonic()
        self._planned = False
        scheduler = self._scheduler
        if self._only_measures or self.tally.fallback:
            return
        if throttled or self._leave_alone or scheduler.pause_state.value:
            self._leave_alone = False
        else:
            self._steer(now)
        if scheduler.lora_config is not None:
            with self.guarded():
                self._in_force.append(AdapterLimit(scheduler))

    def _steer(self, now: float) -> None:
        scheduler = self._scheduler
        with self.guarded():
            view, self._view = self._view, None
            if view is None:
                view = self._look(now)
            elif self._came:
                view.look_at_waiting(scheduler)
            if view.is_idle():
                return
            plan = self.policy.plan(view, now + self._left_s(now))
            steering = steer(plan, view, scheduler)
            self._planned = bool(plan.prefills)
            if steering is not None:
                self.tally.steered += 1
                self.tally.sat_out += len(steering.sit_out)
                self._in_force.append(Applied(scheduler, steering))

    def restore(self) -> None:
        """Take the steering back, whatever became of the step."""
        while self._in_force:
            with self.guarded():
                self._in_force.pop().undo()

    @property
    def may_have_caused(self) -> bool:
        """Whether a failure of vLLM's scheduler may come from steering: a step was steered before."""
        return self.tally.steered > 0 and not self.tally.fallback

    def fall_back(self) -> None:
        """Leave every further step to vLLM."""
        self.tally.fallback = 1
        self._view = None
        self._log.exception(
            "headway: vLLM's scheduler failed after its steps had been steered. FALLING BACK to vLLM's own "
            "scheduling until this engine is restarted (headway_fallback 1). Please report it"
        )

    def in_flight(self) -> dict[str, int]:
        """Return the tokens of each request in steps that have not ended."""
        return self._steps.tokens_under_way()

    def after(self, output: Any) -> None:
        """Take in what vLLM scheduled."""
        self._view = None
        with self.guarded():
            scheduler = self._scheduler
            self._account.took(output)
            now, speculated = time.monotonic(), scheduler.num_spec_tokens
            step = self._steps.begin(output, scheduler.requests, speculated, self._schedule_s, now)
            ran = step.prompt_tokens > 0
            self._unmet = self._unmet + 1 if self._planned and not ran else 0
            self._leave_alone = self._unmet >= _UNMET_STEPS or (self._planned and not step.new_tokens)
            if self._leave_alone:
                self.tally.left_alone += 1
                self._unmet = 0

    def ended(self, output: Any) -> tuple[int, float] | None:
        """Learn from a step that ended now; return its prompt tokens and duration, if it ran anything."""
        now = time.monotonic()
        self._view = None
        with self.guarded():
            found = self._steps.end(output, now)
            if found is None or not found[0].new_tokens:
                return None
            step, duration_s, host_gap_s = found
            if self._recorder is not None:
                self._recorder.note(step, duration_s, host_gap_s, now)
            self.policy.observe(step.lasted(duration_s), now)
            self.tally.count(step.prompt_tokens, step.decodes, duration_s)
            return step.prompt_tokens, duration_s
        return None

    # What the scheduler tells besides

    def left(self, finished: Iterable[str] = ()) -> None:
        """Note whether there is work to go on with, after requests left; `finished`: those withdrawn."""
        self._view = None
        for name in finished:
            self._account.discard(name)
        if not self._scheduler.has_unfinished_requests():
            self._steps.rest()

    def interrupted(self) -> None:
        """Note that queues changed, or the engine was paused, between steps."""
        self._view = None
        self._account.reset()
        self._steps.rest()

    def dispatch_of(self, inner: Any) -> int | None:
        """Return the number of the dispatch that brought a request; remember the request."""
        # The next piece of a streamed input comes as a request, of which vLLM takes what it needs.
        if self._scheduler.requests.get(inner.request_id) is inner:
            self._account.add(inner)
            self._came = True
        else:
            self._account.reset()
            self._view = None
        params = inner.sampling_params
        number = (params.extra_args or {}).get(DISPATCH) if params is not None else None
        return number if isinstance(number, int) and number > 0 else None

    def shown(self) -> Shown:
        """Say how the rank stands."""
        now = time.monotonic()
        scheduler = self._scheduler
        self.tally.slo_ignored = self._adopter.slo_ignored
        self.tally.unrecorded = self._recorder.lost if self._recorder else 0
        view = self._look(now)
        if not scheduler.num_spec_tokens:  # what is speculated comes later, and belongs in the view
            self._view, self._came = view, False
        running, waiting = scheduler.get_request_counts()
        queued = sum([work.todo_tokens for work in view.prefilling]) + self._account.queued_tokens()
        pool = scheduler.kv_cache_manager.block_pool
        return Shown(
            queued_tokens=queued,
            kv_blocks=max(pool.num_gpu_blocks - 1 - view.free_blocks, 0),  # one is vLLM's null block
            running=running,
            waiting=waiting,
            pab_tokens=self.policy.admission_budget(view, now),
        )

    def close(self) -> None:
        """Finish what is recorded."""
        if self._recorder is not None:
            self._recorder.close()

    def _look(self, now: float) -> View:
        told_s = self._steps.ended_s or now
        return View(self._scheduler, self._adopter, told_s, self._account.look)

    def _left_s(self, now: float) -> float:
        """Seconds until the step under way ends, where the next one is scheduled while it runs."""
        step = self._steps.latest
        believed = getattr(self.policy, "step_time", None)
        if step is None or believed is None:
            return 0.0
        whole_s: float = believed.predict(step.new_tokens, step.decodes, step.context_tokens, step.attention)
        return max(0.0, max(step.scheduled_s, self._steps.ended_s) + whole_s - now)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep a failure of ours from the engine."""
        try:
            yield
        except Exception:
            self.tally.failures += 1
            if not self._logged:
                self._logged = True
                self._log.exception(
                    "headway failed, and this step is vLLM's own. Further failures are only counted "
                    "(headway_failures_total). Please report it"
                )
