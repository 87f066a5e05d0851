"""Decides the clusters that come with Headway, and how much traffic one can take at most.

Step costs rest on measured tables (`fits.py`); memory on published model sizes; what is neither is said to be
an assumption in each preset's `source`.
"""

import math
from pathlib import Path

from headway.core.errors import ConfigError, unknown_name
from headway.core.events import Role
from headway.core.request import Slo
from headway.model.cluster import ClusterSpec, MemorySpec, PoolSpec
from headway.model.fits import FITTED

__all__ = ["PRESETS", "deepseek_v3", "load_cluster", "nominal_capacity_rps"]

_BASIS = "step times fitted to the operator tables of aiconfigurator 0.12 (Apache-2.0)"
_ASSUMED = "assumed, not measured: host gap 1 ms, jitter 2%, dispatch and report latency 1 ms"
_TRANSFER = "KV transfer 50 GB/s + 2 ms"
_GPU_GB = {"h100": 80.0, "h200": 141.0, "a100": 80.0}

#: MLA keeps 576 values per token and layer (512 latent + 64 rope), 61 layers, bf16.
_DSV3_KV_BYTES = 576 * 61 * 2
#: fp8: the routed experts are spread over the ranks; attention, shared expert and embeddings are on every
#: one.
_DSV3_EXPERTS_GB, _DSV3_SHARED_GB = 653.9, 17.0


def deepseek_v3(
    system: str,
    *,
    prefill: tuple[int, int],
    decode: tuple[int, int],
    chunk_tokens: int = 4096,
    name: str = "",
) -> ClusterSpec:
    """Return DeepSeek-V3 with prefill and decode apart: (instances, EP size) of each, on "h100" or "h200".

    Raises ConfigError for an EP size without measured step times and, with the numbers, where a GPU cannot
    hold its share of the model.
    """
    return ClusterSpec(
        name=name or f"dsv3-{system}-pd",
        source=(
            f"DeepSeek-V3 fp8 on SGLang with DeepEP, {system.upper()}, "
            f"{prefill[0]} × EP{prefill[1]} prefill and {decode[0]} × EP{decode[1]} decode; {_BASIS}; "
            f"EP16 and up are not validated end to end; {chunk_tokens:,}-token chunks and 128 decodes per "
            f"rank are settings of ours; {_ASSUMED}, {_TRANSFER}"
        ),
        slo=Slo(ttft_s=2.0, tpot_s=0.05),
        kv_bytes_per_token=_DSV3_KV_BYTES,
        pools=(
            _dsv3_pool(Role.PREFILL, system, prefill, chunk_tokens, 256),
            _dsv3_pool(Role.DECODE, system, decode, 4096, 128),
        ),
    )


def _dsv3_pool(
    role: Role, system: str, size: tuple[int, int], chunk_tokens: int, max_running: int
) -> PoolSpec:
    instances, ep = size
    costs = FITTED.get(f"dsv3-{system}-ep{ep}")
    if costs is None:
        known = ", ".join(
            name.rpartition("-")[2].upper() for name in FITTED if name.startswith(f"dsv3-{system}-")
        )
        raise ConfigError(f"no step times are measured for EP{ep} on {system.upper()} (there are: {known})")
    return PoolSpec(
        role=role,
        instances=instances,
        ranks=ep,
        token_cap=chunk_tokens,
        max_running=max_running,
        block_tokens=64,
        costs=costs,
        memory=MemorySpec(
            gpu_memory_gb=_GPU_GB[system],
            shared_weights_gb=_DSV3_SHARED_GB,
            expert_weights_gb=_DSV3_EXPERTS_GB,
        ),
    )


def _dense(model: str, system: str, instances: int = 1) -> ClusterSpec:
    title, weights_gb, kv_bytes = {
        "llama8b": ("Llama-3.1-8B", 16.1, 131_072),
        "qwen3-8b": ("Qwen3-8B", 16.4, 147_456),
    }[model]
    pool = PoolSpec(
        role=Role.AGGREGATED,
        instances=instances,
        lockstep=False,
        token_cap={"h100": 8192, "a100": 2048}[system],
        costs=FITTED[f"{model}-{system}"],
        memory=MemorySpec(gpu_memory_gb=_GPU_GB[system], weights_gb_per_gpu=weights_gb, reserve_gb=3.0),
    )
    many = f"-x{instances}" if instances > 1 else ""
    return ClusterSpec(
        name=f"{model}-{system}{many}",
        source=(
            f"{title} bf16, TP1 on vLLM, {system.upper()}, {instances} aggregated; {_BASIS}; vLLM's "
            f"defaults for the token cap ({pool.token_cap}), 256 requests, 16-token blocks; {_ASSUMED}"
        ),
        slo=Slo(ttft_s=1.0, tpot_s=0.05),
        kv_bytes_per_token=kv_bytes,
        pools=(pool,),
    )


#: Clusters by name. Decode pools are sized so that prefill limits at Azure's conversation lengths (1,155
#: in, 211 out) and a decode step stays well under the TPOT target there: one EP32 of H200, two of H100.
PRESETS: dict[str, ClusterSpec] = {
    spec.name: spec
    for spec in (
        deepseek_v3("h200", prefill=(3, 8), decode=(1, 32)),
        deepseek_v3("h100", prefill=(3, 16), decode=(2, 32)),
        _dense("llama8b", "h100"),
        _dense("llama8b", "a100"),
        _dense("qwen3-8b", "h100"),
        _dense("qwen3-8b", "a100"),
        _dense("llama8b", "h100", instances=4),
        _dense("qwen3-8b", "a100", instances=4),
    )
}


def load_cluster(name_or_path: str) -> ClusterSpec:
    """Return a preset by name, or read a TOML file. Raises ConfigError with the nearest known name."""
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    if name_or_path.endswith(".toml") or Path(name_or_path).is_file():
        return ClusterSpec.from_toml(name_or_path)
    raise unknown_name("cluster preset", name_or_path, PRESETS)


def nominal_capacity_rps(spec: ClusterSpec, mean_prompt_tokens: float, mean_output_tokens: float) -> float:
    """Return the request rate at which the tighter pool runs full passes without a break, all ranks equal.

    Prefill: chunks of `token_cap` on every rank. Decode: as many requests as seats and KV allow, each
    half-way through its output. Aggregated: decodes and prompt tokens in the proportion of the traffic,
    within the token cap.
    """
    rate = {Role.PREFILL: _prefill_rps, Role.DECODE: _decode_rps, Role.AGGREGATED: _aggregated_rps}
    return min(rate[pool.role](pool, mean_prompt_tokens, mean_output_tokens) for pool in spec.pools)


def _prefill_rps(pool: PoolSpec, prompt: float, output: float) -> float:
    chunk = pool.token_cap
    step_s = _equal_step_s(pool, chunk=chunk, decodes=0, context=0, attention=chunk * prompt / 2)
    return pool.instances * pool.ranks * chunk / (prompt * step_s)


def _decode_rps(pool: PoolSpec, prompt: float, output: float) -> float:
    steps = output - 1  # the first token comes from prefill
    if steps <= 0:
        return math.inf
    context = prompt + output / 2
    batch = min(pool.max_running, pool.kv_tokens / context)
    step_s = _equal_step_s(pool, chunk=0, decodes=batch, context=batch * context, attention=0)
    return pool.instances * pool.ranks * batch / (steps * step_s)


def _aggregated_rps(pool: PoolSpec, prompt: float, output: float) -> float:
    context = prompt + output / 2
    batch = min(pool.max_running, pool.kv_tokens / context, pool.token_cap / (1 + prompt / output))
    chunk = batch * prompt / output
    step_s = _equal_step_s(
        pool, chunk=chunk, decodes=batch, context=batch * context, attention=chunk * prompt / 2
    )
    return pool.instances * pool.ranks * batch / (output * step_s)


def _equal_step_s(pool: PoolSpec, *, chunk: float, decodes: float, context: float, attention: float) -> float:
    """Time of a pass, host gap included, with the same on every rank."""
    return pool.costs.step_s((chunk,), (decodes,), (context,), (attention,)) + pool.host_gap_s
