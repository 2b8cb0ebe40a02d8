"""The ranks that share a loss: each has its part of the batch, and the loss is the mean over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.distributed.agreement import data_parallel
from lightning_optim.distributed.placement import is_dtensor, is_sharded
from lightning_optim.distributed.ranks import is_alone
from lightning_optim.errors import OptionError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks:
    """The process groups over which the loss of some parameters is averaged, one after the other.

    These are the dimensions of the device mesh of DTensors, the process group of a `DistributedDataParallel`, or else
    all ranks; none inside `distributed.ranks.alone`.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.process_groups = [group for group in _process_groups(params) if dist.get_world_size(group) > 1]

    def mean(self, values: Tensor) -> Tensor:
        """Elementwise means over the ranks, in place where there are several, in one message for each process group."""
        for group in self.process_groups:
            there = values.cuda() if dist.get_backend(group) == "nccl" else values
            dist.all_reduce(there, group=group)
            if there is not values:
                values.copy_(there)
            values /= dist.get_world_size(group)
        return values

    def refuse(self, problem: str) -> None:
        """Raise on all ranks what is wrong on one of them. All ranks must call it.

        Raises:
            OptionError: where `problem` is not empty on some rank.
        """
        for group in self.process_groups:
            found: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, problem, group=group)
            problem = next(filter(None, found), "")
        if problem:
            raise OptionError(problem)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks must call it."""
        return bool(self.mean(torch.tensor([float(flag)], dtype=torch.float64, device="cpu")))


def _process_groups(params: Sequence[Tensor]) -> list[ProcessGroup | None]:
    if is_alone() or not (dist.is_available() and dist.is_initialized()):
        return []
    for p in params:
        if is_dtensor(p):
            return [p.device_mesh.get_group(i) for i in range(p.device_mesh.ndim)]
    module = None if any(map(is_sharded, params)) else data_parallel(params)
    return [None if module is None else module.process_group]
