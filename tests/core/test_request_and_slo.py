"""A request and its targets validate themselves; the deadline line does not move with progress."""

import dataclasses
import math

import pytest

from headway.core.errors import ConfigError
from headway.core.events import InstanceUp, Role
from headway.core.request import Request, Slo


def test_token_j_is_due_at_arrival_plus_ttft_plus_j_tpots():
    slo = Slo(ttft_s=2.0, tpot_s=0.05)
    assert slo.deadline_s(10.0, 0) == 12.0
    assert slo.deadline_s(10.0, 1) == pytest.approx(12.05)
    assert slo.deadline_s(10.0, 100) == pytest.approx(17.0)


@pytest.mark.parametrize("name", ["ttft_s", "tpot_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_target_is_a_positive_finite_time(name, value):
    with pytest.raises(ConfigError, match=f"^SLO {name} must be a positive number of seconds, got "):
        Slo(**{name: value})


def test_a_prompt_has_a_token():
    assert Request("r1", 0.0, 1).prompt_tokens == 1
    with pytest.raises(ConfigError, match=r"^request r1: prompt_tokens must be at least 1, got 0$"):
        Request("r1", 0.0, 0)


def test_a_prefix_says_how_large_its_blocks_are():
    assert Request("r1", 0.0, 600, prefix=(7,), prefix_block_tokens=512).prefix == (7,)
    with pytest.raises(ConfigError, match=r"^request r1: a prefix needs prefix_block_tokens"):
        Request("r1", 0.0, 600, prefix=(7,))


def test_what_a_client_did_not_say_is_unknown():
    assert Request("r1", 0.0, 1).max_output_tokens is None


def test_a_policy_cannot_know_the_output_length():
    assert not any("output" in f.name for f in dataclasses.fields(Request) if f.name != "max_output_tokens")


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request("r1", 0.0, 1).prompt_tokens = 2


@pytest.mark.parametrize(("ranks", "chunk", "block"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_instance_has_a_rank_and_room_for_a_token(ranks, chunk, block):
    with pytest.raises(ConfigError, match=r"^instance prefill-0: .* must be at least 1, got 0$"):
        InstanceUp("prefill-0", Role.PREFILL, ranks, chunk, block_tokens=block)
