"""Decides which clusters a number of GPUs can be made into: P:D ratio, EP sizes, chunk.

A topology is DeepSeek-V3 with prefill and decode apart, on the step times of the presets: nothing else is
measured for several EP sizes. P:D counts instances, as in "3P1D"; a ratio is repeated as often as the GPUs
allow. What cannot be (no measured step times, too little memory, too few GPUs) is refused with its numbers,
never rounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from headway.core.errors import ConfigError, unknown_name
from headway.model.cluster import ClusterSpec
from headway.model.presets import deepseek_v3

__all__ = ["SYSTEMS", "Refusal", "Topology", "topologies"]

SYSTEMS = ("h100", "h200")

#: The new tokens per rank that prefill passes were measured with: beyond, a chunk would be a guess.
_MEASURED_CHUNK = (64, 16_384)


@dataclass(frozen=True, slots=True)
class Topology:
    """One way to use GPUs: instances and EP size of each pool, and the chunk of a prefill pass per rank."""

    system: str
    prefill_instances: int
    prefill_ep: int
    decode_instances: int
    decode_ep: int
    chunk_tokens: int

    @property
    def gpus(self) -> int:
        """GPUs in use: one per rank."""
        return self.prefill_instances * self.prefill_ep + self.decode_instances * self.decode_ep

    @property
    def name(self) -> str:
        """Write it as a cluster name, such as dsv3-h200-3xep8-1xep32-c4096."""
        return (
            f"dsv3-{self.system}-{self.prefill_instances}xep{self.prefill_ep}"
            f"-{self.decode_instances}xep{self.decode_ep}-c{self.chunk_tokens}"
        )

    @property
    def pools(self) -> str:
        """Write its pools for a person."""
        return f"{self.prefill_instances}×EP{self.prefill_ep} + {self.decode_instances}×EP{self.decode_ep}"

    def cluster(self) -> ClusterSpec:
        """Return the cluster. Raises ConfigError, with the numbers, for one that cannot be."""
        low, high = _MEASURED_CHUNK
        if not low <= self.chunk_tokens <= high:
            raise ConfigError(
                f"chunks of {self.chunk_tokens:,} tokens were not measured, only {low:,} to {high:,}"
            )
        return deepseek_v3(
            self.system,
            prefill=(self.prefill_instances, self.prefill_ep),
            decode=(self.decode_instances, self.decode_ep),
            chunk_tokens=self.chunk_tokens,
            name=self.name,
        )


@dataclass(frozen=True, slots=True)
class Refusal:
    """A topology that cannot be, and why."""

    topology: Topology
    why: str


def topologies(
    *,
    systems: Sequence[str],
    gpus: int | None,
    prefill_ep: Sequence[int],
    decode_ep: Sequence[int],
    ratios: Sequence[tuple[int, int]],
    chunks: Sequence[int],
) -> tuple[dict[Topology, ClusterSpec], list[Refusal]]:
    """Return every combination that can be with its cluster, and those that cannot.

    `gpus`: most GPUs of a topology; None takes each ratio once, whatever it needs. `ratios`: prefill to
    decode instances. Raises ConfigError for a system nobody knows and for numbers below 1.
    """
    for system in systems:
        if system not in SYSTEMS:
            raise unknown_name("system", system, SYSTEMS)
    numbers = [gpus or 1, *prefill_ep, *decode_ep, *chunks, *(part for ratio in ratios for part in ratio)]
    if min(numbers) < 1 or gpus == 0:
        raise ConfigError("GPUs, EP sizes, P:D ratios and chunks must be at least 1")
    found: dict[Topology, ClusterSpec] = {}
    refused: dict[Topology, Refusal] = {}
    for topology in (
        _repeated(Topology(system, p, p_ep, d, d_ep, chunk), gpus)
        for system in systems
        for p_ep in prefill_ep
        for d_ep in decode_ep
        for p, d in ratios
        for chunk in chunks
    ):
        try:
            if gpus is not None and topology.gpus > gpus:
                raise ConfigError(f"needs {topology.gpus} GPUs, there are {gpus}")
            found[topology] = topology.cluster()
        except ConfigError as error:
            refused[topology] = Refusal(topology, str(error))
    return found, list(refused.values())


def _repeated(topology: Topology, gpus: int | None) -> Topology:
    """The same ratio as often as it goes into the GPUs, at least once."""
    times = max(1, gpus // topology.gpus) if gpus is not None else 1
    return replace(
        topology,
        prefill_instances=times * topology.prefill_instances,
        decode_instances=times * topology.decode_instances,
    )
