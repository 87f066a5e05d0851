"""Lets vLLM's MoE data parallelism run on a CPU: the two collectives of uneven sizes its communicator lacks.

Test equipment. With these, the ranks of an MoE model meet in every MoE layer and so march in lockstep, as
on GPUs: each gathers the tokens of all, and keeps of the sum the rows of its own. gloo knows neither
collective, so rows are padded to the longest rank's, and the sum is made everywhere and cut. vLLM loads this
in every process.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

__all__ = ["register"]


def all_gatherv(
    self: CpuCommunicator,
    input_: torch.Tensor | list[torch.Tensor],
    dim: int = 0,
    sizes: Sequence[int] | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """Return the rows of all ranks in a row. `sizes`: rows of each rank; None: as many as here."""
    assert dim == 0, "MoE layers gather rows"
    if isinstance(input_, list):
        return [_gather(self, each, sizes) for each in input_]
    return _gather(self, input_, sizes)


def reduce_scatterv(
    self: CpuCommunicator, input_: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Return this rank's rows of the sum over all ranks."""
    assert dim % input_.dim() == 0, "MoE layers scatter rows"
    rows = sizes or [input_.shape[0] // self.world_size] * self.world_size
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    return torch.split(total, list(rows))[self.rank_in_group].contiguous()


def _gather(self: CpuCommunicator, mine: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
    rows = sizes or [mine.shape[0]] * self.world_size
    padded = mine.new_zeros((max(rows), *mine.shape[1:]))
    padded[: mine.shape[0]] = mine
    everybodys = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(everybodys, padded, group=self.device_group)
    return torch.cat([each[:count] for each, count in zip(everybodys, rows, strict=True)])


def register() -> None:
    """Supply what this version of vLLM has not got by itself."""
    for function in (all_gatherv, reduce_scatterv):
        name = function.__name__
        lacking = getattr(DeviceCommunicatorBase, name, None)
        if getattr(CpuCommunicator, name, None) is lacking:
            setattr(CpuCommunicator, name, function)
