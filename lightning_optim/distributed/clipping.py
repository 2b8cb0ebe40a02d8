"""Clip gradients by their norm, however they are divided.  Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063.

torch's `clip_grad_norm_` sees under FSDP1 only what this rank holds, which is why Lightning refuses it there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_optim.distributed.placement import gradient_of, local, shard_of
from lightning_optim.distributed.reductions import Reductions


@torch.no_grad()
def clip_gradient_norm(params: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients down to a norm of at most `max_norm`, in place; returns the norm that they had.

    The norm is over all elements of all tensors, each counted once, on every rank the same: plain tensors, DDP
    replicas, FSDP1 (both `use_orig_params`) and FSDP2, hybrid and tensor parallel ones. One message for each process
    group that divides tensors.

    Args:
        params: The same parameters in the same order on every rank; those without gradient are passed over.
        max_norm: Largest norm, above 0.
    """
    found = [(p, grad) for p in params if (grad := gradient_of(p)) is not None]
    if not found:
        return 0.0
    grads = [local(grad) for _, grad in found]
    squares = torch.stack([torch.linalg.vector_norm(grad).double().square().to(grads[0].device) for grad in grads])
    reductions = Reductions([p for p, _ in found])
    norm = reductions.reduce_vector(squares, [shard_of(p).process_groups for p, _ in found], "all", "sum")[0].sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's
    for grad in grads:
        grad.mul_(scale.to(grad.device))
    return float(norm)
