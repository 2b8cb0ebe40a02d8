"""Sums and maxima over the ranks that hold the other shards of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.distributed.placement import is_sharded, shard_of
from lightning_optim.language.values import By, Over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Reductions:
    """Combines the partial sums and maxima of the processes that share the parameters of an optimizer.

    Plain tensors and DDP's replicas are whole on each rank and have equal gradients, so their sums are complete.
    Sums of shards are all-reduced over the process groups that split their tensor, all tensors in one call.

    Args:
        params: The parameters.
    """

    def __init__(self, params: Sequence[Tensor] = ()) -> None:
        sharded = [p for p in params if is_sharded(p)]
        self.process_groups = list(dict.fromkeys(group for p in sharded for group in shard_of(p).process_groups))
        self.device = sharded[0].device if sharded else torch.device("cpu")
        self.masks: dict[tuple[tuple[bool, ...], torch.device], Tensor] = {}

    def reduce(
        self,
        partials: Sequence[float | Tensor],
        process_groups: Sequence[tuple[ProcessGroup, ...]],
        over: Over,
        by: By,
    ) -> list[Tensor]:
        """The result for each tensor, from what this process computed for each tensor.

        Args:
            partials: One number per tensor.
            process_groups: For each tensor the groups that hold its other shards; empty where the number is complete.
            over: Each tensor by itself, or all of them together.
            by: Sum or maximum.
        """
        values = torch.stack([torch.as_tensor(partial, dtype=torch.float64, device="cpu") for partial in partials])
        return list(self.reduce_vector(values, process_groups, over, by))

    def reduce_vector(
        self, values: Tensor, process_groups: Sequence[tuple[ProcessGroup, ...]], over: Over, by: By
    ) -> Tensor:
        """As `reduce`, for a (tensors,) float64 vector, which stays on its device."""
        for group in self.process_groups:
            shared = tuple(group in own for own in process_groups)
            if any(shared):
                reduced = self._all_reduce(values, by, group)
                values = reduced if all(shared) else torch.where(self._mask(shared, values.device), reduced, values)
        if over == "all":
            return (values.sum() if by == "sum" else values.max()).expand(len(values))
        return values

    def reduce_tensors(
        self, tensors: Sequence[Tensor], process_groups: Sequence[tuple[ProcessGroup, ...]]
    ) -> list[Tensor]:
        """Elementwise sums of tensors over the process groups of each, in one all-reduce per group."""
        found = list(tensors)
        for group in self.process_groups:
            shared = [i for i, own in enumerate(process_groups) if group in own]
            if shared:
                reduced = self._all_reduce(torch.cat([found[i].reshape(-1) for i in shared]), "sum", group)
                parts = torch.split(reduced, [found[i].numel() for i in shared])
                for i, part in zip(shared, parts, strict=True):
                    found[i] = part.view(found[i].shape)
        return found

    def _mask(self, flags: tuple[bool, ...], device: torch.device) -> Tensor:
        """Flags on a device, copied there once."""
        if (flags, device) not in self.masks:
            found = torch.tensor(flags, dtype=torch.bool, device="cpu")
            found = found.pin_memory() if device.type == "cuda" else found  # the host would wait for any other copy
            self.masks[flags, device] = found.to(device, non_blocking=True)
        return self.masks[flags, device]

    def _all_reduce(self, values: Tensor, by: By, group: ProcessGroup) -> Tensor:
        """All-reduce a copy on the device that the process group works on."""
        there = values.to(self.device, copy=True)
        dist.all_reduce(there, op=dist.ReduceOp.SUM if by == "sum" else dist.ReduceOp.MAX, group=group)
        return there.to(values.device)
