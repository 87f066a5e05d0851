"""Which replica leads which pool: the same everywhere, evenly, and moved only as far as must be."""

from collections import Counter

from headway.core.sharding import preference

REPLICAS = ["gw-0", "gw-1", "gw-2", "gw-3"]
POOLS = [f"pool-{n}" for n in range(400)]


def test_the_order_is_that_of_the_names_not_of_the_list():
    for pool in POOLS[:20]:
        assert preference(pool, REPLICAS) == preference(pool, reversed(REPLICAS))
        assert sorted(preference(pool, REPLICAS)) == REPLICAS


def test_it_is_the_same_in_every_version_and_process():
    assert [preference(f"pool-{n}", REPLICAS)[0] for n in range(4)] == ["gw-2", "gw-2", "gw-0", "gw-0"]


def test_pools_spread_over_replicas():
    first = Counter(preference(pool, REPLICAS)[0] for pool in POOLS)
    assert set(first) == set(REPLICAS)
    assert max(first.values()) < 1.35 * len(POOLS) / len(REPLICAS)


def test_when_a_replica_goes_its_pools_alone_move_each_to_its_next_choice():
    for pool in POOLS:
        first, second, *_ = preference(pool, REPLICAS)
        for gone in REPLICAS:
            left = [replica for replica in REPLICAS if replica != gone]
            assert preference(pool, left)[0] == (second if gone == first else first)


def test_twice_the_same_name_is_one_replica():
    assert preference("p", ["a", "a", "b"]) in (["a", "b"], ["b", "a"])
