"""Norms of what belongs to parameters, over all ranks that share them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_optim.distributed.placement import local, shard_of
from lightning_optim.distributed.reductions import Reductions


@torch.no_grad()
def norm(values: Iterable[Tensor | None], params: Sequence[Tensor]) -> float:
    """The Euclidean norm of all tensors together, in float64; the same on every rank.

    Args:
        values: A tensor like each parameter, or its local part, or None where there is none; asked for one by one.
        params: The parameters, on which it depends who holds what.
    """
    if not params:
        return 0.0
    squares = [0.0 if x is None else local(x).abs().square().sum(dtype=torch.float64) for x in values]
    groups = [shard_of(p).process_groups for p in params]
    return math.sqrt(float(Reductions(params).reduce(squares, groups, "all", "sum")[0]))


def count(params: Sequence[Tensor]) -> int:
    """The number of elements of all parameters, wherever they are."""
    return sum(shard_of(p).numel for p in params)
