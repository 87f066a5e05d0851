"""What a policy holds: its sums and least values are those of its requests, whatever came and went."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.cluster.buffer import Buffer, Waiting
from headway.core.errors import InvariantError
from headway.testing import request


def waiting(name, since_s=0.0, prompt=100):
    return Waiting(request(name, at=since_s, prompt=prompt), since_s)


def test_an_empty_buffer_holds_nothing_and_nobody_waits():
    buffer = Buffer()
    assert not buffer and buffer.first() is None
    assert (buffer.tokens, buffer.oldest_s(), buffer.least_tokens()) == (0, math.inf, math.inf)


def test_what_came_back_goes_before_what_waits():
    buffer = Buffer()
    for held in (waiting("r1", 1.0), waiting("r2", 2.0)):
        buffer.add(held)
    buffer.add_first(waiting("r3", 3.0))
    assert list(buffer) == ["r3", "r1", "r2"]
    assert buffer.first() is buffer["r3"]
    assert buffer.oldest_s() == 1.0


@pytest.mark.parametrize("add", [Buffer.add, Buffer.add_first])
def test_a_request_is_held_once(add):
    buffer = Buffer()
    buffer.add(waiting("r1"))
    with pytest.raises(InvariantError, match="r1 is held already"):
        add(buffer, waiting("r1"))
    assert buffer.tokens == 100


def test_removing_what_is_not_here_does_nothing():
    buffer = Buffer()
    buffer.add(waiting("r1"))
    buffer.remove("r2")
    assert list(buffer) == ["r1"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add_first", "remove"]),
            st.integers(0, 8),
            st.integers(0, 4),
            st.integers(1, 9),
        ),
        max_size=60,
    )
)
def test_sums_and_least_values_are_those_of_what_is_held(steps):
    buffer, held = Buffer(), {}
    for what, number, since, prompt in steps:
        name = f"r{number}"
        if what == "remove":
            buffer.remove(name)
            held.pop(name, None)
        elif name not in held:
            held[name] = waiting(name, float(since), prompt)
            getattr(buffer, what)(held[name])
        assert buffer == held
        assert buffer.tokens == sum(w.request.prompt_tokens for w in held.values())
        assert buffer.oldest_s() == min((w.since_s for w in held.values()), default=math.inf)
        assert buffer.least_tokens() == min((w.least_tokens for w in held.values()), default=math.inf)
