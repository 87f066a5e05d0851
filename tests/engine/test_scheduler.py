"""vLLM's real schedulers under a batch policy: what a step runs, step by step, in literal times."""

import logging
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from scheduler_kit import Bench
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from headway.core.batch import Plan, StepReport
from headway.core.errors import ConfigError
from headway.hosts.vllm import AsyncFairScheduler, FairScheduler
from headway.hosts.vllm.scheduler import _require_fitting

LAX = {"ttft_s": 600.0, "tpot_s": 60.0}


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(cls=FairScheduler, **options):
        made.append(Bench(tmp_path, cls, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def knows(bench, a_s=0.010, b_s=0.0001, c_s=0.0, most=4096):
    """Let the policy have learned that a step takes `a + b·new + c·context`, and stop it learning."""
    policy = bench.scheduler.headway.driver.policy
    if not hasattr(policy, "step_time"):
        return policy
    rng = random.Random(1)
    for n in range(64):
        decodes, context = rng.randrange(1, 17), rng.randrange(1000)
        prompt = rng.randrange(16, most) if n % 2 else 0
        prompt = most if n == 63 else prompt
        new = decodes + prompt
        policy.observe(StepReport(new, decodes, context, 0.0, a_s + b_s * new + c_s * context), 0.0)
    policy.observe = lambda step, now: None
    return policy


def tally(bench):
    return bench.scheduler.headway.driver.tally


# A step


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "priority"},
        {"caching": True},
        {"blocks": 60},
        {"caching": True, "blocks": 60},
        {"seats": 3},
    ],
    ids=str,
)
def test_nothing_bound_is_vllms_own_schedule(bench, is_async, options):
    """With more tokens in a step than are planned before step times are learned, and with fewer."""
    ours, theirs = (AsyncFairScheduler, AsyncScheduler) if is_async else (FairScheduler, Scheduler)
    for tokens in (256, 1024):
        stock, *others = [
            bench(theirs, tokens=tokens, **options),
            bench(ours, tokens=tokens, headway=LAX | {"policy": "fair"}, **options),
            bench(ours, tokens=tokens, headway=LAX | {"policy": "triage"}, **options),
            bench(ours, tokens=tokens, headway={"policy": "vllm-v1", "tpot_s": 0.001}, **options),
        ]
        wanted = list(_run(stock, random.Random(7), in_flight=2 if is_async else 1))
        assert tokens == 256 or max(sum(step.values()) for step in wanted) > 512
        for it in others:
            policy = knows(it)
            steps = list(_run(it, random.Random(7), in_flight=2 if is_async else 1))
            assert [list(step.items()) for step in steps] == [list(step.items()) for step in wanted]
            assert tally(it).failures == 0
            assert policy.name != "vllm-v1" or tally(it).steered == 0


def _run(bench, rng, in_flight):
    """Bring requests now and then, some that begin alike; yield what each step ran."""
    under_way = []
    for n in range(3000):
        if n > 40 and not bench.scheduler.requests:
            return
        for k in range(rng.randrange(1, 5) if n < 40 and rng.random() < 0.3 else 0):
            prompt = [rng.randrange(3, 9)] * rng.randrange(1, 700)
            bench.add(prompt, rng.randrange(1, 30), name=f"r{n}-{k}", priority=rng.randrange(3))
        output = bench.schedule()
        yield dict(output.num_scheduled_tokens)
        under_way.append(output)
        if len(under_way) == in_flight:
            bench.finish(under_way.pop(0))
    raise AssertionError("not all are served")


def test_a_chunk_is_what_the_tightest_decode_leaves(bench, clock):
    it = bench(headway={"ttft_s": 0.05, "tpot_s": 0.05}, tokens=2048)
    it.add(8, name="decode")
    it.step()
    knows(it, a_s=0.010, b_s=0.0001)
    clock.s += 0.05
    it.add(2000, name="prompt")
    ran = it.step()
    # The token is due in 50 ms; 10 ms are the step's own, the decode takes one of 400 tokens.
    assert ran["decode"] == 1
    assert 380 <= ran["prompt"] <= 399


def test_decodes_with_slack_sit_out(bench, clock):
    it = bench(headway={"ttft_s": 5.0, "tpot_s": 0.02}, tokens=2048)
    for n in range(4):
        it.add(8, name=f"early{n}")
    it.step()
    it.add(8, name="late", slo_ttft_ms=30)
    it.step()
    knows(it, a_s=0.010, b_s=0.001)
    clock.s += 0.05
    it.add(100, name="prompt")
    ran = it.step()
    assert set(ran) == {"late", "prompt"}, "four have five seconds yet, one has none"
    assert tally(it).sat_out == 4
    it.scheduler.finish_requests("prompt", RequestStatus.FINISHED_ABORTED)
    clock.s += 10.0
    assert set(it.step()) == {"early0", "early1", "early2", "early3", "late"}


def test_a_prompt_that_is_mostly_cached_begins_though_blocks_are_short(bench, clock):
    it = bench(headway={"ttft_s": 0.05, "tpot_s": 0.05}, tokens=2048, blocks=30, caching=True)
    it.add([7] * 320, name="first")
    it.step()
    knows(it, a_s=0.010, b_s=0.0001)
    clock.s += 0.05
    it.add([7] * 320 + [8] * 20, name="second")  # 22 blocks, of which 20 are the first one's: 8 are free
    assert it.step() == {"first": 1, "second": 20}
    assert tally(it).steered == 1, "a chunk of 2,048 tokens would be too long for the first"


def test_triage_serves_who_can_still_make_it(bench, clock):
    it = bench(headway={"policy": "triage", "ttft_s": 1.0, "tpot_s": 10.0}, tokens=512)
    it.add(2000, name="lost")
    clock.s += 10.0
    knows(it, a_s=0.010, b_s=0.001)
    it.add(400, name="long")
    it.add(100, name="short")
    first = it.schedule()
    assert next(iter(first.num_scheduled_tokens)) in ("long", "short")
    assert "lost" not in first.num_scheduled_tokens or first.num_scheduled_tokens["lost"] <= 12
    it.finish(first)
    assert [r.request_id for r in it.scheduler.waiting] in ([], ["lost"])


def test_a_prompt_begun_gives_way_to_one_in_a_hurry(bench, clock):
    it = bench(headway={"policy": "triage", "ttft_s": 100.0, "tpot_s": 10.0}, tokens=512)
    it.add(3000, name="begun")
    it.step()
    knows(it, a_s=0.010, b_s=0.001)
    it.scheduler.headway.driver.policy.plan = lambda view, now: Plan(
        [(view.waiting[0], 100), (view.prefilling[0], 300)]
    )
    it.add(100, name="hurry")
    assert it.step() == {"begun": 300, "hurry": 100}, "the cut is made by the cap on long prompts"
    it.add(400, name="other")
    it.scheduler.headway.driver.policy.plan = lambda view, now: Plan(
        [(view.waiting[0], 400), (view.prefilling[0], 100)]
    )
    assert it.step() == {"hurry": 1, "other": 400}, "a cap would cut the other, so the one begun waits"
    assert it.scheduler.scheduler_config.long_prefill_token_threshold == 0


def test_whatever_was_set_is_put_back(bench, clock):
    it = bench(headway={"policy": "triage", "ttft_s": 1.0, "tpot_s": 0.05}, tokens=256, blocks=200)
    scheduler = it.scheduler
    knows(it, b_s=0.0005)
    rng = random.Random(3)
    arrived = []
    for n in range(300):
        clock.s += rng.random() * 0.05
        if n < 200 and rng.random() < 0.3:
            arrived.append(it.add(rng.randrange(1, 700), rng.randrange(1, 60), name=f"r{n}").request_id)
        waiting = [r.request_id for r in scheduler.waiting if r.num_preemptions == 0]
        assert waiting == [name for name in arrived if name in waiting], "first come first"
        it.step()
        assert scheduler.max_num_scheduled_tokens == 256
        assert scheduler.scheduler_config.long_prefill_token_threshold == 0
        assert all(r.next_decode_eligible_step == 0 for r in scheduler.requests.values())
    assert tally(it).steered > 50
    assert tally(it).failures == 0


@pytest.mark.parametrize("cls", [FairScheduler, AsyncFairScheduler])
@pytest.mark.parametrize("policy", ["fair", "triage", "stall-free:token_budget=64", "prefill-first"])
@pytest.mark.parametrize("options", [{}, {"policy": "priority"}, {"caching": True, "blocks": 120}])
def test_everybody_is_served(bench, clock, cls, policy, options):
    it = bench(cls, headway={"policy": policy, "ttft_s": 0.2, "tpot_s": 0.02}, **options)
    rng = random.Random(11)
    under_way = []
    for n in range(3000):
        if n < 200 and rng.random() < 0.3:
            targets = {"slo_ttft_ms": rng.choice([50, 5000])} if rng.random() < 0.3 else {}
            prompt = [rng.randrange(3, 6)] * rng.randrange(1, 600)
            it.add(prompt, rng.randrange(1, 40), name=f"r{n}", priority=rng.randrange(3), **targets)
        if n < 200 and rng.random() < 0.02 and it.scheduler.requests:
            it.scheduler.finish_requests(
                rng.choice(list(it.scheduler.requests)), RequestStatus.FINISHED_ABORTED
            )
        output = it.schedule()
        under_way.append(output)
        clock.s += 0.005 + 0.0001 * output.total_num_scheduled_tokens
        if len(under_way) == (2 if cls is AsyncFairScheduler else 1):
            it.finish(under_way.pop(0))
        if n > 200 and not it.scheduler.requests:
            break
    assert not it.scheduler.requests
    assert tally(it).failures == 0


@pytest.mark.parametrize("policy", ["fair", "triage"])
@pytest.mark.parametrize("evil", [{"slo_tpot_ms": 1e-9}, {"slo_tpot_ms": 8}, {"slo_ttft_ms": 1e-9}], ids=str)
def test_a_target_out_of_reach_costs_the_others_nothing(bench, clock, policy, evil):
    """24 requests, four a second, beside one stream; a step takes 8 ms and 50 µs a token."""
    it = bench(headway={"policy": policy, "ttft_s": 1.0, "tpot_s": 0.05}, tokens=2048)
    it.add(20, 5000, name="evil", **evil)
    began, ended, arrivals = {}, {}, {}
    while len(ended) < 24:
        if len(arrivals) < 24 and clock.s >= 1000.0 + 0.25 * len(arrivals):
            name = f"r{len(arrivals)}"
            arrivals[name] = clock.s
            it.add(200, 100, name=name)
        output = it.schedule()
        clock.s += 0.008 + 50e-6 * output.total_num_scheduled_tokens
        it.finish(output)
        for name in arrivals:
            if name not in it.scheduler.requests:
                ended.setdefault(name, clock.s)
            elif it.scheduler.requests[name].num_output_tokens:
                began.setdefault(name, clock.s)
    assert all(began[name] - arrivals[name] <= 1.0 for name in ended)
    assert all((ended[name] - began[name]) / 99 <= 0.05 for name in ended)


@pytest.mark.parametrize("options", [{}, {"blocks": 60}, {"policy": "priority"}], ids=str)
def test_the_account_of_those_that_wait_is_what_a_walk_of_the_queue_finds(bench, clock, options):
    it = bench(headway={"policy": "triage", "ttft_s": 0.2, "tpot_s": 0.02}, **options)
    driver, rng = it.scheduler.headway.driver, random.Random(13)
    for n in range(200):
        for k in range(rng.randrange(4)):
            it.add(rng.randrange(1, 300), 20, name=f"r{n}-{k}", slo_ttft_ms=rng.choice([1e-6, 90, 600_000]))
        if rng.random() < 0.1 and it.scheduler.requests:
            it.scheduler.finish_requests(
                rng.choice(list(it.scheduler.requests)), RequestStatus.FINISHED_ABORTED
            )
        clock.s += 0.02
        it.step()
        view = driver._look(clock.s)
        walked = list(view.waiting)
        assert driver._account.queued_tokens() == sum(work.todo_tokens for work in walked)
        due = [work for work in walked if work.request.arrival_s + work.request.slo.ttft_s >= clock.s]
        found = list(view.waiting.open_at(clock.s))
        assert sorted(map(id, found)) == sorted(map(id, due))
        if not options:
            assert found == due, "in order of arrival"


@pytest.mark.parametrize("options", [{}, {"blocks": 60}, {"policy": "priority"}], ids=str)
def test_what_is_remembered_of_the_front_is_what_a_look_at_every_request_finds(bench, clock, options):
    it = bench(headway={"policy": "triage", "ttft_s": 0.2, "tpot_s": 0.02}, **options)
    scheduler, rng, remembered = it.scheduler, random.Random(17), 0
    driver = scheduler.headway.driver
    for n in range(150):
        for k in range(300 if n == 0 else rng.randrange(4)):
            it.add(rng.randrange(1, 300), 20, name=f"r{n}-{k}", slo_ttft_ms=rng.choice([1e-6, 90, 600_000]))
        for _ in range(rng.randrange(2)):
            name = rng.choice(list(scheduler.requests))
            scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        if rng.random() < 0.03:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        clock.s += 0.02
        it.step()
        waiting = driver._look(clock.s).waiting
        queue = list(getattr(scheduler.waiting, "_heap", scheduler.waiting))
        looked_at = driver._adopter.show(queue)
        assert list(waiting) == looked_at
        assert waiting[:256] == looked_at[:256]
        ordered = waiting.by_deadline(256)
        if ordered is not None:
            remembered += 1
            assert ordered == sorted(
                looked_at[:256], key=lambda work: work.request.arrival_s + work.request.slo.ttft_s
            )
            assert waiting.earliest_s(256) == min(work.request.arrival_s for work in looked_at[:256])
    assert tally(it).failures == 0
    assert bool(remembered) == ("policy" not in options)


# Between steps


def test_running_requests_sent_back_to_wait_run_once(bench, clock):
    it = bench(headway={"policy": "triage", "ttft_s": 1.0, "tpot_s": 0.05}, tokens=256)
    knows(it, b_s=0.0005)
    it.add(8, 20, name="decode")
    it.add(900, 5, name="prompt")
    for _ in range(2):
        it.step()
    scheduler = it.scheduler
    scheduler.headway.driver.shown()  # what it sees of the queues is remembered for the next step
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert [r.request_id for r in scheduler.waiting] == ["decode", "prompt"]
    while scheduler.requests:
        output = it.schedule()
        assert not {r.request_id for r in scheduler.running} & {r.request_id for r in scheduler.waiting}
        assert len(scheduler.running) == len(set(scheduler.running))
        it.finish(output)
    assert tally(it).failures == 0


@pytest.mark.parametrize("pause", [PauseState.PAUSED_ALL, PauseState.PAUSED_NEW])
def test_the_time_of_a_pause_is_no_steps(bench, clock, pause):
    it = bench()
    seen = []
    it.scheduler.headway.driver.policy.observe = lambda step, now: seen.append(step.duration_s)
    it.add(8, 20, name="a")
    it.add(8, 20, name="b")
    it.step()
    it.scheduler.set_pause_state(pause)
    clock.s += 100.0
    it.scheduler.set_pause_state(PauseState.UNPAUSED)
    it.scheduler.finish_requests("b", RequestStatus.FINISHED_ABORTED)
    for _ in range(2):
        output = it.schedule()
        clock.s += 0.25
        it.finish(output)
    assert seen[1:] == [0.25, 0.25]


# What goes wrong


def test_a_policy_that_fails_leaves_the_step_to_vllm(bench, complaints):
    it = bench()

    def fail(view, now):
        raise ZeroDivisionError("a bug of ours")

    it.scheduler.headway.driver.policy.plan = fail
    it.add(300, 5, name="a")
    assert it.step() == {"a": 256}
    assert it.step() == {"a": 44}
    for _ in range(4):
        it.step()
    assert not it.scheduler.requests
    assert tally(it).failures >= 6
    assert len([c for c in complaints if c.levelno >= logging.ERROR]) == 1


def test_a_plan_vllm_cannot_follow_costs_a_step_at_most(bench):
    it = bench()
    it.add(300, 5, name="a")
    it.scheduler.headway.driver.policy.plan = lambda view, now: Plan(decode=False)
    for _ in range(20):
        it.step()
    assert not it.scheduler.requests


@pytest.mark.parametrize("value", [-1, 0, "soon", True, 1_000_000, float("nan")])
def test_nonsense_targets_give_way_to_the_default(bench, value):
    it = bench(headway={"ttft_s": 1.5})
    request = it.add(10, slo_ttft_ms=value)
    assert request.headway.request.slo.ttft_s == 1.5
    it.step()
    assert it.scheduler.headway.driver._adopter.slo_ignored == 1


def test_a_request_names_its_targets(bench):
    slo = bench().add(10, slo_ttft_ms=250, slo_tpot_ms=20.5).headway.request.slo
    assert (slo.ttft_s, slo.tpot_s) == (0.25, 0.0205)


@pytest.mark.parametrize(
    ("is_async", "config", "complaint"),
    [
        (False, {"async_scheduling": True}, "needs --no-async-scheduling"),
        (True, {"is_diffusion": True}, "cannot serve diffusion models"),
    ],
)
def test_an_engine_that_cannot_be_served_is_refused(is_async, config, complaint):
    fields = {"async_scheduling": is_async, "is_diffusion": False} | config
    part = SimpleNamespace(**fields)
    with pytest.raises(ConfigError, match=complaint):
        _require_fitting(SimpleNamespace(scheduler_config=part, model_config=part), is_async=is_async)


def test_bad_settings_end_the_start(bench, complaints):
    with pytest.raises(ConfigError, match="did you mean 'triage'"):
        bench(headway={"policy": "triag"})
    assert [c.getMessage() for c in complaints if c.levelno >= logging.ERROR]
