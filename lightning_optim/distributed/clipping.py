"""Clip gradients by their norm, sharded or not.  Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063.

Under FSDP1 torch's `clip_grad_norm_` sees only the shard of this rank. That is why Lightning refuses it there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_optim.distributed.placement import gradient_of, local, shard_of
from lightning_optim.distributed.plain import resolved, writable_gradient
from lightning_optim.distributed.reductions import Reductions


@torch.no_grad()
def clip_gradient_norm(params: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients in place so that their joint Euclidean norm is at most `max_norm`.

    Each element of each tensor counts once, and all ranks compute the same norm: for plain tensors, replicas (DDP),
    FSDP1 with either `use_orig_params`, and FSDP2, also with hybrid sharding and tensor parallelism. There is one
    all-reduce for each process group that splits tensors.

    Args:
        params: The same parameters in the same order on every rank. Those without a gradient are skipped.
        max_norm: The largest norm, above 0.

    Returns:
        The norm before clipping; 0 where there is no gradient.
    """
    found = [p for p in params if gradient_of(p) is not None]
    if not found:
        return 0.0
    grads = [resolved(local(_gradient_to_scale(p))) for p in found]
    squares = torch.stack([torch.linalg.vector_norm(grad).double().square().to(grads[0].device) for grad in grads])
    reductions = Reductions(found)
    norm = reductions.reduce_vector(squares, [shard_of(p).process_groups for p in found], "all", "sum")[0].sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for grad in grads:
        grad.mul_(scale.to(grad.device))
    return float(norm)


def _gradient_to_scale(p: Tensor) -> Tensor:
    grad = gradient_of(p) if p.grad is None else writable_gradient(p)
    assert grad is not None
    return grad
