"""The ranks that share a loss: each has its part of the batch, and the loss is the mean over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        several = not is_alone() and dist.is_available() and dist.is_initialized()
        sharded = any(map(is_sharded, params))
        self._module = data_parallel(params) if several and not sharded else None
        found = _process_groups(params, self._module) if several else []
        self.process_groups = [group for group in found if dist.get_world_size(group) > 1]

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """Inside, DDP does not learn from backward passes.

        With `static_graph=True` it takes the first one as that of all later steps. If that goes past `.grad`, as here,
        it would never average gradients.
        """
        name = "_static_graph_delay_allreduce_enqueued"
        if not getattr(self._module, "static_graph", False) or not hasattr(self._module, name):
            yield
            return
        before = getattr(self._module, name)
        setattr(self._module, name, True)
        try:
            yield
        finally:
            setattr(self._module, name, before)

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


def _process_groups(params: Sequence[Tensor], module: Any) -> list[ProcessGroup | None]:
    for p in params:
        if is_dtensor(p):
            return [p.device_mesh.get_group(i) for i in range(p.device_mesh.ndim)]
    return [None if module is None else module.process_group]
