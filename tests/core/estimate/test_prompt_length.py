import pytest

from headway.core.errors import ConfigError
from headway.core.estimate.prompt_length import PromptLength


def test_it_begins_with_four_bytes_a_token():
    assert PromptLength().estimate(4000) == 1000


def test_it_learns_the_ratio_of_the_traffic():
    belief = PromptLength()
    for _ in range(200):
        belief.observe(prompt_bytes=3000, tokens=1500)
    assert belief.estimate(3000) == pytest.approx(1500, rel=0.01)


def test_it_follows_a_change_of_traffic():
    belief = PromptLength(decay=0.9)
    for ratio in (4, 2):
        for _ in range(60):
            belief.observe(prompt_bytes=1000 * ratio, tokens=1000)
    assert belief.bytes_per_token == pytest.approx(2.0, rel=0.01)


def test_a_prompt_has_at_least_one_token_and_an_empty_one_teaches_nothing():
    belief = PromptLength()
    belief.observe(0, 10)
    belief.observe(10, 0)
    assert belief.bytes_per_token == 4.0
    assert belief.estimate(0) == 1


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError):
        PromptLength(bytes_per_token=0.0)
