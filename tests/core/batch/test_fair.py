"""Steps cost 5 ms + 20 µs a token here (`fakes.plain_cost`), so 50 ms hold 2,250 tokens."""

import random

import pytest
from fakes import FakeView, chunks, decode, prompt, teach
from hypothesis import given
from hypothesis import strategies as st

from headway.core.batch import StepReport, batch_policies
from headway.core.estimate.step_time import Coefficients


def make(spec="fair", cost=None):
    policy = batch_policies.create(spec, random.Random(0))
    teach(policy, cost) if cost else teach(policy)
    return policy


def near(tokens):
    return pytest.approx(tokens, rel=0.01)


def test_a_chunk_is_what_the_tightest_decode_leaves():
    long, tight = prompt(8000, at=0.9), decode(at=0.0, generated=1)  # its next token is due at 1.05
    plan = make().plan(FakeView(waiting=[long], decodes=[tight]), now=0.95)  # 100 ms of slack
    assert chunks(plan)[0] == (long, near(4749))
    assert not plan.skipped


def test_the_budget_is_never_under_one_tpot():
    long, late = prompt(8000, at=0.9), decode(at=0.0, generated=1)
    plan = make().plan(FakeView(waiting=[long], decodes=[late]), now=5.0)
    assert chunks(plan)[0] == (long, near(2249))


def test_rule_2_a_least_budget_under_one_tpot_lets_a_late_decode_catch_up():
    long, late = prompt(8000, at=0.9), decode(at=0.0, generated=1)  # due at 1.05
    view = FakeView(waiting=[long], decodes=[late])
    catches_up = make("fair:least_budget=0.8")
    assert chunks(catches_up.plan(view, now=5.0))[0] == (long, near(1749))  # a step of 40 ms
    assert chunks(catches_up.plan(view, now=1.005))[0] == (long, near(1999))  # 45 ms of slack: no shorter


def test_with_no_decode_running_the_token_cap_is_the_only_limit():
    long = prompt(20_000)
    assert chunks(make().plan(FakeView(waiting=[long]), now=0.0)) == [(long, 8192)]


def test_a_decode_with_slack_yields_to_a_prompt_and_is_skipped():
    tight = decode(at=0.0, generated=1)  # due at 1.05
    ahead = decode(at=0.0, generated=41)  # due at 3.05
    long, short = prompt(8000, at=0.9), prompt(100, at=0.9)
    policy = make()
    crowded = policy.plan(FakeView(waiting=[long], decodes=[ahead, tight]), now=1.0)
    assert list(crowded.skipped) == [ahead]
    roomy = policy.plan(FakeView(waiting=[short], decodes=[ahead, tight]), now=1.0)
    assert chunks(roomy) == [(short, 100)] and not roomy.skipped


def test_a_prompt_that_lacks_blocks_alone_is_told_with_what_there_is_time_for():
    long, tight = prompt(8000, at=0.9), decode(at=0.0, generated=1)  # 500 blocks; due at 1.05
    plan = make().plan(FakeView(waiting=[long], decodes=[tight], free_blocks=10), now=0.95)
    assert not plan.prefills and plan.blocked == (long, near(4749))
    many = [decode(at=0.0, generated=41) for _ in range(3000)]  # due at 3.05: no room for all of them
    plan = make().plan(FakeView(waiting=[long], decodes=[tight, *many], free_blocks=200), now=1.0)
    assert plan.skipped and plan.blocked is None


def test_of_the_decodes_with_slack_those_with_least_run_first():
    tight = decode(at=0.0, generated=1)
    ahead = [decode(at=0.0, generated=41 + i, context=50_000) for i in (2, 0, 1)]
    policy = make(cost=lambda new, context, attention: 0.005 + 20e-6 * new + 300e-9 * context)
    # 45 ms beside the fixed 5: two of 15 ms and the tight one.
    plan = policy.plan(FakeView(decodes=[*ahead, tight]), now=1.0)
    assert list(plan.skipped) == [ahead[0]]


def test_urgent_decodes_all_run_even_if_they_exceed_the_budget_and_no_prompt_does():
    urgent = [decode(at=0.0, generated=1) for _ in range(8)]
    policy = make(cost=lambda new, context, attention: 0.005 + 10e-6 * new + 10e-6 * context)
    plan = policy.plan(FakeView(waiting=[prompt(100, at=0.9)], decodes=urgent), now=1.0)
    assert chunks(plan) == [] and plan.decode and not plan.skipped


def test_prompts_begun_come_first_then_waiting_ones_by_deadline():
    begun = prompt(500, at=0.5, done=400)
    patient, hasty = prompt(300, at=0.6, ttft_s=5.0), prompt(300, at=0.7, ttft_s=0.5)
    view = FakeView(waiting=[patient, hasty], prefilling=[begun], decodes=[decode()])
    assert chunks(make().plan(view, now=0.8)) == [(begun, 100), (hasty, 300), (patient, 300)]


def test_the_anchor_decides_whether_an_early_first_token_is_slack():
    early = decode(at=0.0, generated=1, first=0.1)  # due at 1.05 by the paper, at 0.15 by its first token
    long = prompt(8000, at=0.1)
    view = FakeView(waiting=[long], decodes=[early], token_cap=8192)
    assert chunks(make("fair").plan(view, now=0.12)) == [(long, 8000)]
    assert chunks(make("fair:anchor=first-token").plan(view, now=0.12)) == [(long, near(2249))]


def test_attention_shortens_the_chunk_of_a_long_prompt():
    policy = make(cost=lambda new, context, attention: 0.005 + 20e-6 * new + 1e-9 * attention)
    late = decode(generated=1)
    fresh, deep = prompt(40_000, at=4.9), prompt(40_000, at=4.9, done=20_000)
    at_start = chunks(policy.plan(FakeView(prefilling=[fresh], decodes=[late]), now=5.0))[0][1]
    far_in = chunks(policy.plan(FakeView(prefilling=[deep], decodes=[late]), now=5.0))[0][1]
    assert at_start == pytest.approx(2135, rel=0.03)  # 20 µs·n + n²/2 ns = 45 ms
    assert far_in == pytest.approx(1098, rel=0.03)  # 40 µs·n + n²/2 ns = 45 ms


def test_while_it_learns_it_is_stall_free():
    policy = batch_policies.create("fair:learning_tokens=256", random.Random(0))
    long, ahead = prompt(8000), decode(generated=100)
    plan = policy.plan(FakeView(waiting=[long], decodes=[ahead]), now=0.0)
    assert chunks(plan) == [(long, 256)] and not plan.skipped


def test_it_does_not_plan_far_beyond_what_it_measured():
    policy = batch_policies.create("fair", random.Random(0))
    for new in (100, 200, 300, 400, 500) * 5:
        policy.observe(StepReport(new + 1, 1, 1000, 0.0, 0.005 + 20e-6 * new), 0.0)
    long, ahead = prompt(8000), decode(generated=100)
    plan = policy.plan(FakeView(waiting=[long], decodes=[ahead]), now=0.0)
    assert chunks(plan) == [(long, 2 * 501 - 1)]


@given(
    prompts=st.lists(st.integers(1, 5000), max_size=8),
    begun=st.lists(st.integers(2, 5000), max_size=3),
    ahead=st.lists(st.integers(1, 400), max_size=40),
    now=st.floats(10.0, 20.0),
)
def test_where_no_deadline_binds_the_step_is_vllm_v1s(prompts, begun, ahead, now):
    lax = {"ttft_s": 1000.0, "tpot_s": 1000.0}
    view = FakeView(
        waiting=[prompt(n, at=5.0 + i, **lax) for i, n in enumerate(prompts)],
        prefilling=[prompt(n, at=float(i), done=n // 2, **lax) for i, n in enumerate(begun)],
        decodes=[decode(generated=g, **lax) for g in ahead],
    )
    plan = FAIR.plan(view, now)
    assert chunks(plan) == chunks(VLLM.plan(view, now))
    assert plan.decode and not plan.skipped


FAIR = make()
VLLM = batch_policies.create("vllm-v1", random.Random(0))


class TestAdmissionBudget:
    def test_it_says_nothing_before_it_knows_step_times(self):
        policy = batch_policies.create("fair", random.Random(0))
        assert policy.admission_budget(FakeView(), now=0.0) is None

    def test_an_idle_rank_takes_what_the_ttft_target_holds(self):
        policy = make()
        assert policy.admission_budget(FakeView(), now=0.0) == near(99_750)  # 2 s, default target: (2 − a)/b

    def test_running_decodes_reserve_the_tokens_due_within_the_target(self):
        # Next token due at 1.05, now 1.0, H = 1 s: need = ⌊0.95/0.05⌋ + 1 = 20 tokens in 20 steps.
        view = FakeView(decodes=[decode(at=0.0, generated=1)])
        budget = make().admission_budget(view, now=1.0001)
        assert budget == near((1.0 - 20 * 0.005 - 20 * 20e-6) / 20e-6)

    def test_queued_prompts_count(self):
        view = FakeView(waiting=[prompt(10_000)], prefilling=[prompt(20_000, done=10_000)])
        assert make().admission_budget(view, now=0.0) == near((1.0 - 0.005) / 20e-6 - 20_000)

    def test_free_kv_caps_it(self):
        assert make().admission_budget(FakeView(free_blocks=100), now=0.0) == 1600
        assert make().admission_budget(FakeView(waiting=[prompt(1000)], free_blocks=100), now=0.0) == 600

    def test_a_full_queue_leaves_nothing(self):
        assert make().admission_budget(FakeView(waiting=[prompt(60_000)]), now=0.0) == 0


def test_rule_7_a_margin_takes_at_most_half_of_what_the_decodes_leave():
    """64 decodes take 30 ms of 50. A margin for twice the time would leave nothing."""

    def cost(new, context, attention):
        return 0.005 + 20e-6 * new + 0.37e-6 * context

    policy = make(cost=cost)
    for step in range(64):
        policy.observe(
            StepReport(1064, 64, 64_000, 0.0, cost(1064, 64_000, 0.0) * (1 + (step % 4 == 0))), 0.0
        )
    long, late = prompt(8000, at=4.9), [decode(at=0.0, generated=1) for _ in range(64)]
    costs = policy.step_time.coefficients("mixed")
    left_s = 0.05 - costs.predict(64, 64_000)
    assert 0.05 / policy.step_time.margin("mixed") < costs.predict(64, 64_000)
    plan = policy.plan(FakeView(waiting=[long], decodes=late), now=5.0)
    assert chunks(plan) == [(long, costs.chunk_for(0.5 * left_s, 0, 8000))]


def served(policy, decodes, steps=18):
    """The steps in which a prompt gets something, and how much in the last of them."""
    long = prompt(8000, at=0.0)
    views = [FakeView(waiting=[long], decodes=decodes) for _ in range(steps)]
    plans = [policy.plan(view, now=5.0 + step / 100) for step, view in enumerate(views)]
    return [step for step, plan in enumerate(plans) if plan.prefills], chunks(plans[-1])


def test_rule_8_decodes_that_use_up_every_budget_do_not_starve_the_prompts():
    """64 decodes take 6.3 ms, the target is 6: there is never time left for a prompt."""
    steps, last = served(make(), [decode(at=0.0, generated=1, tpot_s=0.006) for _ in range(64)])
    assert steps == [8, 17]
    assert [tokens for _, tokens in last] == [512]


def test_rule_9_a_target_that_no_step_can_meet_binds_nothing():
    """One TPOT is 4 ms and a step at least 5 ms, with one decode as with many."""
    steps, last = served(make(), [decode(at=0.0, generated=1, tpot_s=0.004)])
    assert steps == list(range(18))
    assert [tokens for _, tokens in last] == [512]


class TestTargetsOutOfReach:
    """One stream asks for a TPOT that no engine can keep; 15 others ask for 50 ms."""

    @staticmethod
    def plan(*targets, spec="fair", now=5.0, generated=1):
        decodes = [decode(at=4.0, generated=generated, tpot_s=tpot_s) for tpot_s in targets]
        view = FakeView(waiting=[prompt(8000, at=4.9)], decodes=decodes)
        return make(spec).plan(view, now), decodes

    @pytest.mark.parametrize("spec", ["fair", "fair:anchor=first-token", "triage"])
    @pytest.mark.parametrize("tpot_s", [1e-12, 0.001, 0.005, 0.0066])  # a step of all 16 takes 5.3 ms
    def test_it_costs_the_others_nothing(self, tpot_s, spec):
        wanted, _ = self.plan(*[0.05] * 16, spec=spec)
        plan, _ = self.plan(tpot_s, *[0.05] * 15, spec=spec)
        assert chunks(plan)[0][1] == chunks(wanted)[0][1]
        assert not plan.skipped

    def test_the_least_believed_is_a_quarter_more_than_a_step_of_all_decodes(self):
        # 6.7 ms leave 1.35 ms for the prompt, less what the margin takes.
        plan, _ = self.plan(0.0067, *[0.05] * 15, now=6.0)
        assert 60 <= chunks(plan)[0][1] <= 69

    def test_it_is_served_as_if_it_asked_for_the_tightest_of_the_others(self):
        """With 40 tokens banked at 50 ms each it sits out like any other with as much slack."""
        ahead = decode(at=0.0, generated=41, tpot_s=1e-9)
        tight = [decode(at=0.0, generated=1) for _ in range(2)]
        view = FakeView(waiting=[prompt(8000, at=0.9)], decodes=[ahead, *tight])
        assert list(make().plan(view, now=1.0).skipped) == [ahead]

    def test_a_loose_target_of_one_loosens_no_others(self):
        wanted, _ = self.plan(*[0.05] * 16)
        plan, _ = self.plan(60.0, *[0.05] * 15)
        assert chunks(plan)[0][1] == chunks(wanted)[0][1] + 1, "it sits out itself"

    def test_where_most_are_out_of_reach_steps_are_stall_free(self):
        plan, _ = self.plan(0.05, *[0.001] * 15)
        assert chunks(plan)[0][1] == 512
        plan, _ = self.plan(*[0.001] * 16)
        assert chunks(plan)[0][1] == 512

    def test_targets_that_all_share_bind_however_late_the_steps_are(self):
        """A step of 64 decodes takes 6.3 ms, their target is 6 ms."""
        plan, _ = self.plan(*[0.006] * 64)
        assert not plan.prefills

    def test_one_request_makes_the_rank_look_neither_full_nor_empty(self):
        others = [decode(at=4.0, generated=20, ttft_s=1.0) for _ in range(15)]
        wanted = make().admission_budget(FakeView(decodes=[*others, decode(at=4.0, generated=20)]), now=5.0)
        for evil in ({"tpot_s": 1e-12}, {"ttft_s": 1e-6}, {"ttft_s": 600.0}, {"tpot_s": 60.0}):
            hostile = decode(at=4.0, generated=20, **evil)
            budget = make().admission_budget(FakeView(decodes=[hostile, *others]), now=5.0)
            assert budget == pytest.approx(wanted, rel=0.1), evil
            waiting = [prompt(10, at=4.9, **evil)]
            budget = make().admission_budget(FakeView(waiting=waiting, decodes=others), now=5.0)
            assert budget == pytest.approx(wanted, rel=0.1), evil

    def test_where_nothing_binds_and_attention_is_free_plans_are_sound(self):
        policy, exact = make(), Coefficients(0.005, 20e-6, 0.0, 0.0)
        for regime in (policy.step_time._decode, policy.step_time._mixed):
            regime.coefficients = exact
        decodes = [decode(at=4.0, tpot_s=0.001) for _ in range(4)]
        view = FakeView(waiting=[prompt(100, at=4.9), prompt(600, at=4.95)], decodes=decodes)
        assert [tokens for _, tokens in policy.plan(view, now=5.0).prefills] == [100, 412]
