"""What holds of every plan of every batch policy, whatever the rank looks like."""

import random

import pytest
from fakes import FakeView, decode, prompt, teach
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.batch import batch_policies

times = st.floats(0.0, 10.0, allow_nan=False)
slos = st.fixed_dictionaries({"ttft_s": st.floats(0.05, 5.0), "tpot_s": st.floats(0.01, 0.2)})


@st.composite
def views(draw):
    waiting = [
        prompt(draw(st.integers(1, 9000)), at=draw(times), **draw(slos))
        for _ in range(draw(st.integers(0, 6)))
    ]
    waiting.sort(key=lambda work: work.request.arrival_s)
    prefilling = []
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.integers(2, 9000))
        done = draw(st.integers(1, tokens - 1))
        prefilling.append(prompt(tokens, at=draw(times), done=done, **draw(slos)))
    decodes = [
        decode(
            at=draw(times),
            context=draw(st.integers(400, 9000)),
            generated=draw(st.integers(1, 300)),
            **draw(slos),
        )
        for _ in range(draw(st.integers(0, 12)))
    ]
    return FakeView(
        waiting=waiting,
        prefilling=prefilling,
        decodes=decodes,
        token_cap=draw(st.sampled_from([4, 16, 512, 8192])),
        free_seats=draw(st.integers(0, 8)),
        free_blocks=draw(st.sampled_from([0, 3, 200, 100_000])),
    )


SPECS = ("vllm-v1", "stall-free", "prefill-first", "fair", "fair:anchor=first-token", "triage")


def prepared(spec, learned):
    policy = batch_policies.create(spec, random.Random(0))
    if learned:
        teach(
            policy, lambda new, context, attention: 0.006 + 20e-6 * new + 50e-9 * context + 1e-9 * attention
        )
    return policy


POLICIES = {(spec, learned): prepared(spec, learned) for spec in SPECS for learned in (False, True)}


@pytest.mark.parametrize("learned", [False, True], ids=["new", "learned"])
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=40, deadline=None)
@given(view=views(), now=st.floats(5.0, 20.0))
def test_every_plan_is_sound(spec, learned, view, now):
    plan = POLICIES[spec, learned].plan(view, now)
    planned = [work for work, _ in plan.prefills]
    waiting, prefilling, decodes = (set(map(id, g)) for g in (view.waiting, view.prefilling, view.decodes))
    begins = [work for work in planned if id(work) in waiting]
    skipped = list(plan.skipped)

    assert len({id(work) for work in planned}) == len(planned), "nothing is planned twice"
    assert all(id(work) in waiting | prefilling for work in planned)
    assert all(1 <= chunk <= work.todo_tokens for work, chunk in plan.prefills)
    assert len(begins) <= view.free_seats
    assert len({id(work) for work in skipped}) == len(skipped)
    assert {id(work) for work in skipped} <= decodes

    run = len(view.decodes) - len(skipped) if plan.decode else 0
    tokens = sum(chunk for _, chunk in plan.prefills)
    assert tokens + run <= view.token_cap or not tokens, "prompts never push a step over the cap"
    assert blocks(view, plan.prefills) <= view.free_blocks

    can_begin = bool(view.waiting) and view.free_seats > 0 and view.free_blocks == 100_000
    if view.decodes or (view.prefilling and view.free_blocks) or can_begin:
        assert run + tokens > 0, "never empty while there is work that fits"


def blocks(view, prefills):
    size = view.block_tokens
    return sum(-(-(w.context_tokens + n) // size) + (-w.context_tokens // size) for w, n in prefills)


@pytest.mark.parametrize("spec", [s for s in SPECS if POLICIES[s, True].decodes_always_run])
@given(view=views(), now=times)
def test_decodes_always_run_means_what_it_says(spec, view, now):
    view.waiting = view.prefilling = ()
    plan = POLICIES[spec, True].plan(view, now)
    assert plan.decode and not plan.skipped and not plan.prefills
