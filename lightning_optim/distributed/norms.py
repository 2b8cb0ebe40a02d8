"""Norms and element counts of sharded tensors, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_optim.distributed.placement import local, shard_of
from lightning_optim.distributed.reductions import Reductions


@torch.no_grad()
def norm(values: Iterable[Tensor | None], params: Sequence[Tensor]) -> float:
    """The joint Euclidean norm of all tensors, computed in float64. It is the same on every rank.

    Args:
        values: For each parameter a tensor sharded like it, its local tensor, or None. Consumed one by one.
        params: The parameters.
    """
    if not params:
        return 0.0
    squares = [0.0 if x is None else local(x).abs().square().sum(dtype=torch.float64) for x in values]
    groups = [shard_of(p).process_groups for p in params]
    return math.sqrt(float(Reductions(params).reduce(squares, groups, "all", "sum")[0]))


def count(params: Sequence[Tensor]) -> int:
    """The number of elements of all whole parameters."""
    return sum(shard_of(p).numel for p in params)
