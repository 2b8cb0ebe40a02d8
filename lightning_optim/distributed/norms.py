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


@torch.no_grad()
def squared_norms(values: Iterable[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """The squared Euclidean norm of each tensor, (params,) float64, in one all-reduce for each process group.

    Args:
        values: For each parameter a tensor sharded like it, its local tensor, or None, which counts as 0.
        params: The parameters.
    """
    if not params:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    squares = [_square(p, None if x is None else local(x)) for p, x in zip(params, values, strict=True)]
    device = squares[0].device
    groups = [shard_of(p).process_groups for p in params]
    return Reductions(params).reduce_vector(torch.stack([x.to(device) for x in squares]), groups, "tensor", "sum")


def _square(p: Tensor, x: Tensor | None) -> Tensor:
    if x is None or not x.numel():
        return torch.zeros((), dtype=torch.float64, device=local(p).device)
    x = x.coalesce().values() if x.is_sparse else x
    x = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def count(params: Sequence[Tensor]) -> int:
    """The number of elements of all whole parameters."""
    return sum(shard_of(p).numel for p in params)
