"""The fits have the statistics the traces were published with."""

import os
from itertools import pairwise
from pathlib import Path
from statistics import correlation, mean, stdev

import pytest

from headway.core.errors import ConfigError
from headway.workload import Workload, load_trace, make_items, parametric, parametric_names
from headway.workload.parametric import PROBABILITIES, Lengths

SHARED = Path(os.environ.get("HEADWAY_SHARED", Path(__file__).parents[3] / "shared")) / "traces"

# As published: mean, p50, p95, p99.
PROMPTS = {
    "azure-conv": (1155, 1020, 4083, 4142),
    "azure-code": (2048, 1469, 7303, 7436),
    "mooncake-conversation": (12035, 6909, 39551, 85400),
    "deepseek-r1": (1015, 291, 3284, 19150),
}
OUTPUTS = {
    "azure-conv": (211, 129, 451, 601),
    "azure-code": (28, 13, 90, 251),
    "mooncake-conversation": (343, 350, 698, 1119),
    "deepseek-r1": (782, 463, 1670, 8779),
}
RATES = {"azure-conv": 5.53, "azure-code": 2.57, "mooncake-conversation": 3.40, "deepseek-r1": 20.0}
# The CV, and how near a sample of 10,000 comes: at a CV of 13 its own is uncertain.
CVS = {
    "azure-conv": (1.09, 0.03),
    "azure-code": (13.2, 0.2),
    "mooncake-conversation": (3.0, 0.03),
    "deepseek-r1": (1.28, 0.03),
}
RANK_CORRELATIONS = {
    "azure-conv": 0.073,
    "azure-code": -0.023,
    "mooncake-conversation": 0.072,
    "deepseek-r1": 0.383,
}
FILES = {
    "azure-conv": "azure2023_conv.csv.gz",
    "azure-code": "azure2023_code.csv.gz",
    "mooncake-conversation": "mooncake_conversation.jsonl.gz",
    "deepseek-r1": "servegen_deepseek-r1_1800s_20rps.csv.gz",
}
NAMES = list(FILES)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Workload]:
    return {name: parametric(name, 10_000, seed=1) for name in NAMES}


def statistics(lengths: list[int]) -> tuple[float, ...]:
    ordered = sorted(lengths)
    return mean(ordered), *(ordered[int(p * len(ordered))] for p in (0.5, 0.95, 0.99))


def ranks(lengths: list[int]) -> list[int]:
    ranked = [0] * len(lengths)
    for rank, row in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        ranked[row] = rank
    return ranked


def test_names() -> None:
    assert sorted(parametric_names()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_within_one_percent_of_the_published(drawn: dict[str, Workload], name: str) -> None:
    items = drawn[name].items
    assert statistics(list(items.prompt_tokens)) == pytest.approx(PROMPTS[name], rel=0.01)
    assert statistics(list(items.output_tokens)) == pytest.approx(OUTPUTS[name], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_two_seeds_carry_the_same_load_in_another_order(drawn: dict[str, Workload], name: str) -> None:
    other = parametric(name, 1_000, seed=2)
    assert other.mean_prompt_tokens == pytest.approx(drawn[name].mean_prompt_tokens, rel=0.01)
    assert other.mean_output_tokens == pytest.approx(drawn[name].mean_output_tokens, rel=0.02)
    assert list(other.items) != list(parametric(name, 1_000, seed=3).items)
    assert list(other.items) == list(parametric(name, 1_000, seed=2).items)


@pytest.mark.parametrize("name", NAMES)
def test_rate_is_the_published(drawn: dict[str, Workload], name: str) -> None:
    assert drawn[name].native_rps == pytest.approx(RATES[name], rel=0.002)
    assert drawn[name].items[0].arrival_s == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_burstiness_is_the_published(drawn: dict[str, Workload], name: str) -> None:
    cv, within = CVS[name]
    gaps = [later - earlier for earlier, later in pairwise(drawn[name].items.arrivals_s)]
    assert stdev(gaps) / mean(gaps) == pytest.approx(cv, rel=within)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_output_go_together_as_in_the_trace(drawn: dict[str, Workload], name: str) -> None:
    items = drawn[name].items
    found = correlation(ranks(list(items.prompt_tokens)), ranks(list(items.output_tokens)))
    assert found == pytest.approx(RANK_CORRELATIONS[name], abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_the_fit_is_that_of_the_file(drawn: dict[str, Workload], name: str) -> None:
    """The Kolmogorov distance between fit and trace, at the trace's own deciles."""
    if not (SHARED / FILES[name]).exists():
        pytest.skip("the trace files are not here")
    trace = load_trace(SHARED / FILES[name])
    for column in ("prompt_tokens", "output_tokens"):
        recorded, fitted = getattr(trace.items, column), getattr(drawn[name].items, column)
        for cut in sorted(recorded)[:: len(recorded) // 10]:
            share = [
                sum(tokens <= cut for tokens in tokens_of) / len(tokens_of)
                for tokens_of in (recorded, fitted)
            ]
            assert share[0] == pytest.approx(share[1], abs=0.03)


def test_mooncake_shares_as_much_prefix_as_the_trace(drawn: dict[str, Workload]) -> None:
    assert drawn["mooncake-conversation"].reusable_prompt_share == pytest.approx(0.373, abs=0.02)


def test_mooncake_trace_shares_what_the_fit_aims_at() -> None:
    if not (SHARED / FILES["mooncake-conversation"]).exists():
        pytest.skip("the trace files are not here")
    trace = load_trace(SHARED / FILES["mooncake-conversation"])
    assert trace.reusable_prompt_share == pytest.approx(0.3734, abs=0.0001)


def test_prefixes_are_full_blocks_that_name_all_the_text_before_them(drawn: dict[str, Workload]) -> None:
    before: dict[int, tuple[int, ...]] = {}
    for item in drawn["mooncake-conversation"].items:
        assert len(item.prefix) == item.prompt_tokens // 512
        assert item.prefix_block_tokens == 512
        for at, block in enumerate(item.prefix):
            assert before.setdefault(block, item.prefix[:at]) == item.prefix[:at]


def test_the_others_share_nothing(drawn: dict[str, Workload]) -> None:
    assert all(drawn[name].items.prefixes == [] for name in NAMES if name != "mooncake-conversation")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("requests", [1, 2, 50])
def test_small_ones_run_too(name: str, requests: int) -> None:
    workload = parametric(name, requests)
    assert len(make_items(workload, rps=1.0, arrivals="poisson")) == requests


def test_a_length_is_between_the_shortest_and_the_longest() -> None:
    lengths = Lengths(tuple(range(10, 10 + len(PROBABILITIES))), bend=1.2)
    assert (lengths.at(0.0), lengths.at(1.0)) == (10, 9 + len(PROBABILITIES))


def test_refused() -> None:
    with pytest.raises(ConfigError, match="unknown workload 'azure-cove': did you mean 'azure-co"):
        parametric("azure-cove")
    with pytest.raises(ConfigError, match="requests must be at least 1, got 0"):
        parametric("azure-conv", 0)
