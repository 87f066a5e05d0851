"""A seeded stream of events through vLLM's scheduler and ours: the same requests get the same tokens."""

import logging
from itertools import count
from unittest.mock import MagicMock

import pytest

pytest.importorskip("vllm")

from fuzz_kit import check_served, run_stream
from scheduler_kit import Bench
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from headway.hosts.vllm import AsyncFairScheduler, FairScheduler

TIGHT = {"ttft_s": 0.05, "tpot_s": 0.02}
CASES = {
    "plain": {},
    "adapters": {"max_loras": 1},
    "two adapters": {"max_loras": 2, "seats": 6},
    "short of blocks": {"blocks": 60},
    "cached": {"caching": True, "blocks": 80},
    "priority": {"policy": "priority", "blocks": 60},
    "drafts": {"speculated": 3},
    "drafts, adapters, cached": {"speculated": 2, "max_loras": 1, "caching": True, "blocks": 80},
}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_every_request_gets_what_it_gets_from_stock(tmp_path, clock, options, is_async):
    stock, ours = (AsyncScheduler, AsyncFairScheduler) if is_async else (Scheduler, FairScheduler)
    adapters = 3 if "max_loras" in options else 0
    plain = options.keys() <= {"max_loras", "seats"}
    wanted = None
    for seed, policy in ((1, None), (1, "fair"), (2, "triage"), (3, "fair:anchor=first-token")):
        headway = TIGHT | {"policy": policy or "fair"}
        bench = Bench(tmp_path, stock if policy is None else ours, headway=headway, **options)
        served = run_stream(bench, seed, clock, adapters=adapters)
        check_served(served, exact=plain and not served.preempted)
        if policy is None:
            wanted = served
        elif seed == 1:
            both = wanted.wanted.keys() - wanted.aborted - served.aborted
            assert {each: served.outputs[each] for each in both} == {
                each: wanted.outputs[each] for each in both
            }
        if policy is not None:
            tally = bench.scheduler.headway.driver.tally
            assert (tally.failures, tally.fallback) == (0, 0)
            assert tally.steered > 0
        bench.close()


# Failures of vLLM's scheduler after its steps were steered


def failing(target, name, at):
    """Make a method raise once, at its call number `at` from now on."""
    method, calls = getattr(target, name), count(1)

    def fail(*args, **kwargs):
        if next(calls) == at:
            raise AssertionError(f"{name} was made to fail")
        return method(*args, **kwargs)

    setattr(target, name, fail)


PLACES = {
    "in the middle of the running": ("kv_cache_manager.allocate_slots", 200),
    "while requests are admitted": ("kv_cache_manager.record_prefix_cache_stats", 20),
    "after the last allocation": ("_make_cached_request_data", 40),
    "when the step is counted": ("_update_after_schedule", 30),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("options", [{"caching": True}, {"max_loras": 1, "blocks": 80}], ids=str)
def test_a_failure_in_schedule_leaves_every_answer_whole(
    tmp_path, clock, complaints, options, place, is_async
):
    bench = Bench(tmp_path, AsyncFairScheduler if is_async else FairScheduler, headway=TIGHT, **options)
    scheduler, (path, at) = bench.scheduler, place
    *owners, name = path.split(".")
    target = scheduler
    for owner in owners:
        target = getattr(target, owner)
    failing(target, name, at)
    tally = scheduler.headway.driver.tally
    tally.steered = 1  # as after a steered step, whichever step fails
    served = run_stream(bench, 5, clock, adapters=2 if "max_loras" in options else 0)
    check_served(served)
    assert tally.fallback == 1
    loud = [each.getMessage() for each in complaints if each.levelno >= logging.ERROR]
    assert len(loud) == 1 and "FALLING BACK" in loud[0]
    bench.close()


def test_after_a_failure_every_step_is_vllms_own(tmp_path, clock):
    bench = Bench(tmp_path, FairScheduler, headway=TIGHT)
    bench.scheduler.headway.driver.tally.steered = 1
    failing(bench.scheduler.kv_cache_manager, "allocate_slots", 3)
    run_stream(bench, 5, clock)
    assert bench.scheduler.headway.driver.tally.steered == 1
    bench.close()


def test_a_failure_before_any_steering_is_vllms_own(tmp_path, clock):
    bench = Bench(tmp_path, FairScheduler, headway={"policy": "vllm-v1"})
    failing(bench.scheduler.kv_cache_manager, "allocate_slots", 3)
    with pytest.raises(AssertionError, match="made to fail"):
        run_stream(bench, 5, clock)
    assert bench.scheduler.headway.driver.tally.fallback == 0
    bench.close()


def test_a_failure_after_a_connector_was_told_is_passed_on(tmp_path, clock):
    """It may write into blocks that belong to another request by then."""
    bench = Bench(tmp_path, FairScheduler, headway=TIGHT)
    scheduler = bench.scheduler
    scheduler.headway.driver.tally.steered = 1
    scheduler.ec_connector = MagicMock()
    bench.add(100, 5, name="a")
    failing(scheduler, "_update_after_schedule", 1)
    with pytest.raises(AssertionError, match="made to fail"):
        scheduler.schedule()
    scheduler.ec_connector = None
    bench.close()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_failure_in_update_from_output_ends_that_steps_requests_alone(tmp_path, clock, is_async):
    bench = Bench(tmp_path, AsyncFairScheduler if is_async else FairScheduler, headway=TIGHT)
    scheduler = bench.scheduler
    scheduler.headway.driver.tally.steered = 1
    failing(scheduler, "_update_request_with_output", 150)
    served = run_stream(bench, 6, clock)
    failed = {name for name, how in served.ended.items() if how == "error"}
    assert 1 <= len(failed) <= 16
    served.aborted |= failed
    check_served(served)
    assert scheduler.headway.driver.tally.fallback == 1
    bench.close()
