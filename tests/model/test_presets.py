"""The clusters that come with Headway, and how much they can take."""

import pytest

from headway.core.errors import ConfigError
from headway.core.events import Role
from headway.model.presets import PRESETS, load_cluster, nominal_capacity_rps

CONVERSATION = (1155, 211)
CODE = (2048, 28)


def test_names():
    assert list(PRESETS) == [
        "dsv3-h200-pd",
        "dsv3-h100-pd",
        "llama8b-h100",
        "llama8b-a100",
        "qwen3-8b-h100",
        "qwen3-8b-a100",
        "llama8b-h100-x4",
        "qwen3-8b-a100-x4",
    ]


@pytest.mark.parametrize("spec", PRESETS.values(), ids=list(PRESETS))
def test_every_preset_says_what_it_rests_on(spec):
    assert "aiconfigurator 0.12 (Apache-2.0)" in spec.source
    assert "assumed, not measured" in spec.source
    assert all(pool.kv_tokens > 100_000 for pool in spec.pools)


def test_ranks_of_the_disaggregated():
    sizes = {
        name: [(pool.role, pool.instances, pool.ranks) for pool in PRESETS[name].pools]
        for name in ("dsv3-h200-pd", "dsv3-h100-pd")
    }
    assert sizes == {
        "dsv3-h200-pd": [(Role.PREFILL, 3, 8), (Role.DECODE, 1, 32)],
        "dsv3-h100-pd": [(Role.PREFILL, 3, 16), (Role.DECODE, 2, 32)],
    }


def test_loading_by_name_or_file(tmp_path):
    assert load_cluster("llama8b-h100") is PRESETS["llama8b-h100"]
    with pytest.raises(
        ConfigError, match="unknown cluster preset 'lama8b-h100': did you mean 'llama8b-h100'"
    ):
        load_cluster("lama8b-h100")
    with pytest.raises(ConfigError, match=r"gone.toml: cannot read"):
        load_cluster(str(tmp_path / "gone.toml"))


def test_eight_h100_cannot_hold_deepseek():
    with pytest.raises(ConfigError, match=r"cannot hold the model: 98.7 GB"):
        PRESETS["dsv3-h100-pd"].with_pool(Role.PREFILL, ranks=8)


def test_prefill_capacity_by_hand():
    # A chunk of 4,096 of prompts of 2,048: Q = 4,096·1,024 = 4.194 M. In ms, H200 EP8:
    local = 7.375 + 0.03856 * 4096 + 7.366 * 4.194304
    sync = 39.736 + 0.05623 * 4096
    pass_s = (local + sync + 1.0) / 1000
    rps = 3 * 8 * 4096 / (pass_s * 2048)
    assert nominal_capacity_rps(PRESETS["dsv3-h200-pd"], *CODE) == pytest.approx(rps)


def test_decode_capacity_by_hand():
    spec = PRESETS["dsv3-h200-pd"].with_pool(Role.PREFILL, instances=100)
    context = 1155 + 105.5
    step = 9.757 + 0.01147 * 128 + 0.03257 * 128 * context / 1000 + 8.784 + 0.23239 * 128 + 1.0
    rps = 32 * 128 / (step / 1000 * 210)
    assert nominal_capacity_rps(spec, *CONVERSATION) == pytest.approx(rps)


def test_aggregated_capacity_by_hand():
    # 256 seats bind; beside them 256·1,155/211 prompt tokens a step.
    chunk, context = 256 * 1155 / 211, 256 * (1155 + 105.5)
    new = 256 + chunk
    step = 6.433 + 0.008698 * 448 + 0.02068 * (new - 448) + 0.0423 * context / 1e3
    step += 0.7743 * chunk * 577.5 / 1e6 + 1.0
    rps = 256 / (211 * step / 1000)
    assert nominal_capacity_rps(PRESETS["llama8b-h100"], *CONVERSATION) == pytest.approx(rps)
    assert nominal_capacity_rps(PRESETS["llama8b-h100-x4"], *CONVERSATION) == pytest.approx(4 * rps)


def test_token_cap_binds_where_prompts_are_long():
    spec = PRESETS["llama8b-h100"]
    narrow = spec.with_pool(Role.AGGREGATED, token_cap=512)
    assert nominal_capacity_rps(narrow, *CODE) < nominal_capacity_rps(spec, *CODE)


def test_single_token_answers_need_no_decode():
    assert nominal_capacity_rps(PRESETS["dsv3-h200-pd"], 1000, 1) > 0


@pytest.mark.parametrize("name", ["dsv3-h200-pd", "dsv3-h100-pd"])
@pytest.mark.parametrize("lengths", [CONVERSATION, CODE])
def test_decode_is_not_the_bottleneck_and_meets_its_target_at_capacity(name, lengths):
    spec = PRESETS[name]
    rate, (prompt, output) = nominal_capacity_rps(spec, *lengths), lengths
    assert nominal_capacity_rps(spec.with_pool(Role.PREFILL, instances=100), *lengths) > 1.5 * rate
    pool = spec.pool(Role.DECODE)
    ranks = pool.ranks * pool.instances
    step_s, context = 0.0, prompt + output / 2
    for _ in range(100):  # the batch that this rate keeps up: B = rate·steps·step_s(B) / ranks
        batch = rate * (output - 1) * step_s / ranks
        step_s = pool.costs.decode_step_s([batch], [batch * context]) + pool.host_gap_s
    assert batch < pool.max_running
    assert step_s < 0.7 * spec.slo.tpot_s
