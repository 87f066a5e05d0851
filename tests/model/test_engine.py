"""An engine pass by pass: 10 ms a pass and 1 ms a token, 4-token blocks, unless said otherwise."""

import random

import pytest
from tiny import LOCKSTEP, Asked, FirstCome, drain, engine, policies, pool, run_pass, scripted, work

from headway.core.batch.contract import Plan
from headway.core.errors import InvariantError
from headway.core.events import Role
from headway.core.request import Slo
from headway.model.engine import Engine

# A request's life


def test_prompt_then_one_token_per_pass():
    sut, one = engine(), work("a", 20, 3)
    sut.submit(one, 0, 0.0)
    assert sut.queued_tokens() == (20,)
    now, outcome = run_pass(sut, 0.0)
    assert now == pytest.approx(0.030)
    assert (outcome.first_tokens, outcome.finished) == ([one], [])
    assert (outcome.ran_tokens, outcome.decodes) == ((20,), (0,))
    assert (one.generated_tokens, one.context_tokens, one.todo_tokens, one.first_token_s) == (1, 20, 1, now)
    now, outcome = run_pass(sut, now)
    assert now == pytest.approx(0.041)
    assert (outcome.ran_tokens, outcome.decodes, one.generated_tokens) == ((0,), (1,), 2)
    now, outcome = run_pass(sut, now)
    assert outcome.finished == [one]
    assert one.finished and one.generated_tokens == 3 and not one.truncated
    assert sut.start_pass(now) is None
    assert sut.kv_blocks() == (0,)


def test_a_single_token_finishes_with_the_prompt():
    sut, one = engine(), work("a", 20, 1)
    sut.submit(one, 0, 0.0)
    _, outcome = run_pass(sut, 0.0)
    assert outcome.first_tokens == outcome.finished == [one]
    assert not sut.has_work


def test_long_prompt_runs_in_chunks_of_the_token_cap():
    sut, one = engine(token_cap=8), work("a", 20, 2)
    sut.submit(one, 0, 0.0)
    now, chunks, contexts = 0.0, [], []
    while not one.generated_tokens:
        now, outcome = run_pass(sut, now)
        chunks.append(outcome.ran_tokens[0])
        contexts.append((one.context_tokens, sut.kv_blocks()[0], sut.queued_tokens()[0]))
    assert chunks == [8, 8, 4]
    assert contexts == [(8, 2, 12), (16, 4, 4), (20, 5, 0)]


def test_decodes_come_off_the_token_cap():
    sut = engine(token_cap=8)
    for name in "ab":
        sut.submit(work(name, 4, 9), 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    sut.submit(work("c", 20, 2), 0, now)
    assert run_pass(sut, now)[1].ran_tokens == (6,)


def test_seats_are_enforced():
    sut = engine(max_running=1)
    for name in "ab":
        sut.submit(work(name, 4, 3), 0, 0.0)
    assert run_pass(sut, 0.0)[1].ran_tokens == (4,)
    assert (sut.running(), sut.waiting()) == ((1,), (1,))


def test_what_comes_during_a_pass_waits_for_the_next():
    sut = engine()
    sut.submit(work("a", 20, 2), 0, 0.0)
    end = sut.start_pass(0.0)
    sut.submit(work("b", 4, 2), 0, 0.01)
    assert sut.end_pass(end).ran_tokens == (20,)
    assert run_pass(sut, end)[1].ran_tokens == (4,)


def test_growth_takes_a_block_when_the_context_fills_the_last():
    sut = engine()
    sut.submit(work("a", 7, 9), 0, 0.0)
    now, blocks = 0.0, []
    for _ in range(7):
        now, _ = run_pass(sut, now)
        blocks.append(sut.kv_blocks()[0])
    assert blocks == [2, 2, 3, 3, 3, 3, 4]  # contexts 7, 8, 9 … 13


def test_output_beyond_all_kv_is_cut_short():
    sut, one = engine(kv_blocks=3), work("a", 8, 50)
    sut.submit(one, 0, 0.0)
    _, finished = drain(sut)
    assert finished == [one]
    assert one.truncated and one.generated_tokens == 5  # the last token needs no KV: 8 + 4 fill the rank


def test_prompt_that_never_fits_is_a_bug_of_the_host():
    with pytest.raises(InvariantError, match="12 prompt tokens never fit 12"):
        engine(kv_blocks=3).submit(work("a", 12, 1), 0, 0.0)


def test_driving_out_of_order_is_a_bug():
    sut, one = engine(), work("a", 4, 2)
    with pytest.raises(InvariantError, match="no pass"):
        sut.end_pass(0.0)
    sut.submit(one, 0, 0.0)
    with pytest.raises(InvariantError, match="already"):
        sut.submit(work("a", 4, 2), 0, 0.0)
    sut.start_pass(0.0)
    with pytest.raises(InvariantError, match="under way"):
        sut.start_pass(0.0)
    sut.cancel("a")
    with pytest.raises(InvariantError, match="used before"):
        sut.submit(one, 0, 0.0)


# Lateness


def test_lateness_is_the_worst_token_against_the_line():
    sut, one = engine(), work("a", 20, 4, slo=Slo(ttft_s=0.020, tpot_s=0.005))
    sut.submit(one, 0, 0.0)
    now = 0.0
    for pause_s in (0.0, 0.0, 0.1, 0.0):
        now, _ = run_pass(sut, now + pause_s)
    # delivered at 30, 41, 152, 163 ms; due at 20, 25, 30, 35
    assert one.lateness_s == pytest.approx(0.163 - 0.035)


def test_in_time_throughout_is_negative():
    sut, one = engine(), work("a", 20, 3, slo=Slo(ttft_s=0.5, tpot_s=0.02))
    sut.submit(one, 0, 0.0)
    drain(sut)
    assert one.lateness_s == pytest.approx(0.030 - 0.5)  # the first token had the least to spare


def test_first_token_from_elsewhere_counts():
    sut, one = engine(Role.DECODE), work("a", 20, 2, prefilled=True, slo=Slo(ttft_s=0.1, tpot_s=10.0))
    one.first_token_s = 0.4
    sut.submit(one, 0, 0.5)
    drain(sut, 0.5)
    assert one.lateness_s == pytest.approx(0.3)


# Roles


def test_prefill_pool_lets_go_with_the_first_token():
    sut, one = engine(Role.PREFILL), work("a", 20, 5)
    sut.submit(one, 0, 0.0)
    _, outcome = run_pass(sut, 0.0)
    assert (outcome.first_tokens, outcome.finished) == ([one], [])
    assert (one.generated_tokens, sut.kv_blocks(), sut.has_work) == (1, (0,), False)


def test_prefill_pool_finishes_what_has_one_token():
    sut, one = engine(Role.PREFILL), work("a", 20, 1)
    sut.submit(one, 0, 0.0)
    assert run_pass(sut, 0.0)[1].finished == [one]


def test_prefilled_request_decodes_from_its_second_token():
    sut, one = engine(Role.DECODE), work("a", 20, 3, prefilled=True)
    sut.submit(one, 0, 0.0)
    assert (sut.waiting(), sut.queued_tokens()) == ((1,), (0,))
    now, outcome = run_pass(sut, 0.0)
    assert (outcome.decodes, outcome.first_tokens, one.generated_tokens) == ((1,), [], 2)
    assert run_pass(sut, now)[1].finished == [one]


def test_prefilled_request_waits_for_its_blocks():
    sut = engine(Role.DECODE, kv_blocks=6)
    sut.submit(work("a", 15, 3, prefilled=True), 0, 0.0)
    sut.submit(work("b", 15, 3, prefilled=True), 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    assert (sut.running(), sut.waiting()) == ((1,), (1,))
    now, outcome = run_pass(sut, now)
    assert [one.request.id for one in outcome.finished] == ["a"]
    assert run_pass(sut, now)[1].decodes == (1,)


# Lockstep


def test_ranks_end_together_and_an_idle_one_waits():
    sut = engine(ranks=2, costs=LOCKSTEP)
    sut.submit(work("a", 20, 2), 0, 0.0)
    now, outcome = run_pass(sut, 0.0)
    assert now == pytest.approx(0.010 + 0.020 + 0.100 + 0.010 * 10)  # sync over the mean of 20, 0
    assert outcome.ran_tokens == (20, 0)
    sut.submit(work("b", 4, 2), 1, now)
    _, outcome = run_pass(sut, now)
    assert (outcome.ran_tokens, outcome.decodes) == ((0, 4), (1, 0))


def test_host_gap_slowdown_and_jitter():
    sut = engine(host_gap_s=0.004)
    sut.submit(work("a", 20, 3), 0, 0.0)
    assert sut.start_pass(0.0) == pytest.approx(0.034)
    sut.end_pass(0.034)
    sut.slowdown = 3.0
    assert sut.start_pass(0.034) == pytest.approx(0.037)
    sut = Engine(pool(jitter=0.1), policies(FirstCome), random.Random(1))
    sut.submit(work("a", 1, 400), 0, 0.0)
    sut.end_pass(sut.start_pass(0.0))
    durations = []
    for _ in range(399):
        durations.append(sut.start_pass(0.0))
        sut.end_pass(0.0)
    mean = sum(durations) / len(durations)
    deviation = (sum((one - mean) ** 2 for one in durations) / len(durations)) ** 0.5
    assert mean == pytest.approx(0.011, rel=0.02)
    assert deviation / mean == pytest.approx(0.1, rel=0.1)


# Shortage of KV


def test_newest_decode_is_preempted_and_computed_again():
    sut = engine(kv_blocks=6)
    old, new = work("old", 11, 8), work("new", 11, 8)
    sut.submit(old, 0, 0.0)
    sut.submit(new, 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    now, _ = run_pass(sut, now)  # contexts 12: all six blocks full
    assert sut.kv_blocks() == (6,)
    now, outcome = run_pass(sut, now)
    assert (outcome.decodes, sut.preemptions, new.preemptions) == ((1,), 1, 1)
    assert (new.generated_tokens, new.context_tokens, new.todo_tokens) == (2, 0, 13)
    _, finished = drain(sut, now)
    assert finished == [old, new]
    assert (new.generated_tokens, old.generated_tokens, sut.kv_blocks()) == (8, 8, (0,))


def test_recomputation_gives_no_second_first_token():
    sut = engine(kv_blocks=6)
    for name in ("old", "new"):
        sut.submit(work(name, 11, 8), 0, 0.0)
    now, firsts = 0.0, []
    while sut.has_work:
        now, outcome = run_pass(sut, now)
        firsts += [one.request.id for one in outcome.first_tokens]
    assert firsts == ["old", "new"]


def test_chunk_is_cut_to_the_free_blocks():
    sut = engine(kv_blocks=8)
    sut.submit(work("a", 15, 3), 0, 0.0)
    sut.submit(work("b", 30, 2), 0, 0.0)
    now, outcome = run_pass(sut, 0.0)
    assert outcome.ran_tokens == (15 + 16,)
    _, finished = drain(sut, now)
    assert [one.request.id for one in finished] == ["a", "b"]


def test_partial_prompts_that_hold_all_blocks_do_not_lock_each_other():
    def everyone(view):
        return Plan([(one, 4) for one in (*view.prefilling, *view.waiting)])

    sut = scripted(everyone, kv_blocks=8)
    for name in "abc":
        sut.submit(work(name, 24, 2), 0, 0.0)
    _, finished = drain(sut, limit=200)
    assert len(finished) == 3
    assert sut.preemptions > 0


# Plans


def test_skipped_decode_keeps_its_kv_and_gets_its_block_later():
    sut = scripted(None)
    one, two = work("a", 8, 4), work("b", 8, 4)
    sut.submit(one, 0, 0.0)
    sut.submit(two, 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    policy = sut._ranks[0].policy
    policy.script = lambda view: Plan(skipped=[one])
    now, outcome = run_pass(sut, now)
    assert (outcome.decodes, sut.kv_blocks()) == ((1,), (5,))
    assert (one.generated_tokens, two.generated_tokens) == (1, 2)
    policy.script = None
    now, outcome = run_pass(sut, now)
    assert (outcome.decodes, sut.kv_blocks()) == ((2,), (6,))
    assert (one.generated_tokens, two.generated_tokens) == (2, 3)
    _, finished = drain(sut, now)
    assert finished == [two, one]


def test_no_decode_runs_when_the_plan_says_so():
    sut = scripted(None)
    sut.submit(work("a", 8, 4), 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    sut.submit(work("b", 8, 4), 0, now)
    sut._ranks[0].policy.script = lambda view: Plan([(view.waiting[0], 8)], decode=False)
    end, outcome = run_pass(sut, now)
    assert (outcome.decodes, outcome.ran_tokens, end - now) == ((0,), (8,), pytest.approx(0.018))


def test_a_policy_that_plans_nothing_cannot_hang_the_engine():
    sut = scripted(lambda view: Plan(decode=False))
    for name in "ab":
        sut.submit(work(name, 8, 3), 0, 0.0)
    _, finished = drain(sut, limit=20)
    assert len(finished) == 2
    assert sut.policy_fallbacks > 0


def test_nonsense_in_a_plan_is_ignored():
    stranger = work("x", 8, 2)

    def plan(view):
        mine = [(one, 99) for one in (*view.prefilling, *view.waiting)]
        return Plan([(stranger, 8), *mine, *mine, (mine[0][0], 0)] if mine else (), skipped=[stranger])

    sut = scripted(plan)
    sut.submit(work("a", 8, 3), 0, 0.0)
    assert run_pass(sut, 0.0)[1].ran_tokens == (8,)
    drain(sut)


def test_only_decodes_means_the_policy_is_not_asked():
    asked = []

    class Counting(FirstCome):
        def plan(self, view, now):
            asked.append(now)
            return super().plan(view, now)

    sut = engine(kind=Counting)
    sut.submit(work("a", 8, 5), 0, 0.0)
    drain(sut)
    assert asked == [0.0]


def test_policies_learn_from_reports():
    seen = []

    class Watching(Asked):
        def observe(self, step, now):
            report = (step.new_tokens, step.decodes, step.context_tokens, step.attention)
            seen.append((*report, round(step.duration_s, 6)))

    sut = engine(kind=Watching, token_cap=8)
    sut.submit(work("a", 12, 3), 0, 0.0)
    drain(sut)
    assert seen == [
        (8, 0, 0, 32.0, 0.018),
        (4, 0, 8, 4 * (8 + 2.0), 0.014),
        (1, 1, 12, 0.0, 0.011),
        (1, 1, 13, 0.0, 0.011),
    ]


def test_unasked_policies_learn_too():
    seen = []

    class Watching(FirstCome):
        def observe(self, step, now):
            seen.append((step.new_tokens, step.context_tokens))

    sut = engine(kind=Watching)
    sut.submit(work("a", 12, 3), 0, 0.0)
    drain(sut)
    assert seen == [(12, 0), (1, 12), (1, 13)]


def test_admission_budget_is_passed_on_or_unknown():
    class Budgeting(FirstCome):
        def admission_budget(self, view, now):
            return 10 * view.free_seats

    assert engine(kind=Budgeting, ranks=2).pab_tokens(0.0) == (80, 80)
    assert engine().pab_tokens(0.0) is None


# Prefix cache


def test_cached_prefix_is_not_computed_again():
    sut = engine()
    sut.submit(work("a", 20, 1, prefix=[1, 2]), 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    assert sut.kv_blocks() == (0,)
    second = work("b", 20, 2, prefix=[1, 2])
    sut.submit(second, 0, now)
    _, outcome = run_pass(sut, now)
    assert outcome.ran_tokens == (4,)
    assert (second.generated_tokens, second.context_tokens, sut.kv_blocks()) == (1, 20, (5,))


def test_prompt_cached_in_full_computes_its_last_token():
    sut = engine()
    sut.submit(work("a", 16, 1, prefix=[1, 2]), 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    sut.submit(work("b", 16, 3, prefix=[1, 2]), 0, now)
    now, outcome = run_pass(sut, now)
    assert (outcome.ran_tokens, sut.kv_blocks()) == ((1,), (4,))
    drain(sut, now)
    assert sut.kv_blocks() == (0,)


def test_other_ranks_know_nothing_of_a_prefix():
    sut = engine(ranks=2)
    sut.submit(work("a", 16, 1, prefix=[1, 2]), 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    sut.submit(work("b", 16, 1, prefix=[1, 2]), 1, now)
    assert run_pass(sut, now)[1].ran_tokens == (0, 16)


def test_running_requests_share_their_prefix():
    sut = engine(Role.DECODE)
    for name in "ab":
        sut.submit(work(name, 18, 5, prefilled=True, prefix=[1, 2]), 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    assert sut.kv_blocks() == (4 + 1 + 1,)
    drain(sut, now)
    assert sut.kv_blocks() == (0,)


# Leaving early


def test_cancel_between_passes():
    sut = engine()
    one, two = work("a", 8, 5), work("b", 8, 5)
    sut.submit(one, 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    sut.submit(two, 0, now)
    assert sut.cancel("b") is two
    assert sut.cancel("a") is one
    assert sut.cancel("a") is None
    assert (sut.has_work, sut.kv_blocks(), sut.queued_tokens()) == (False, (0,), (0,))


@pytest.mark.parametrize("passes_before", [0, 1, 2])
def test_cancel_during_a_pass_frees_at_its_end(passes_before):
    sut = engine()
    sut.submit(work("a", 8, 3), 0, 0.0)
    now = 0.0
    for _ in range(passes_before):
        now, _ = run_pass(sut, now)
    sut.start_pass(now)
    assert sut.cancel("a") is not None
    outcome = sut.end_pass(now + 1.0)
    assert (outcome.first_tokens, outcome.finished) == ([], [])
    assert (sut.kv_blocks(), sut.queued_tokens(), sut.running(), sut.has_work) == ((0,), (0,), (0,), False)


def test_an_engine_that_died_forgets_all():
    sut = engine()
    one, two = work("a", 16, 5, prefix=[1, 2]), work("b", 8, 5)
    sut.submit(one, 0, 0.0)
    now, _ = run_pass(sut, 0.0)
    sut.submit(two, 0, now)
    sut.start_pass(now)
    assert sut.drop_all() == [one, two]
    assert (sut.busy, sut.has_work, sut.kv_blocks(), sut.queued_tokens()) == (False, False, (0,), (0,))
    sut.submit(work("a", 16, 2, prefix=[1, 2]), 0, now)
    assert run_pass(sut, now)[1].ran_tokens == (16,)


def test_asking_or_not_gives_the_same_life():
    lives = []
    for kind in (FirstCome, Asked):
        sut = Engine(
            pool(jitter=0.05, kv_blocks=40, ranks=3, costs=LOCKSTEP), policies(kind, 3), random.Random(7)
        )
        rng, works, now = random.Random(3), [], 0.0
        for number in range(60):
            works.append(work(f"r{number}", rng.randint(1, 90), rng.randint(1, 30), arrival_s=now))
            sut.submit(works[-1], rng.randrange(3), now)
            for _ in range(rng.randint(0, 4)):
                if sut.has_work:
                    now, _ = run_pass(sut, now)
        drain(sut, now)
        lives.append([(w.first_token_s, w.lateness_s, w.generated_tokens, w.preemptions) for w in works])
    assert lives[0] == lives[1]
    assert any(life[-1] for life in lives[0])
