"""The one place that knows process groups: where a tensor lives, and what is summed over which ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.math import By, Over

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from lightning_optim.trace import Program


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is spread over a mesh of devices.

    Whoever made such a tensor has imported its module, which takes a second, so there is no need to do it here.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether other processes hold other parts of the tensor."""
    return is_dtensor(tensor) and any(placement.is_shard() for placement in tensor.placements)


def refuse_unsummable(owner: str, program: Program, params: Iterable[Tensor]) -> None:
    """Refuse what would silently be wrong: sums over tensors of which this process cannot know the other parts.

    Raises:
        RuntimeError: for sums over FSDP1's flat slices, and for means along an axis of a sharded tensor.
    """
    if program.elementwise and not program.reductions:
        return
    for p in params:
        if getattr(p, "_fsdp_flattened", False):
            raise RuntimeError(
                f"{owner} needs a {' and a '.join(program.needs)}, and FSDP1 shows it flat slices of tensors. Use "
                "ModelParallelStrategy (FSDP2) or DDP, or an elementwise optimizer such as adan."
            )
        if is_sharded(p) and not program.elementwise:
            raise RuntimeError(
                f"{owner} needs row and column means, which are not taken over sharded tensors yet. Use DDP, or an "
                "elementwise optimizer such as adan."
            )


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def like(values: Tensor, p: Tensor) -> Tensor:
    """Flat values of the part of `p` that this process holds, as a tensor of the shape and placement of `p`."""
    if not is_dtensor(p):
        return values.view(p.shape)
    from torch.distributed.tensor import DTensor

    part = values.view(p.to_local().shape)
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


class Placement:
    """Where the tensors of an optimizer live, and so how partial results of reductions combine.

    Plain tensors and DDP replicas hold every element on each rank and have equal gradients, so their sums are
    complete as they are. Shards (DTensor) are summed over their mesh, all tensors in one message.

    Args:
        params: The parameters of the optimizer.
    """

    def __init__(self, params: Sequence[Tensor] = ()) -> None:
        meshes = [p.device_mesh for p in params if is_dtensor(p) and is_sharded(p)]
        self.groups = {id(mesh): mesh.get_group() for mesh in meshes}

    def combine(self, partials: Sequence[float | Tensor], sharded: Sequence[bool], over: Over, by: By) -> list[Tensor]:
        """The result for each tensor, from what this process computed for each tensor.

        Args:
            partials: One number per tensor.
            sharded: For each, whether it covers only the shard of this process; others are equal on all ranks.
            over: Each tensor by itself, or all of them together.
            by: Sum or maximum.
        """
        values = torch.stack([torch.as_tensor(partial, dtype=torch.float64).cpu() for partial in partials])
        return list(self.combine_vector(values, sharded, over, by))

    def combine_vector(self, values: Tensor, sharded: Sequence[bool], over: Over, by: By) -> Tensor:
        """As `combine`, for one float64 vector with a number per tensor; it stays on its device."""
        if any(sharded):
            partial = torch.tensor(sharded, device=values.device)
            summed = torch.where(partial, values, 0.0 if by == "sum" else -torch.inf)
            operation = dist.ReduceOp.SUM if by == "sum" else dist.ReduceOp.MAX
            for group in self.groups.values():
                dist.all_reduce(summed, op=operation, group=group)
            values = torch.where(partial, summed, values)
        if over == "all":
            return (values.sum() if by == "sum" else values.max()).expand(len(values))
        return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a small tensor over all data-parallel ranks; the tensor itself in a single process.

    Ranks see different batches, so what an update reads of the loss must be averaged, or replicas drift apart.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()
