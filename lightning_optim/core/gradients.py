"""The gradients of a step: which parameters have one, and which gradients are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.placement import has_gradient, is_dtensor
from lightning_optim.distributed.plain import is_pending, is_wrapper, resolve_gradients

LAYOUT: Any = Tensor.layout.__get__  # type: ignore[attr-defined]
DTYPE: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]
TRAINABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
TRAINABLE |= {torch.complex32, torch.complex64, torch.complex128}


def with_gradient(owner: str, every: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """The parameters that take part in a step. Their gradients are tensors whose memory holds their values.

    Args:
        owner: The optimizer, for messages.
        every: All its parameters, each with the index of its group.

    Raises:
        RuntimeError: for a gradient that does not fit. Nothing has changed then.
    """
    grads = [p.grad for _, p in every]
    found = [pair for pair, grad in zip(every, grads, strict=True) if grad is not None or has_gradient(pair[1])]
    params = [p for (_, p), grad in zip(every, grads, strict=True) if grad is not None]
    present = [grad for grad in grads if grad is not None]
    _refuse_unfit(owner, params, present)
    resolve_gradients(params, present)
    return found


def _refuse_unfit(owner: str, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Refuse sparse gradients, those of another size than their parameters, and wrappers for a plain parameter.

    Integers and numbers of 8 bits are refused too. Without a gradient they may be there: quantized models hold them.
    """
    strided = set(map(LAYOUT, grads)) <= {torch.strided} and set(map(type, grads)) <= {Tensor}
    if (
        strided
        and set(map(DTYPE, params)) <= TRAINABLE
        and list(map(Tensor.numel, grads)) == list(map(Tensor.numel, params))
    ):
        return
    for p, grad in zip(params, grads, strict=True):
        if p.dtype not in TRAINABLE:
            raise RuntimeError(
                f"{owner} cannot train a parameter of shape {tuple(p.shape)} in {str(p.dtype).removeprefix('torch.')}. "
                "Train it in float16, bfloat16, float32, float64 or complex, or leave it without a gradient."
            )
        if grad.is_sparse:
            raise RuntimeError(
                f"{owner} got a sparse gradient of shape {tuple(p.shape)}; its state is dense. Use "
                "torch.optim.SparseAdam or SGD for that parameter, or Embedding(sparse=False)."
            )
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{owner} got a gradient of shape {tuple(p.shape)} whose layout is "
                f"{str(grad.layout).removeprefix('torch.')}; its state is dense. Set p.grad = p.grad.to_dense() before "
                "the step."
            )
        if grad.numel() != p.numel():
            raise RuntimeError(
                f"{owner}: a gradient has the shape {tuple(grad.shape)}, and its parameter {tuple(p.shape)}. Did the "
                "parameter change after the backward pass?"
            )
        foreign = is_wrapper(grad) and not is_wrapper(p) and not is_pending(grad)
        if foreign or is_dtensor(grad) != is_dtensor(p):
            raise RuntimeError(
                f"{owner} got a gradient of the class {type(grad).__name__} for a {type(p).__name__} of shape "
                f"{tuple(p.shape)}. Set p.grad to a tensor of the parameter's kind before the step."
            )
