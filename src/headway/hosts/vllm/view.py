"""Shows the state of vLLM's scheduler to a batch policy (`core.batch.contract.BatchView`).

What of vLLM's state means what:

- A running request whose next token is all it lacks is a decode, whether speculated tokens come with it or
  not (`step_tokens` counts them). Any other running request is a prompt begun, a preempted one that computes
  its context again included.
- A running request that can get nothing in this step is left out: its tokens are under way (asynchronous
  scheduling, pipelines), its last one is, or vLLM spaces its decodes.
- Waiting are vLLM's waiting requests but for those it would pass over now: KV under way from elsewhere, a
  streamed input that waits for more. One whose grammar is still compiled is shown; vLLM passes over it.
- A prompt whose KV comes from elsewhere counts one token to compute. What the prefix cache holds of a waiting
  prompt is not known before vLLM begins it: it counts in full, and the tokens planned for it that it does not
  need go to the next one.
- Times are those of this process's monotonic clock; vLLM stamps arrivals with the wall clock of its front
  end.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from headway.core.batch import EngineRequest
from headway.core.errors import ConfigError
from headway.core.request import Request, Slo
from headway.hosts.vllm.slo import slo_of

__all__ = [
    "Adopter",
    "View",
    "Work",
    "comes_from_elsewhere",
    "is_blocked",
    "second_queue",
    "todo_tokens",
]

#: Statuses of vLLM's waiting requests that nothing can be done about yet.
_BLOCKED = frozenset({"WAITING_FOR_REMOTE_KVS", "WAITING_FOR_STREAMING_REQ"})
#: A front end's clock may be off, but no request is believed to have waited longer than this before it came.
_MOST_WAITED_S = 3600.0


class Work:
    """What is remembered of a vLLM request. It rides on the request and does not point back at it.

    `step_tokens`: tokens its next decode takes, speculated ones included. `arrived_s`: by vLLM's wall clock.
    """

    __slots__ = (
        "arrived_s",
        "context_tokens",
        "first_token_s",
        "generated_tokens",
        "request",
        "step_tokens",
        "todo_tokens",
    )

    def __init__(self, request: Request, arrived_s: float) -> None:
        self.request = request
        self.arrived_s = arrived_s
        self.todo_tokens = request.prompt_tokens
        self.context_tokens = 0
        self.generated_tokens = 0
        self.first_token_s: float | None = None
        self.step_tokens = 1


class Adopter:
    """Makes the `Work` of requests. `slo_ignored` counts targets that were nonsense and gave way to the
    default.
    """

    def __init__(self, default: Slo) -> None:
        self.slo_ignored = 0
        self._default = default

    def work_of(self, inner: Any) -> Work:
        """Return what is remembered of a request, from its first sight on."""
        work: Work | None = getattr(inner, "headway", None)
        # Where the input is streamed, its next piece makes a new request of it: another arrival and prompt.
        if work is None or work.arrived_s != inner.arrival_time:
            work = inner.headway = Work(self._request(inner), inner.arrival_time)
        return work

    def show(self, inners: Iterable[Any]) -> list[Work]:
        """Return what is remembered of these waiting requests, brought up to date, without the blocked ones.

        One loop without calls: a step looks at hundreds of them.
        """
        works: list[Work] = []
        for inner in inners:
            if inner.status._name_ in _BLOCKED:
                continue
            work: Work | None = getattr(inner, "headway", None)
            if work is None or work.arrived_s != inner.arrival_time:
                work = self.work_of(inner)
            if inner.num_preemptions or inner.num_computed_tokens or inner.kv_transfer_params:
                work.context_tokens = inner.num_computed_tokens
                work.todo_tokens = todo_tokens(inner)
                work.generated_tokens = inner.num_output_tokens
            works.append(work)
        return works

    def _request(self, inner: Any) -> Request:
        params = inner.sampling_params
        try:
            slo = slo_of(params.extra_args if params is not None else None, self._default)
        except ConfigError:
            slo = self._default
            self.slo_ignored += 1
        waited_s = min(max(time.time() - inner.arrival_time, 0.0), _MOST_WAITED_S)
        return Request(
            inner.request_id,
            time.monotonic() - waited_s,
            max(inner.num_prompt_tokens, 1),
            slo,
            inner.priority,
            inner.max_tokens,
        )


class View:
    """The state before a step. Beside the contract: what bringing a plan about needs to know.

    `prompts_running`, `decodes_running`: vLLM's requests of `prefilling` and `decodes`, in the same order.
    `ahead_tokens`: tokens that vLLM gives to requests whose KV came from elsewhere, whatever is planned. The
    function `waiting` shows vLLM's queue behind requests that vLLM looks at first.
    """

    __slots__ = (
        "_look",
        "ahead_tokens",
        "block_tokens",
        "decode_context_tokens",
        "decodes",
        "decodes_running",
        "free_blocks",
        "free_seats",
        "prefilling",
        "prompts_running",
        "token_cap",
        "waiting",
    )

    def __init__(
        self,
        scheduler: Any,
        adopter: Adopter,
        told_s: float,
        waiting: Callable[[list[Any]], Sequence[EngineRequest]],
    ) -> None:
        config = scheduler.scheduler_config
        seats: int = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
        self.free_seats = seats - len(scheduler.running) - scheduler.num_waiting_for_streaming_input
        self.free_blocks: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        self.block_tokens: int = scheduler.block_size
        self.token_cap: int = min(scheduler.max_num_scheduled_tokens, config.max_num_batched_tokens)
        self.prefilling: list[Work] = []
        self.decodes: list[Work] = []
        self.prompts_running: list[Any] = []
        self.decodes_running: list[Any] = []
        self.decode_context_tokens = 0
        self._look_at_running(scheduler, adopter, told_s)
        self._look = waiting
        self.look_at_waiting(scheduler)

    def look_at_waiting(self, scheduler: Any) -> None:
        """Show what waits now. What runs, and the blocks, have to be those of before."""
        self.ahead_tokens, ahead = _ahead(scheduler)
        self.waiting = self._look(ahead)

    def _look_at_running(self, scheduler: Any, adopter: Adopter, told_s: float) -> None:
        step = scheduler.current_step + 1
        context = 0
        for inner in scheduler.running:
            computed = inner.num_computed_tokens
            under_way = inner.num_output_placeholders
            left = inner.num_tokens + under_way - computed
            if left <= 0 or step < inner.next_decode_eligible_step:
                continue
            if under_way and computed + 2 - under_way >= inner.num_prompt_tokens + inner.max_tokens:
                continue
            work = adopter.work_of(inner)
            generated = inner.num_output_tokens
            if generated and work.first_token_s is None:
                work.first_token_s = told_s
            work.context_tokens = computed
            work.todo_tokens = left
            if left > 1:
                work.generated_tokens = generated
                self.prefilling.append(work)
                self.prompts_running.append(inner)
                continue
            # The token of the step under way will be there when the one that is planned begins.
            work.generated_tokens = generated + 1 if under_way else generated
            speculated = inner.spec_token_ids
            work.step_tokens = 1 + len(speculated) if speculated else 1
            self.token_cap -= work.step_tokens - 1
            context += computed
            self.decodes.append(work)
            self.decodes_running.append(inner)
        self.decode_context_tokens = context

    def is_idle(self) -> bool:
        """Whether there is nothing to plan."""
        return not (self.decodes or self.prefilling or self.waiting)


def _ahead(scheduler: Any) -> tuple[int, list[Any]]:
    """Return tokens that go to requests whose KV is here already, and the requests vLLM looks at before the
    waiting ones.
    """
    queue = second_queue(scheduler)
    if not queue:
        return 0, []
    tokens, others = 0, []
    arrived = scheduler.finished_recving_kv_req_ids
    for inner in queue:
        if inner.status._name_ == "WAITING_FOR_REMOTE_KVS":
            # With speculation vLLM begins it with a full row of drafts, or not at all.
            tokens += 1 + scheduler.num_spec_tokens if inner.request_id in arrived else 0
        elif inner.num_computed_tokens > 0:
            tokens += max(inner.num_tokens - inner.num_computed_tokens, 1)
        else:
            others.append(inner)
    return tokens, others


def second_queue(scheduler: Any) -> Collection[Any]:
    """Return vLLM's other waiting queue: since 0.31 those that hold KV; before, all passed over once."""
    queue = getattr(scheduler, "kv_holding_waiting", None)
    if queue is None:
        queue = scheduler.skipped_waiting
    found: Collection[Any] = getattr(queue, "_heap", queue)
    return found


def is_blocked(inner: Any) -> bool:
    """Return whether nothing can be done yet about a waiting request."""
    return inner.status._name_ in _BLOCKED


def todo_tokens(inner: Any) -> int:
    """Return the tokens to compute of a waiting request before its next output token."""
    if comes_from_elsewhere(inner):
        return 1
    left: int = inner.num_tokens - inner.num_computed_tokens
    return max(left, 1)


def comes_from_elsewhere(inner: Any) -> bool:
    """Whether the KV of its prompt was computed by another engine."""
    params = inner.kv_transfer_params
    return bool(params and params.get("do_remote_prefill"))
