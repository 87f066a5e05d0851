"""The pour: evenly over the ranks of one instance, nothing twice, what fits nowhere stays."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.cluster.allocation import Bin, pour
from headway.testing import request


def bins_of(*rooms, chunk=1000):
    return [Bin(key, room, chunk) for key, room in enumerate(rooms)]


def requests_of(*prompts):
    return [request(f"r{n}", prompt=prompt) for n, prompt in enumerate(prompts, 1)]


def placed(pairs):
    return {req.id: key for req, key in pairs}


def hits_of(table):
    """Build `hits` from {request: {rank: tokens}}."""
    return lambda req: table.get(req.id, {}).items()


def test_each_goes_where_most_room_is_left():
    bins = bins_of(500, 900, 700)
    assert placed(pour(requests_of(300, 100, 300), bins)) == {"r1": 1, "r2": 2, "r3": 1}
    assert [b.room for b in bins] == [500, 300, 600]


def test_of_equal_rooms_the_one_given_first():
    assert placed(pour(requests_of(10, 10, 10), bins_of(100, 100))) == {"r1": 0, "r2": 1, "r3": 0}
    backwards = bins_of(100, 100)[::-1]
    assert placed(pour(requests_of(10, 10, 10), backwards)) == {"r1": 1, "r2": 0, "r3": 1}


def test_longest_first_is_even():
    """LPT: 7 6 5 4 over two ranks is 11 and 11."""
    bins = bins_of(20, 20)
    assert placed(pour(requests_of(7, 6, 5, 4), bins)) == {"r1": 0, "r2": 1, "r3": 1, "r4": 0}
    assert [b.room for b in bins] == [9, 9]


def test_what_fits_nowhere_stays_and_the_shorter_behind_it_goes():
    assert placed(pour(requests_of(600, 600, 400), bins_of(1000, 500))) == {"r1": 0, "r3": 1}


def test_an_exact_fit_fits():
    bins = bins_of(400)
    assert placed(pour(requests_of(400, 1), bins)) == {"r1": 0}
    assert bins[0].room == 0


def test_ranks_without_room_get_nothing():
    assert pour(requests_of(1), bins_of(0, -500)) == []
    assert pour(requests_of(1), []) == []


# Prompts longer than a chunk.


def test_a_long_prompt_takes_a_whole_chunk_and_its_rest_stays_as_debt():
    bins = bins_of(1000, 1000)
    assert placed(pour(requests_of(2500, 900, 100), bins)) == {"r1": 0, "r2": 1, "r3": 1}
    assert [b.room for b in bins] == [-1500, 0]


def test_a_long_prompt_needs_a_whole_chunk_free():
    assert pour(requests_of(2500), bins_of(999, 500)) == []
    assert placed(pour(requests_of(2500), bins_of(999, 1000))) == {"r1": 1}


# Prefix hits.


def test_a_hit_makes_a_prompt_cheaper():
    bins = bins_of(1000, 800)
    assert placed(pour(requests_of(600), bins, hits=hits_of({"r1": {1: 500}}))) == {"r1": 1}
    assert [b.room for b in bins] == [1000, 700]


def test_a_hit_does_not_outweigh_a_full_rank():
    bins = bins_of(1000, 300)
    assert placed(pour(requests_of(600), bins, hits=hits_of({"r1": {1: 500}}))) == {"r1": 0}


def test_a_prompt_costs_a_token_at_least():
    bins = bins_of(10)
    pour(requests_of(600), bins, hits=hits_of({"r1": {0: 600}}))
    assert bins[0].room == 9


def test_hits_on_ranks_that_are_not_poured_into_do_not_count():
    assert placed(pour(requests_of(10), bins_of(100), hits=hits_of({"r1": {7: 9}}))) == {"r1": 0}


def test_a_hit_on_a_rank_where_it_does_not_fit_hides_no_other():
    """A 2500-token prompt: rank 1 would end with less debt, but has no whole chunk free; rank 0 has."""
    hits = hits_of({"r1": {1: 1000}})
    assert placed(pour(requests_of(2500), bins_of(1000, 500), hits=hits)) == {"r1": 0}


# Overflow: when every pass will be full.


def test_with_overflow_a_prompt_runs_over_into_the_next_pass():
    bins = bins_of(300, 200)
    assert placed(pour(requests_of(500, 500, 1), bins, overflow=True)) == {"r1": 0, "r2": 1}
    assert [b.room for b in bins] == [-200, -300]


# Properties.

prompts = st.lists(st.integers(1, 3000), max_size=40)
rooms = st.lists(st.integers(-500, 1000), min_size=1, max_size=8)
hit_tables = st.dictionaries(
    st.integers(1, 40).map(lambda n: f"r{n}"),
    st.dictionaries(st.integers(0, 9), st.integers(1, 2999), max_size=3),
)


def capped(table, requests):
    """A hit is at most all but one token of the prompt."""
    lengths = {req.id: req.prompt_tokens for req in requests}
    return {
        name: {key: min(hit, lengths[name] - 1) for key, hit in by.items()}
        for name, by in table.items()
        if name in lengths
    }


@given(prompts, rooms, hit_tables, st.booleans())
def test_nothing_is_placed_twice_and_the_rooms_add_up(prompts, rooms, table, overflow):
    requests, bins = requests_of(*prompts), bins_of(*rooms)
    table = capped(table, requests)
    pairs = pour(requests, bins, hits=hits_of(table), overflow=overflow)
    assert len({req.id for req, _ in pairs}) == len(pairs)
    for b, room in zip(bins, rooms, strict=True):
        costs = [
            req.prompt_tokens - table.get(req.id, {}).get(b.key, 0) for req, key in pairs if key == b.key
        ]
        assert room - sum(max(1, cost) for cost in costs) == b.room


@given(prompts, rooms, hit_tables)
def test_without_overflow_no_room_is_overdrawn_but_by_a_long_prompt(prompts, rooms, table):
    requests, bins = requests_of(*prompts), bins_of(*rooms)
    pairs = pour(requests, bins, hits=hits_of(capped(table, requests)))
    for b, room in zip(bins, rooms, strict=True):
        longest = max((req.prompt_tokens for req, key in pairs if key == b.key), default=0)
        assert b.room >= min(room, 0) or longest > b.chunk


@given(prompts, rooms, hit_tables, st.booleans())
def test_leftovers_fitted_nowhere_when_they_were_tried(prompts, rooms, table, overflow):
    requests, bins = requests_of(*prompts), bins_of(*rooms)
    table = capped(table, requests)
    went = placed(pour(requests, bins, hits=hits_of(table), overflow=overflow))
    left = dict(enumerate(rooms))
    for req in requests:
        cost = {key: max(1, req.prompt_tokens - table.get(req.id, {}).get(key, 0)) for key in left}
        fit = [k for k in left if min(cost[k], 1000) <= left[k] or (overflow and left[k] > 0)]
        assert (req.id in went) == bool(fit), req
        if fit:
            assert left[went[req.id]] - cost[went[req.id]] == max(left[k] - cost[k] for k in fit)
            left[went[req.id]] -= cost[went[req.id]]


def loads_after_longest_first(prompts, ranks):
    bins = bins_of(*[10**6] * ranks, chunk=10**6)
    assert len(pour(requests_of(*sorted(prompts, reverse=True)), bins)) == len(prompts)
    return [10**6 - b.room for b in bins]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 6))
def test_no_two_ranks_differ_by_more_than_the_longest_prompt(prompts, ranks):
    loads = loads_after_longest_first(prompts, ranks)
    assert max(loads) - min(loads) <= max(prompts)


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(1, 3))
def test_longest_first_is_within_4_thirds_of_the_best_possible(prompts, ranks):
    """Graham 1969: LPT's fullest rank has at most 4/3 − 1/(3m) of the optimum, found here by trying all."""
    best = min(
        max(sum(p for p, at in zip(prompts, ways, strict=True) if at == rank) for rank in range(ranks))
        for ways in itertools.product(range(ranks), repeat=len(prompts))
    )
    assert max(loads_after_longest_first(prompts, ranks)) <= best * (4 / 3 - 1 / (3 * ranks)) + 1e-9
