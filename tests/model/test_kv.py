"""Blocks and the prefix cache of one rank: 4-token blocks, hashes of 8 tokens."""

import pytest
from tiny import request

from headway.core.errors import InvariantError
from headway.model.kv import PagedKv, take_each


def cached(kv: PagedKv, name: str, hashes: list[int]) -> None:
    """Compute a prompt of these hashes and let it go."""
    prompt = request(name, 8 * len(hashes), prefix=hashes)
    kv.take(kv.blocks_for(prompt.prompt_tokens))
    held = kv.publish(prompt, 0, prompt.prompt_tokens)
    kv.release_prefix(prompt, held)


def test_blocks_are_whole():
    kv = PagedKv(10, 4)
    assert [kv.blocks_for(tokens) for tokens in (1, 4, 5)] == [1, 1, 2]


def test_taking_more_than_free_is_a_bug():
    kv = PagedKv(2, 4)
    with pytest.raises(InvariantError, match="took 3 KV blocks with only 2 free"):
        kv.take(3)


def test_giving_more_than_taken_is_a_bug():
    with pytest.raises(InvariantError, match="too many"):
        PagedKv(2, 4).give(1)


def test_released_prefix_stays_cached_and_counts_as_free():
    kv = PagedKv(10, 4)
    cached(kv, "a", [1, 2])
    assert (kv.used, kv.cached, kv.free) == (0, 4, 10)
    assert kv.hold_prefix(request("b", 20, prefix=[1, 2])) == 2
    assert (kv.used, kv.cached) == (4, 0)


def test_hit_is_the_longest_common_run_from_the_start():
    kv = PagedKv(10, 4)
    cached(kv, "a", [1, 2, 3])
    assert kv.hold_prefix(request("b", 40, prefix=[1, 2, 9])) == 2
    assert kv.hold_prefix(request("c", 40, prefix=[2, 3])) == 2  # a hash names all that is before it


def test_hashes_beyond_the_prompt_are_ignored():
    kv = PagedKv(10, 4)
    cached(kv, "a", [1, 2])
    assert kv.hold_prefix(request("b", 15, prefix=[1, 2])) == 1


def test_shared_blocks_are_counted_once():
    kv = PagedKv(10, 4)
    first, second = request("a", 8, prefix=[1]), request("b", 8, prefix=[1])
    kv.take(2)
    kv.publish(first, 0, 8)
    assert kv.hold_prefix(second) == 1
    assert kv.used == 2
    kv.release_prefix(first, 1)
    assert (kv.used, kv.cached) == (2, 0)
    kv.release_prefix(second, 1)
    assert (kv.used, kv.cached) == (0, 2)


def test_second_copy_of_a_prefix_is_given_back():
    kv = PagedKv(10, 4)
    first, second = request("a", 8, prefix=[1]), request("b", 8, prefix=[1])
    kv.take(4)  # both computed it at the same time
    kv.publish(first, 0, 8)
    kv.publish(second, 0, 8)
    assert kv.used == 2


def test_longest_unused_is_evicted_first_and_a_tail_before_its_head():
    kv = PagedKv(6, 4)
    cached(kv, "a", [1, 2])
    cached(kv, "b", [5])
    kv.take(1)
    assert kv.hold_prefix(request("c", 40, prefix=[1, 2])) == 1  # 2 went first
    assert kv.hold_prefix(request("d", 40, prefix=[5])) == 1


def test_use_renews():
    kv = PagedKv(4, 4)
    cached(kv, "a", [1])
    cached(kv, "b", [2])
    again = request("c", 8, prefix=[1])
    kv.release_prefix(again, kv.hold_prefix(again))
    kv.take(1)
    assert kv.hold_prefix(request("d", 8, prefix=[2])) == 0
    assert kv.hold_prefix(again) == 1


def test_chunks_publish_what_is_whole():
    kv = PagedKv(10, 4)
    prompt = request("a", 20, prefix=[1, 2])
    kv.take(5)
    held = kv.publish(prompt, 0, 9)
    assert held == 1
    assert kv.publish(prompt, held, 20) == 2
    assert kv.used == 5


def test_taking_on_each_rank_is_taking_on_one_after_the_other():
    roomy, caching, full = PagedKv(10, 4), PagedKv(4, 4), PagedKv(2, 4)
    cached(caching, "a", [1, 2])
    full.take(2)
    assert take_each([roomy, caching, full, roomy], [3, 2, 1, 0]) == [2]
    assert (roomy.used, caching.used, caching.cached, full.used) == (3, 2, 2, 2)
