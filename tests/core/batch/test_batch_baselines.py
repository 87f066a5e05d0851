import random

import pytest
from fakes import FakeView, chunks, decode, prompt

from headway.core.batch import batch_policies
from headway.core.errors import ConfigError


def make(spec):
    return batch_policies.create(spec, random.Random(0))


def test_every_policy_is_registered_with_a_summary():
    assert set(batch_policies.names()) == {"vllm-v1", "stall-free", "prefill-first", "fair", "triage"}
    for name in batch_policies.names():
        assert make(name).summary


def test_vllm_v1_runs_every_decode_and_fills_the_cap_with_prompts():
    first, second = prompt(5000), prompt(5000)
    plan = make("vllm-v1").plan(FakeView(waiting=[first, second], decodes=[decode(), decode()]), 0.0)
    assert chunks(plan) == [(first, 5000), (second, 3190)]
    assert plan.decode and not plan.skipped


def test_vllm_v1_without_prompts_is_every_decode():
    plan = make("vllm-v1").plan(FakeView(decodes=[decode()]), 0.0)
    assert chunks(plan) == [] and plan.decode and not plan.skipped


@pytest.mark.parametrize(("spec", "chunk"), [("stall-free", 510), ("stall-free:token_budget=2048", 2046)])
def test_stall_free_keeps_decodes_and_prompts_under_one_token_budget(spec, chunk):
    long = prompt(5000)
    plan = make(spec).plan(FakeView(waiting=[long], decodes=[decode(), decode()]), 0.0)
    assert chunks(plan) == [(long, chunk)]
    assert plan.decode


def test_stall_free_never_exceeds_the_engines_cap():
    long = prompt(5000)
    plan = make("stall-free:token_budget=2048").plan(FakeView(waiting=[long], token_cap=256), 0.0)
    assert chunks(plan) == [(long, 256)]


def test_prefill_first_runs_whole_prompts_and_no_decode():
    first, second = prompt(5000), prompt(5000)
    plan = make("prefill-first").plan(FakeView(waiting=[first, second], decodes=[decode()]), 0.0)
    assert chunks(plan) == [(first, 5000)]
    assert not plan.decode


def test_prefill_first_runs_the_decodes_when_no_prompt_can_begin():
    view = FakeView(waiting=[prompt(5000)], decodes=[decode()], free_seats=0)
    plan = make("prefill-first").plan(view, 0.0)
    assert chunks(plan) == [] and plan.decode


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="token_budget must be at least 1"):
        make("stall-free:token_budget=0")
    with pytest.raises(ConfigError, match="anchor must be one of arrival, first-token"):
        make("fair:anchor=last-token")
