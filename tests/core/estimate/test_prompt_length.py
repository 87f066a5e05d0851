"""An estimate has an intercept, follows the traffic, knows its error, and learns nothing impossible."""

import random

import pytest

from headway.core.errors import ConfigError
from headway.core.estimate.prompt_length import PromptLength


def test_it_begins_with_four_bytes_a_token():
    assert PromptLength().estimate(4000) == 1000


def test_it_learns_the_ratio_of_the_traffic():
    belief = PromptLength()
    for _ in range(200):
        belief.observe(3000, 1500)
    assert belief.estimate(3000) == pytest.approx(1500, rel=0.01)


def test_it_follows_a_change_of_traffic():
    belief = PromptLength(decay=0.9)
    for ratio in (4, 2):
        for _ in range(60):
            belief.observe(1000 * ratio, 1000)
    assert belief.estimate(2000) == pytest.approx(1000, rel=0.03)


def test_short_chats_behind_a_long_template_say_nothing_of_long_prompts():
    belief = PromptLength()
    for _ in range(60):
        belief.observe(2, 68)
    assert belief.intercept == pytest.approx(67.5, abs=0.5)
    assert belief.estimate(16_368) == pytest.approx(4158, rel=0.02)


@pytest.mark.parametrize(("template", "bytes_per_token"), [(20, 4.0), (200, 2.5), (1500, 1.8), (0, 4.0)])
def test_template_and_ratio_are_told_apart_when_lengths_vary(template, bytes_per_token):
    belief, rng = PromptLength(), random.Random(1)
    for _ in range(200):
        size = int(rng.lognormvariate(7.0, 1.5)) + 1
        belief.observe(size, max(1, round((template + size / bytes_per_token) * rng.uniform(0.9, 1.1))))
    for size in (10, 1000, 100_000):
        assert belief.estimate(size) == pytest.approx(template + size / bytes_per_token, rel=0.15, abs=5)


@pytest.mark.parametrize("usage", [-5, 0, 3, 10**20, 2.0, float("nan"), True, "68", None])
def test_impossible_usage_teaches_nothing(usage):
    belief = PromptLength()
    belief.observe(3000, usage)
    assert (belief.intercept, belief.bytes_per_token, belief.error) == (0.0, 4.0, None)


def test_one_outlier_moves_an_estimate_little():
    belief = PromptLength()
    for _ in range(50):
        belief.observe(4000, 1000)
    belief.observe(4000, 4000)
    assert belief.estimate(4000) == pytest.approx(1000, rel=0.1)


def test_the_error_is_of_estimates_made_before_the_report():
    belief = PromptLength()
    belief.observe(4000, 2000)  # estimated as 1,000
    assert belief.error == 0.5
    for _ in range(200):
        belief.observe(4000, 2000)
    assert belief.error < 0.01


def test_a_prompt_has_at_least_one_token_and_an_empty_one_teaches_nothing():
    belief = PromptLength()
    belief.observe(0, 10)
    assert belief.bytes_per_token == 4.0
    assert belief.estimate(0) == 1


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError):
        PromptLength(bytes_per_token=0.0)
