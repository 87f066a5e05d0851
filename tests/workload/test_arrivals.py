"""Load is scaled by compressing time; gaps are recorded, Poisson or Gamma; every draw is seeded."""

from itertools import pairwise
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.errors import ConfigError
from headway.workload import Item, Workload, make_items

THREE = Workload("three", [Item(5.0, 10, 1), Item(6.0, 20, 2), Item(9.0, 30, 3)], "by hand")
SHARED = Workload(
    "shared", [Item(0.0, 40, 1, (0, 1), 16), Item(1.0, 20, 2), Item(3.0, 50, 3, (0, 1, 2), 16)], "by hand"
)
MANY = Workload("many", [Item(float(row), 1 + row, 1) for row in range(1000)], "by hand")


def gaps(items: list[Item]) -> list[float]:
    return [later.arrival_s - earlier.arrival_s for earlier, later in pairwise(items)]


def test_recorded_compresses_time_and_drops_nothing() -> None:
    assert make_items(THREE, rps=2.0) == [Item(0.0, 10, 1), Item(0.25, 20, 2), Item(1.0, 30, 3)]


def test_recorded_takes_the_first_rows_at_the_rate_asked_for() -> None:
    assert make_items(THREE, rps=4.0, requests=2) == [Item(0.0, 10, 1), Item(0.25, 20, 2)]


def test_recorded_repeats_a_short_trace_end_to_end_with_a_mean_gap_at_the_seam() -> None:
    # Gaps as recorded: 1, 3, then the mean of 2 s, then 1 again: 7 s for 4 gaps; asked for: 4 s.
    assert [(i.arrival_s * 7 / 4, i.prompt_tokens) for i in make_items(THREE, rps=1.0, requests=5)] == [
        (0.0, 10),
        (1.0, 20),
        (4.0, 30),
        (6.0, 10),
        (7.0, 20),
    ]


def test_repeats_are_other_conversations() -> None:
    lap, again = (make_items(SHARED, rps=1.0, requests=6)[cut] for cut in (slice(3), slice(3, 6)))
    assert [item.prefix for item in lap] == [(0, 1), (), (0, 1, 2)]
    assert [item.prefix for item in again] == [(3, 4), (), (3, 4, 5)]
    assert [item.prefix_block_tokens for item in again] == [16, 0, 16]


@given(
    rps=st.floats(0.01, 1e4),
    requests=st.integers(2, 12),
    arrivals=st.sampled_from(["recorded", "poisson", "gamma:0.5", "gamma:4"]),
    seed=st.integers(0, 9),
)
def test_any_run_is_complete_ordered_and_repeatable(
    rps: float, requests: int, arrivals: str, seed: int
) -> None:
    items = make_items(THREE, rps=rps, requests=requests, arrivals=arrivals, seed=seed)
    assert len(items) == requests
    assert all(gap >= 0.0 for gap in gaps(items))
    assert items == make_items(THREE, rps=rps, requests=requests, arrivals=arrivals, seed=seed)
    # Each row as often as any other, give or take the last, partial round.
    drawn = [item.prompt_tokens for item in items]
    assert all(drawn.count(prompt) in (requests // 3, -(-requests // 3)) for prompt in (10, 20, 30))
    if arrivals == "recorded":
        assert (requests - 1) / items[-1].arrival_s == pytest.approx(rps)


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma:0.5", 0.5), ("gamma:2", 2.0)])
def test_drawn_gaps_have_their_rate_and_burstiness(arrivals: str, cv: float) -> None:
    drawn = gaps(make_items(MANY, rps=10.0, arrivals=arrivals, requests=40_000, seed=1))
    assert mean(drawn) == pytest.approx(0.1, rel=0.03)
    assert stdev(drawn) / mean(drawn) == pytest.approx(cv, rel=0.03)


def test_seeds_shuffle_rows_whatever_the_process() -> None:
    first = make_items(MANY, rps=1.0, arrivals="poisson", seed=1)
    burst = make_items(MANY, rps=9.0, arrivals="gamma:3", seed=1)
    other = make_items(MANY, rps=1.0, arrivals="poisson", seed=2)
    assert [i.prompt_tokens for i in first] == [i.prompt_tokens for i in burst]
    assert [i.prompt_tokens for i in first] != [i.prompt_tokens for i in other]
    assert {i.prompt_tokens for i in first} == {i.prompt_tokens for i in other}


def test_rows_that_share_prefixes_keep_their_order_from_a_random_row() -> None:
    orders = {
        tuple(item.prompt_tokens for item in make_items(SHARED, rps=1.0, arrivals="poisson", seed=seed))
        for seed in range(20)
    }
    assert orders == {(40, 20, 50), (20, 50, 40), (50, 40, 20)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rps": 0.0}, "rps must be a positive number of requests per second, got 0.0"),
        ({"rps": float("nan")}, "rps must be a positive"),
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"arrivals": "poison"}, "unknown arrivals 'poison': did you mean 'poisson'"),
        ({"arrivals": "gamma"}, "'gamma': write gamma:CV"),
        ({"arrivals": "gamma:x"}, "'gamma:x': write gamma:CV"),
        ({"arrivals": "gamma:0"}, "above 0"),
        ({"arrivals": "gamma:-1"}, "above 0"),
        ({"arrivals": "gamma:1e9"}, "at most 100"),
        ({"arrivals": "poisson:2"}, "poisson takes no value"),
    ],
)
def test_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_items(THREE, **{"rps": 1.0, **options})  # type: ignore[arg-type]


def test_no_time_to_compress() -> None:
    burst = Workload("burst", [Item(0.0, 10, 1), Item(0.0, 20, 2)], "by hand")
    with pytest.raises(ConfigError, match="workload burst: its first 2 rows all come at once"):
        make_items(burst, rps=1.0)
    assert make_items(burst, rps=1.0, requests=1) == [Item(0.0, 10, 1)]
    assert len(make_items(burst, rps=1.0, arrivals="poisson")) == 2
