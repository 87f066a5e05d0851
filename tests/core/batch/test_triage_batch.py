"""Steps cost 5 ms + 20 µs a token: 8,192 tokens, the cap, take 169 ms."""

import random

import pytest
from fakes import FakeView, chunks, decode, prompt, teach

from headway.core.batch import batch_policies


def make(spec="triage"):
    policy = batch_policies.create(spec, random.Random(0))
    teach(policy)
    return policy


def order(policy, view, now):
    return [work for work, _ in policy.plan(view, now).prefills]


def test_a_prompt_that_cannot_make_its_ttft_is_served_with_what_is_left():
    lost, hopeful = prompt(6000, at=0.0), prompt(6000, at=0.95)
    view = FakeView(waiting=[lost, hopeful])
    assert chunks(make().plan(view, now=1.0)) == [(hopeful, 6000), (lost, 2192)]


def test_a_prompt_is_lost_when_its_own_time_no_longer_fits_before_its_deadline():
    short, long = prompt(1000, at=0.0), prompt(6000, at=0.0)  # both due at 1.0; 25 ms and 125 ms of work
    view = FakeView(waiting=[long, short])
    assert order(make(), view, now=0.8) == [long, short]
    assert order(make(), view, now=0.95) == [short, long]


def test_decodes_make_prompts_slower_and_are_reckoned_with():
    # 900 ms of work; beside a decode a step of 50 ms has 45 ms for prompts, so it takes 1 s.
    tight, long, short = decode(at=0.0, generated=1), prompt(45_000, at=1.0), prompt(100, at=1.05)
    view = FakeView(waiting=[long, short], decodes=[tight], token_cap=8192)
    assert order(make(), view, now=1.1) == [short, long]


def test_first_come_first_while_everyone_makes_it_that_way():
    long, short = prompt(6000, at=0.0), prompt(100, at=0.1)
    assert order(make(), FakeView(waiting=[long, short]), now=0.2) == [long, short]


def test_shortest_first_under_pressure():
    first, second, short = (
        prompt(tokens, at=at, ttft_s=0.3) for tokens, at in ((7900, 0.0), (7900, 0.01), (100, 0.02))
    )
    view = FakeView(waiting=[first, second, short])
    assert order(make(), view, now=0.05)[:2] == [short, first]


@pytest.mark.parametrize(("aging", "first"), [(2000, "old"), (0, "new")])
def test_waiting_makes_a_prompt_shorter(aging, first):
    old, new = prompt(3000, at=0.0), prompt(2000, at=0.8)
    huge = prompt(42_000, at=0.85)  # makes it alone, not behind the two others: pressure
    view = FakeView(waiting=[old, new, huge])
    expected = [old, new] if first == "old" else [new, old]
    assert order(make(f"triage:aging_tokens_s={aging}"), view, now=0.9)[:2] == expected


def test_what_remains_of_a_prompt_begun_is_what_counts():
    begun = prompt(20_000, at=0.0, done=19_500, ttft_s=0.3)
    first, second = prompt(7900, at=0.01, ttft_s=0.3), prompt(7900, at=0.01, ttft_s=0.3)
    view = FakeView(waiting=[first, second], prefilling=[begun])
    assert order(make(), view, now=0.05)[0] is begun


def test_its_line_starts_at_the_first_token():
    early, long = decode(at=0.0, generated=1, first=0.1), prompt(8000, at=0.1)
    plan = make().plan(FakeView(waiting=[long], decodes=[early]), now=0.12)
    assert plan.prefills[0][1] == pytest.approx(1749, rel=0.01)


def run_overload(policy, lost, steps):
    """Feed a full step of hopeful prompts each time; return what the lost one got of them, as a share."""
    got, now = 0, 100.0
    for _ in range(steps):
        waiting = [prompt(8192, at=now - 0.1)]
        view = FakeView(waiting=[lost, *waiting] if not got else waiting, prefilling=[lost] if got else [])
        for work, chunk in policy.plan(view, now).prefills:
            work.todo_tokens -= chunk
            work.context_tokens += chunk
            got += chunk if work is lost else 0
        now += 0.17
    return got / (steps * 8192)


def test_after_its_wait_a_relegated_prompt_is_served_in_turn_again_within_a_share():
    assert run_overload(make(), prompt(500_000, at=0.0), steps=100) == pytest.approx(0.05, abs=0.02)


def test_before_its_wait_is_over_it_is_not():
    assert run_overload(make("triage:relegated_wait_s=1000"), prompt(500_000, at=0.0), steps=60) == 0.0


def test_while_it_learns_the_order_is_fairs():
    policy = batch_policies.create("triage", random.Random(0))
    lost, hopeful = prompt(300, at=0.0), prompt(300, at=0.95)
    assert order(policy, FakeView(waiting=[lost, hopeful]), now=1.2) == [lost, hopeful]
