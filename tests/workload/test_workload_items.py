"""Items in columns behave as a sequence; a workload refuses what no run could use."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.errors import ConfigError
from headway.workload import Item, Items, Workload

blocks = st.lists(st.integers(0, 99), max_size=4).map(tuple)
items = st.builds(
    lambda arrival_s, prompt, output, prefix: Item(arrival_s, prompt, output, prefix, 16 if prefix else 0),
    st.floats(0.0, 1e6),
    st.integers(1, 2**31 - 1),
    st.integers(1, 2**31 - 1),
    blocks,
)


@given(st.lists(items))
def test_what_is_packed_comes_back(rows: list[Item]) -> None:
    packed = Items.of(rows)
    assert list(packed) == rows
    assert packed[1:3] == rows[1:3]
    assert len(packed) == len(rows)
    assert not rows or packed[-1] == rows[-1]


def test_columns_stay_small() -> None:
    packed = Items()
    for row in range(10_000):
        packed.append(float(row), 1000, 100)
    columns = (packed.arrivals_s, packed.prompt_tokens, packed.output_tokens)
    assert sum(column.itemsize * len(column) for column in columns) == 16 * 10_000
    assert packed.prefixes == []


def test_means_and_rate() -> None:
    workload = Workload("w", [Item(1.0, 10, 1), Item(1.5, 20, 2), Item(2.0, 60, 6)], "by hand")
    assert (workload.mean_prompt_tokens, workload.mean_output_tokens) == (30.0, 3.0)
    assert (workload.span_s, workload.native_rps) == (1.0, 2.0)


def test_all_at_once_has_no_finite_rate() -> None:
    assert Workload("w", [Item(3.0, 10, 1)], "").native_rps == math.inf
    assert Workload("w", [Item(3.0, 10, 1), Item(3.0, 10, 1)], "").native_rps == math.inf


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no requests"),
        ([Item(0.0, 0, 1)], "at least 1 token"),
        ([Item(0.0, 1, 0)], "at least 1 token"),
        ([Item(2.0, 1, 1), Item(1.0, 1, 1)], "arrivals go back from 2 s to 1 s"),
        ([Item(math.nan, 1, 1)], "finite"),
        ([Item(0.0, 1, 1, (1,), 16), Item(0.0, 1, 1, (1,), 512)], "one size"),
    ],
)
def test_refused(rows: list[Item], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Workload("w", rows, "by hand")
