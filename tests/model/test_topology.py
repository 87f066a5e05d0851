"""Which clusters a number of GPUs can be made into, and what is refused with which numbers."""

import pytest

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.model.presets import PRESETS
from headway.model.topology import Topology, topologies

ONE = {
    "systems": ["h200"],
    "gpus": 64,
    "prefill_ep": [8],
    "decode_ep": [32],
    "ratios": [(3, 1)],
    "chunks": [4096],
}


def explore(**changes):
    found, refused = topologies(**{**ONE, **changes})
    return list(found), [(refusal.topology.name, refusal.why) for refusal in refused]


def test_the_preset_is_one_of_them():
    (topology,), refused = explore()
    assert refused == []
    assert topology == Topology("h200", 3, 8, 1, 32, 4096)
    assert (topology.gpus, topology.name, topology.pools) == (
        56,
        "dsv3-h200-3xep8-1xep32-c4096",
        "3×EP8 + 1×EP32",
    )
    preset = PRESETS["dsv3-h200-pd"]
    assert topology.cluster().model_copy(update={"name": preset.name}) == preset


def test_a_ratio_is_repeated_as_often_as_it_goes_into_the_gpus():
    assert explore(decode_ep=[8], ratios=[(1, 1), (3, 1)])[0] == [
        Topology("h200", 4, 8, 4, 8, 4096),
        Topology("h200", 6, 8, 2, 8, 4096),
    ]
    assert explore(decode_ep=[8], ratios=[(2, 1)])[0] == [Topology("h200", 4, 8, 2, 8, 4096)]  # 48 of 64


def test_without_a_number_of_gpus_a_ratio_is_taken_once():
    assert explore(gpus=None, ratios=[(1, 1), (9, 4)])[0] == [
        Topology("h200", 1, 8, 1, 32, 4096),
        Topology("h200", 9, 8, 4, 32, 4096),
    ]


def test_ratios_that_come_to_the_same_are_one():
    assert explore(decode_ep=[8], ratios=[(1, 1), (2, 2)])[0] == [Topology("h200", 4, 8, 4, 8, 4096)]


def test_pools_and_chunk_are_what_was_asked_for():
    cluster = Topology("h100", 2, 16, 3, 64, 2048).cluster()
    prefill, decode = cluster.pool(Role.PREFILL), cluster.pool(Role.DECODE)
    assert (prefill.instances, prefill.ranks, prefill.token_cap) == (2, 16, 2048)
    assert (decode.instances, decode.ranks) == (3, 64)
    assert prefill.costs != decode.costs
    assert "2 × EP16 prefill and 3 × EP64 decode" in cluster.source


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gpus": 48}, "needs 56 GPUs, there are 48"),
        (
            {"systems": ["h100"]},
            "pools[0] (prefill): cannot hold the model: 98.7 GB of weights and 4 GB of reserve per GPU leave "
            "no KV in 72.0 GB (0.9 of 80 GB)",
        ),
        (
            {"decode_ep": [24]},
            "no step times are measured for EP24 on H200 (there are: EP8, EP16, EP32, EP64)",
        ),
        ({"chunks": [32768]}, "chunks of 32,768 tokens were not measured, only 64 to 16,384"),
    ],
)
def test_what_cannot_be_is_refused_with_its_numbers(changes: dict, why: str):
    found, refused = explore(**changes)
    assert found == []
    assert [reason for _, reason in refused] == [why]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"systems": ["h20"]}, "unknown system 'h20': did you mean 'h200'"),
        ({"gpus": 0}, "must be at least 1"),
        ({"prefill_ep": [0]}, "must be at least 1"),
        ({"ratios": [(1, 0)]}, "must be at least 1"),
    ],
)
def test_what_is_no_topology_is_an_error(changes: dict, message: str):
    with pytest.raises(ConfigError) as caught:
        explore(**changes)
    assert message in str(caught.value)
