"""What a cluster file may say, and what one is told when it says something else."""

import pytest

from headway.core.errors import ConfigError
from headway.core.events import InstanceUp, Role
from headway.model.cluster import ClusterSpec
from headway.model.costs import DenseCosts
from headway.model.fits import FITTED

AGGREGATED = """
kv_bytes_per_token = 131072
[slo]
ttft_s = 1.0
[[pools]]
role = "aggregated"
instances = 2
lockstep = false
token_cap = 8192
costs = "llama8b-h100"
memory = { gpu_memory_gb = 80, weights_gb_per_gpu = 16.1 }
"""
COSTS = """
kv_bytes_per_token = 1000
[[pools]]
role = "aggregated"
token_cap = 512
kv_blocks = 1000
[pools.costs]
form = "dense"
fixed_s = 0.01
knee_tokens = 100
token_s = 1e-5
beyond_knee_token_s = 2e-5
context_token_s = 1e-8
attention_s = 1e-12
"""
DSV3 = """
kv_bytes_per_token = 70272
[[pools]]
role = "prefill"
ranks = 8
token_cap = 4096
costs = "dsv3-h100-ep8"
memory = { gpu_memory_gb = 80, shared_weights_gb = 17, expert_weights_gb = 653.9 }
[[pools]]
role = "decode"
ranks = 32
token_cap = 4096
kv_blocks = 1000
costs = "dsv3-h100-ep32"
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> ClusterSpec:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return ClusterSpec.from_toml(path)

    return read


def test_kv_follows_from_memory(read):
    spec = read(AGGREGATED)
    (pool,) = spec.pools
    assert pool.kv_blocks == int((80 * 0.9 - 16.1 - 4.0) * 1e9 / (131072 * 16))
    assert (spec.name, spec.slo.ttft_s, spec.slo.tpot_s, spec.disaggregated) == ("mine", 1.0, 0.05, False)
    assert pool.costs is FITTED["llama8b-h100"]


def test_costs_of_ones_own(read):
    assert read(COSTS).pools[0].costs == DenseCosts(0.01, 100, 1e-5, 2e-5, 1e-8, 1e-12)


def test_instances_introduce_themselves(read):
    (pool,) = read(AGGREGATED).pools
    assert pool.instance_names() == ["engine-0", "engine-1"]
    up = InstanceUp("engine-1", Role.AGGREGATED, 1, 8192, pool.kv_blocks, 16, 256, lockstep=False, epoch=3)
    assert pool.instance_up("engine-1", 3) == up


def test_pools_of_roles(read):
    spec = read(DSV3.replace("gpu_memory_gb = 80", "gpu_memory_gb = 141"))
    assert spec.disaggregated
    assert spec.pool(Role.DECODE).instance_names() == ["decode-0"]
    assert spec.pool(Role.PREFILL).instance_names() == ["prefill-0"]
    with pytest.raises(ConfigError, match="no aggregated pool"):
        spec.pool(Role.AGGREGATED)


def test_transfer_is_latency_and_bytes_over_bandwidth(read):
    assert read(COSTS).kv_transfer_s(1_000_000) == pytest.approx(0.002 + 1e9 / 50e9)


def test_changed_pool_works_out_its_kv_anew(read):
    spec = read(DSV3.replace("gpu_memory_gb = 80", "gpu_memory_gb = 141"))
    wider = spec.with_pool(Role.PREFILL, ranks=16, instances=5)
    assert wider.pool(Role.PREFILL).instances == 5
    assert wider.pool(Role.PREFILL).kv_blocks > spec.pool(Role.PREFILL).kv_blocks
    assert wider.pool(Role.DECODE) == spec.pool(Role.DECODE)
    with pytest.raises(ConfigError, match=r"pools\[0\]\.ranks: input should be greater"):
        spec.with_pool(Role.PREFILL, ranks=0)


def test_model_that_does_not_fit_is_refused_with_the_numbers(read):
    message = (
        r"mine.toml: pools\[0\] \(prefill\): cannot hold the model: 98.7 GB of weights and 4 GB of reserve "
        r"per GPU leave no KV in 72.0 GB \(0.9 of 80 GB\)$"
    )
    with pytest.raises(ConfigError, match=message):
        read(DSV3)


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (
            AGGREGATED,
            "token_cap",
            "token_cup",
            r"unknown key pools\[0\]\.token_cup: did you mean 'token_cap'",
        ),
        (AGGREGATED, "token_cap = 8192", "", r"missing key pools\[0\]\.token_cap"),
        (AGGREGATED, "ttft_s", "ttft", r"unknown key slo\.ttft: did you mean 'ttft_s'\?"),
        (AGGREGATED, "[slo]", "[slow]", r"unknown key slow: did you mean 'slo'\?"),
        (AGGREGATED, "ttft_s = 1.0", "ttft_s = -1.0", r"SLO ttft_s must be a positive number"),
        (
            AGGREGATED,
            "gpu_memory_gb",
            "gpu_memory",
            r"key pools\[0\]\.memory\.gpu_memory: did you mean 'gpu_memory_gb'",
        ),
        (AGGREGATED, "8192", "0", r"pools\[0\]\.token_cap: .* greater than or equal to 1, got 0"),
        (AGGREGATED, "8192", '"many"', r"pools\[0\]\.token_cap: .*integer.*'many'"),
        (AGGREGATED, "8192", "100", r"pools\[0\]: token_cap 100 is below max_running 256"),
        (AGGREGATED, '"aggregated"', '"agregated"', r"pools\[0\]\.role: .*'agregated'"),
        (AGGREGATED, "llama8b-h100", "llama8b-h10", r"pools\[0\]\.costs: .*did you mean 'llama8b-h100'\?"),
        (AGGREGATED, "memory", "#", r"pools\[0\]: needs kv_blocks, or memory"),
        (AGGREGATED, '"aggregated"', '"prefill"', r"a prefill and a decode pool, not: prefill"),
        (COSTS, "fixed_s", "fixd_s", r"unknown key pools\[0\]\.costs\.fixd_s: did you mean 'fixed_s'\?"),
        (COSTS, "0.01", "-0.01", r"fixed_s must be a number of at least 0, got -0.01"),
        (COSTS, '"dense"', '"dence"', r"pools\[0\]\.costs: .*'dence'"),
        (COSTS, "[pools.costs]", "[pools.costs", r"not TOML: "),
        (COSTS, "[pools.costs]", 'lockstep = "x"\n[pools.costs]', r"pools\[0\]\.lockstep: "),
    ],
)
def test_mistakes_are_told_in_one_line(read, text, old, new, message):
    with pytest.raises(ConfigError, match=message) as told:
        read(text.replace(old, new, 1))
    assert "mine.toml: " in str(told.value)
    assert "\n" not in str(told.value)


def test_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot read the cluster file: No such file"):
        ClusterSpec.from_toml("nowhere.toml")
