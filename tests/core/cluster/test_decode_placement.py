"""SBS decode placement: longest first to the least (requests, KV, index), KV outliers masked."""

import pytest
from cluster_scripts import dispatches, host_of, snapshot
from hypothesis import given
from hypothesis import strategies as st

from headway.core.cluster.decode_placement import iqr_cut, quartiles
from headway.core.events import Arrived, Role
from headway.testing import arrived, request, up


def decode_host(ranks, kv=None, batch=None, *, spec="iqr-lexicographic", **info):
    """A decode instance whose ranks hold `batch` requests each and report `kv` blocks."""
    host = host_of(spec)
    host.run([(0.0, up("decode-0", role=Role.AGGREGATED, ranks=ranks, **info))])
    number = 0
    for rank, count in enumerate(batch or ()):
        for _ in range(count):
            number += 1
            ledger = host.policy.ledger
            ledger.place(request(f"old-{number}", prompt=1), ledger.ranks[rank], 0.0, "test")
            host.check.numbers["decode-0"] += 1
    if kv is not None:
        host.run([(0.5, snapshot("decode-0", 1, acknowledged=number, kv_blocks=tuple(kv)))])
    return host


def place(host, *prompts, at=1.0):
    host.run([(at, Arrived(request(f"r{n}", at=at, prompt=prompt))) for n, prompt in enumerate(prompts, 1)])
    return [(name, rank) for _, name, _, rank in dispatches(host)]


# The oracles of the design (algorithms.md §4).


def test_a_rank_out_of_line_in_kv_is_masked_though_its_batch_is_smallest():
    assert place(decode_host(4, kv=[10, 12, 14, 100], batch=[1, 1, 1, 0]), 1) == [("r1", 0)]


def test_under_4_candidates_nothing_is_masked():
    assert place(decode_host(3, kv=[10, 12, 100], batch=[1, 1, 0]), 1) == [("r1", 2)]


def test_longest_first_and_the_load_is_counted_at_once():
    host = decode_host(2, kv=[0, 1], block_tokens=16)
    assert place(host, 1, 33) == [("r2", 0), ("r1", 1)]
    assert [rank.kv_blocks for rank in host.policy.ledger.ranks] == [3, 2]


# The order: requests, then KV, then index.


def test_fewest_requests_come_before_least_kv():
    assert place(decode_host(2, kv=[5, 50], batch=[1, 0]), 1) == [("r1", 1)]


def test_of_equal_batches_the_least_kv():
    assert place(decode_host(3, kv=[9, 7, 8]), 1) == [("r1", 1)]


def test_of_equal_kv_the_first_rank():
    assert place(decode_host(3, kv=[7, 7, 7]), 1) == [("r1", 0)]


def test_a_round_spreads():
    host = decode_host(4)
    assert sorted(rank for _, rank in place(host, *range(1, 9))) == [0, 0, 1, 1, 2, 2, 3, 3]


# The mask.


def test_quartiles_interpolate_between_order_statistics():
    assert quartiles([10, 12, 14, 100]) == (11.5, 35.5)
    assert quartiles([5]) == (5, 5)


def test_the_cut_is_tukeys_fence():
    assert iqr_cut([100, 10, 14, 12], 1.5) == 35.5 + 1.5 * 24.0
    assert iqr_cut([7, 7, 7, 7], 1.5) == 7.0


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_the_cut_never_masks_all(loads):
    assert min(loads) <= iqr_cut(loads, 0.0)


def test_the_fence_is_a_setting():
    """K = [10, 12, 14, 30]: cut 18 + 1.5·6.5 = 27.75, with a fence of 2 it is 31."""
    loads, batch = [10, 12, 14, 30], [1, 1, 1, 0]
    assert place(decode_host(4, kv=loads, batch=batch), 1) == [("r1", 0)]
    assert place(decode_host(4, kv=loads, batch=batch, spec="iqr-lexicographic:fence=2"), 1) == [("r1", 3)]


def test_how_many_candidates_make_a_mask_is_a_setting():
    spec = "iqr-lexicographic:mask_from=5"
    assert place(decode_host(4, kv=[10, 12, 14, 100], batch=[1, 1, 1, 0], spec=spec), 1) == [("r1", 3)]


def test_ranks_without_room_are_no_candidates():
    assert place(decode_host(2, kv=[100, 99], batch=[0, 1], kv_blocks=100), 1) == [("r1", 1)]


def test_ranks_without_a_seat_are_no_candidates():
    assert place(decode_host(2, kv=[0, 50], batch=[2, 1], max_running=2), 1) == [("r1", 1)]


def test_when_none_is_left_all_are_used():
    host = decode_host(2, kv=[100, 100], batch=[2, 1], kv_blocks=100)
    assert place(host, 1) == [("r1", 1)]


def test_more_requests_than_seats_are_placed_all_the_same():
    """The engine queues them: what has its prompt computed is not refused."""
    assert len(place(decode_host(2, max_running=1), 1, 1, 1, 1, 1)) == 5


# Rounds.


def test_a_round_is_all_that_arrives_at_one_instant():
    host = decode_host(2, block_tokens=16)
    host.feed(arrived("short", at=1.0, prompt=1), 1.0)
    assert [h.why for h in host.policy.held()] == ["its round is gathering"]
    assert host.policy.wake_at() == 1.0
    host.feed(arrived("long", at=1.0, prompt=500), 1.0)
    host.wait(1.0)
    assert dispatches(host) == [(1.0, "long", "decode-0", 0), (1.0, "short", "decode-0", 1)]
    assert host.policy.wake_at() is None


def test_with_no_instance_a_round_waits_for_one():
    host = host_of("iqr-lexicographic")
    host.run([(1.0, arrived("r1", at=1.0)), (2.0, up("engine-0", ranks=2))])
    assert dispatches(host) == [(2.0, "r1", "engine-0", 0)]


def test_rounds_a_late_host_merges_are_one_round():
    host = decode_host(2)
    host.lateness_s = 0.5
    host.run([(1.0, arrived("r1", at=1.0, prompt=1)), (1.2, arrived("r2", at=1.2, prompt=90))], until=5.0)
    assert [name for _, name, *_ in dispatches(host)] == ["r2", "r1"]


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=60), st.integers(1, 9))
def test_equal_ranks_get_equal_batches(prompts, ranks):
    host = decode_host(ranks, spec="iqr-lexicographic:mask_from=1000")
    place(host, *prompts)
    counts = [rank.requests for rank in host.policy.ledger.ranks]
    assert sum(counts) == len(prompts)
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("spec", ["iqr-lexicographic:mask_from=0", "iqr-lexicographic:fence=-1"])
def test_settings_have_bounds(spec):
    with pytest.raises(Exception, match="must be at least"):
        host_of(spec)
