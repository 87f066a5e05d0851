"""vLLM's schedulers with a batch policy in front: `--scheduler-cls headway.hosts.vllm.FairScheduler`.

`FairScheduler` is for synchronous scheduling (the CPU), `AsyncFairScheduler` for asynchronous scheduling
(what GPUs run by default). Which policy it is, is a setting. Of vLLM's methods seven are wrapped, each by a
call before or after; `schedule()` is steered (`steering.py`), never copied.
"""

import time
from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from headway.core.errors import ConfigError
from headway.hosts.vllm.driver import Driver
from headway.hosts.vllm.hub import Hub
from headway.hosts.vllm.recorder import Recorder, path_of_rank
from headway.hosts.vllm.recovery import Checkpoint, end_with_error
from headway.hosts.vllm.reports import Reporter, Up, address
from headway.hosts.vllm.settings import VllmSettings, read

__all__ = ["AsyncFairScheduler", "FairScheduler"]

#: How often the state is told where only `/metrics` shows it.
_METRICS_S = 0.25
# vLLM prints what comes from its own loggers.
_log = init_logger("vllm.headway")


class _Fair:
    """The mixin. Everything of ours is in `headway`, so that no name meets one of vLLM's."""

    headway: "Plug"
    requests: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self.headway = Plug(self)
        except ConfigError as error:
            _log.error("%s", error)
            raise

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Form a step. Arguments as vLLM has them: only whether prefills are throttled is looked at."""
        throttled = bool(args[0] if args else kwargs.get("throttle_prefills", False))
        driver = self.headway.driver
        checkpoint = Checkpoint(self)
        driver.before(throttled=throttled)
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        except Exception:
            driver.restore()
            if not driver.may_have_caused or not checkpoint.is_recoverable(self):
                raise
            driver.fall_back()
            checkpoint.recover(self, driver.in_flight())
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            driver.restore()
        driver.after(output)
        self.headway.began(output)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take in what a step brought."""
        driver = self.headway.driver
        ran = driver.ended(scheduler_output)
        found = map(self.requests.get, scheduler_output.num_scheduled_tokens)
        requests = [inner for inner in found if inner is not None and not inner.is_finished()]
        try:
            outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        except Exception:
            if not driver.may_have_caused:
                raise
            driver.fall_back()
            outputs = end_with_error(self, requests)
        self.headway.ended(ran)
        return outputs

    def add_request(self, request: Any) -> None:
        """Take in a request."""
        super().add_request(request)  # type: ignore[misc]
        self.headway.received(request)

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """Let go of requests from outside: an abort, most often."""
        finished = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        self.headway.left(finished)
        return finished

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Empty the cache, between steps; vLLM may send all that run back to wait for it."""
        try:
            return super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.headway.driver.interrupted()

    def set_pause_state(self, *args: Any, **kwargs: Any) -> None:
        """Pause, or go on: the time between is no step's."""
        super().set_pause_state(*args, **kwargs)  # type: ignore[misc]
        self.headway.driver.interrupted()

    def shutdown(self) -> None:
        """End."""
        self.headway.close()
        super().shutdown()  # type: ignore[misc]


class FairScheduler(_Fair, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler under a batch policy."""


class AsyncFairScheduler(_Fair, AsyncScheduler):  # type: ignore[misc]
    """vLLM's asynchronous scheduler under a batch policy."""


class Plug:
    """What a scheduler of ours has beside vLLM's: its driver, and how it tells of itself."""

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.vllm_config
        _require_fitting(config, is_async=isinstance(scheduler, AsyncScheduler))
        settings = read(config.additional_config)
        self.rank: int = config.parallel_config.data_parallel_index
        self.driver = Driver(scheduler, settings, self.rank, _log, self._make_recorder(settings))
        self._scheduler = scheduler
        self._up = _up(scheduler, self.rank)
        self._hub = self._make_hub(settings, config.instance_id)
        self._reporter = Reporter(address(config.instance_id, "reports"))
        self._reporter.up(self._up)
        self._every_s = 0.0 if settings.events else _METRICS_S
        self._told_s = 0.0
        _log.info("Headway: %s, targets TTFT %gs TPOT %gs", settings.policy, settings.ttft_s, settings.tpot_s)

    def _make_hub(self, settings: VllmSettings, instance_id: str) -> Hub | None:
        if self.rank != 0:
            return None
        reports, stats = address(instance_id, "reports"), address(instance_id, "stats")
        hub = Hub(settings.name, reports, stats, settings.events, settings.snapshots, _log)
        if hub.endpoint:
            _log.info("Headway: pass events at %s, snapshots at %s", hub.endpoint, hub.snapshot_endpoint)
        hub.start()
        return hub

    def _make_recorder(self, settings: VllmSettings) -> Recorder | None:
        if settings.steps is None:
            return None
        path = path_of_rank(settings.steps, self.rank)
        recorder = Recorder(path, _log)
        _log.info("Headway: steps are recorded in %s", path)
        return recorder

    def received(self, request: Any) -> None:
        """Note a request, and the number of the dispatch that brought it."""
        with self.driver.guarded():
            number = self.driver.dispatch_of(request)
            if number is not None:
                self._reporter.received(number)

    def began(self, output: Any) -> None:
        """Tell the ranks that march along that this one runs a step."""
        if self._up.lockstep and output.total_num_scheduled_tokens:
            with self.driver.guarded():
                self._reporter.started(self.rank)

    def ended(self, ran: tuple[int, float] | None) -> None:
        """Tell of a step that ended, if it ran anything."""
        with self.driver.guarded():
            self.driver.left()
            if ran is not None and self._is_due():
                self._tell(ran)

    def left(self, finished: Iterable[Any]) -> None:
        """Requests were withdrawn. If none is left, no step will end and tell."""
        with self.driver.guarded():
            self.driver.left([inner.request_id for inner in finished])
            if not self._scheduler.has_unfinished_requests():
                self._tell(None)

    def _is_due(self) -> bool:
        """Whether anybody wants to hear of each step; a state that stays is told in any case."""
        now = time.monotonic()
        if now - self._told_s < self._every_s and self._scheduler.has_unfinished_requests():
            return False
        self._told_s = now
        return True

    def _tell(self, ran: tuple[int, float] | None) -> None:
        step_time = getattr(self.driver.policy, "step_time", None)
        self._reporter.ended(self.rank, self.driver.shown(), self.driver.tally, ran, step_time)

    def close(self) -> None:
        """Close what is open."""
        with self.driver.guarded():
            self.driver.close()
            self._reporter.close()
            if self._hub is not None:
                self._hub.close()


def _require_fitting(config: Any, *, is_async: bool) -> None:
    """Return if these classes can serve an engine so configured. Raises ConfigError in one line if not."""
    if config.scheduler_config.async_scheduling and not is_async:
        # The engine forms a step while another runs in any case, and the class sees none of its decodes.
        raise ConfigError(
            "headway's FairScheduler needs --no-async-scheduling: under asynchronous scheduling take "
            "headway.hosts.vllm.AsyncFairScheduler"
        )
    if config.model_config.is_diffusion:  # a canvas is no token after another
        raise ConfigError("headway's scheduler cannot serve diffusion models: start without --scheduler-cls")


def _up(scheduler: Any, rank: int) -> Up:
    config = scheduler.vllm_config
    transfer = config.kv_transfer_config
    roles = {"kv_producer": "prefill", "kv_consumer": "decode"}
    parallel = config.parallel_config
    return Up(
        rank=rank,
        ranks=parallel.data_parallel_size,
        role=roles.get(getattr(transfer, "kv_role", None) or "", "aggregated"),
        chunk_tokens=scheduler.max_num_scheduled_tokens,
        kv_blocks=config.cache_config.num_gpu_blocks,
        block_tokens=scheduler.block_size,
        max_running=scheduler.max_num_running_reqs,
        # Only the experts of a mixture make ranks wait for one another.
        lockstep=parallel.data_parallel_size > 1,
    )
