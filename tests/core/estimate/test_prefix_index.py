import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.errors import ConfigError
from headway.core.estimate.prefix_index import PrefixIndex
from headway.core.request import Request

A, B = ("prefill-0", 0), ("prefill-1", 3)


def request(*prefix, tokens=1000, block=16):
    return Request("r", 0.0, tokens, prefix=prefix, prefix_block_tokens=block if prefix else 0)


def test_a_hit_is_the_longest_leading_run():
    index = PrefixIndex()
    index.note(A, [1, 2, 4])
    assert index.hit_tokens(A, request(1, 2, 3, 4)) == 32
    assert index.hit_tokens(A, request(2, 3)) == 16
    assert index.hit_tokens(A, request(3, 1)) == 0
    assert index.hit_tokens(B, request(1, 2)) == 0
    assert index.hit_tokens(A, request()) == 0


def test_the_last_token_is_always_computed():
    index = PrefixIndex()
    index.note(A, [1, 2])
    assert index.hit_tokens(A, request(1, 2, tokens=32)) == 31
    assert index.best(request(1, tokens=1, block=1)) == []


def test_best_names_the_ranks_that_hold_the_start_longest_first():
    index = PrefixIndex()
    index.note(A, [1])
    index.note(B, [1, 2, 3])
    index.note(("prefill-2", 0), [2, 3])
    assert index.best(request(1, 2, 3)) == [(B, 48), (A, 16)]
    assert index.best(request(9)) == []
    assert index.best(request()) == []


def test_a_full_rank_forgets_the_least_recently_used_prefix_from_its_end():
    index = PrefixIndex(blocks_per_rank=4)
    index.note(A, [1, 2])
    index.note(A, [3, 4])
    index.note(A, [1, 2])
    index.note(A, [5])
    assert index.hit_tokens(A, request(1, 2)) == 32
    assert index.hit_tokens(A, request(3, 4)) == 16


def test_a_rank_that_is_forgotten_holds_nothing():
    index = PrefixIndex()
    index.note(A, [1])
    index.note(B, [1])
    index.forget(A)
    index.forget(("never", 0))
    assert index.best(request(1)) == [(B, 16)]
    assert index.hit_tokens(A, request(1)) == 0


def test_it_must_hold_a_block():
    with pytest.raises(ConfigError, match="blocks_per_rank"):
        PrefixIndex(blocks_per_rank=0)


blocks = st.lists(st.integers(0, 6), max_size=6, unique=True)
steps = st.lists(st.tuples(st.integers(0, 3), blocks, st.booleans()), max_size=20)


@given(steps, st.lists(st.integers(0, 6), min_size=1, max_size=6))
def test_best_agrees_with_asking_every_rank(steps, prefix):
    index = PrefixIndex(blocks_per_rank=5)
    for rank, hashes, forget in steps:
        index.forget(rank) if forget else index.note(rank, hashes)
    wanted = request(*prefix)
    each = {rank: index.hit_tokens(rank, wanted) for rank in range(4)}
    found = index.best(wanted)
    assert dict(found) == {rank: hit for rank, hit in each.items() if hit}
    assert [hit for _, hit in found] == sorted((hit for _, hit in found), reverse=True)
