"""Decides nothing: step costs fitted to measured operator tables, by name.

Source: the operator tables of the package `aiconfigurator` 0.12 (Apache-2.0), sums of operator times, without
overlap of two batches and without host gap. A TOML cluster names them: `costs = "dsv3-h200-ep32"`. Errors of
the fits are in docs/engine-model.md. Given in the units of the fits: ms, ms per token, ms per 1,000 context
tokens, ms per 10⁶ tokens².
"""

from headway.model.costs import Costs, DenseCosts, LockstepCosts, PhaseCosts

__all__ = ["FITTED"]

_MS = 1e-3
_MS_PER_K = 1e-6
_MS_PER_M = 1e-9

_Pair = tuple[float, float]


def _dsv3(system: str, prefill_sync: _Pair, decode_sync: _Pair) -> LockstepCosts:
    """DeepSeek-V3 fp8 on SGLang with DeepEP, EPLB on: the local part is the system's, sync the EP's."""
    prefill, decode = {
        "h100": ((7.747, 0.04178, 6.998), (10.871, 0.02012, 0.02922)),
        "h200": ((7.375, 0.03856, 7.366), (9.757, 0.01147, 0.03257)),
    }[system]
    return LockstepCosts(
        prefill=PhaseCosts(
            fixed_s=prefill[0] * _MS,
            token_s=prefill[1] * _MS,
            attention_s=prefill[2] * _MS_PER_M,
            sync_fixed_s=prefill_sync[0] * _MS,
            sync_token_s=prefill_sync[1] * _MS,
        ),
        decode=PhaseCosts(
            fixed_s=decode[0] * _MS,
            token_s=decode[1] * _MS,
            context_token_s=decode[2] * _MS_PER_K,
            sync_fixed_s=decode_sync[0] * _MS,
            sync_token_s=decode_sync[1] * _MS,
        ),
    )


def _dense(knee: int, a: float, b0: float, b1: float, c: float, q: float) -> DenseCosts:
    return DenseCosts(a * _MS, knee, b0 * _MS, b1 * _MS, c * _MS_PER_K, q * _MS_PER_M)


#: Costs by name. EP8 and EP16 of one system share the local part; only what is exchanged and the experts
#: differ.
FITTED: dict[str, Costs] = {
    "dsv3-h100-ep8": _dsv3("h100", (47.882, 0.05747), (21.857, 0.11365)),
    "dsv3-h100-ep16": _dsv3("h100", (38.774, 0.08940), (15.715, 0.16099)),
    "dsv3-h100-ep32": _dsv3("h100", (34.763, 0.14203), (10.777, 0.22255)),
    "dsv3-h100-ep64": _dsv3("h100", (31.346, 0.37135), (7.360, 0.31413)),
    "dsv3-h200-ep8": _dsv3("h200", (39.736, 0.05623), (18.554, 0.09364)),
    "dsv3-h200-ep16": _dsv3("h200", (34.050, 0.08575), (13.983, 0.14647)),
    "dsv3-h200-ep32": _dsv3("h200", (33.628, 0.13709), (8.784, 0.23239)),
    "dsv3-h200-ep64": _dsv3("h200", (29.793, 0.36277), (6.251, 0.33644)),
    "llama8b-h100": _dense(448, 6.433, 0.008698, 0.02068, 0.0423, 0.7743),
    "llama8b-a100": _dense(96, 11.75, 0.01227, 0.05514, 0.08282, 2.915),
    "qwen3-8b-h100": _dense(512, 6.914, 0.01109, 0.02054, 0.04536, 0.8875),
    "qwen3-8b-a100": _dense(128, 11.91, 0.02939, 0.05484, 0.09073, 3.301),
}
