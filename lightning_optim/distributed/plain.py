"""What lies behind a tensor: memory in some order, or something that torch resolves when the tensor is used.

Engines that use addresses would read raw memory where torch negates a value, waits for a collective or finds zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim.distributed.placement import is_dtensor


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor is no memory of its own: its class handles operations itself. DTensors do not count."""
    own: Any = type(tensor)  # torch's types do not tell of the method
    torchs: Any = Tensor
    return own.__torch_dispatch__ is not torchs.__torch_dispatch__ and not is_dtensor(tensor)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes of a tensor from the outermost to the innermost in memory.

    Returns:
        The axes; None where they lie in their own order, and where the tensor is not dense or has no memory here.

    Example:
        >>> image = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
        >>> memory_order(image), memory_order(image.contiguous()), memory_order(image[:, ::2])
        ((0, 2, 3, 1), None, None)
    """
    if is_dtensor(tensor) or tensor.is_contiguous() or is_wrapper(tensor):
        return None
    strides = tensor.stride()
    order = sorted(range(len(strides)), key=strides.__getitem__, reverse=True)
    return tuple(order) if tensor.permute(order).is_contiguous() else None


def memory_format(p: Tensor) -> torch.memory_format:
    """The format in which a tensor that is made after `p` lies in memory as `p` does, if `p` is dense."""
    return torch.contiguous_format if memory_order(p) is None else torch.preserve_format


def laid_out_like(values: Tensor, p: Tensor) -> Tensor:
    """Values in the memory order of a dense `p` of the same shape; the same object where they lie so already."""
    if values.shape != p.shape or is_dtensor(p) or is_wrapper(p):
        return values
    order = memory_order(p)
    if memory_order(values) == order and (order is not None or values.is_contiguous()):
        return values
    found = torch.empty_like(p, dtype=values.dtype, device=values.device, memory_format=memory_format(p))
    return found.requires_grad_(False).copy_(values)


def is_pending(tensor: Tensor) -> bool:
    """Whether the tensor is the result of a collective that may still run: an AsyncCollectiveTensor."""
    return hasattr(tensor, "trigger_wait")  # its module may not be imported


def bare(tensor: Tensor) -> Tensor:
    """The memory of a tensor of a class that only changes how functions are called; other tensors as they are."""
    own = type(tensor) in (Tensor, Parameter) or is_wrapper(tensor) or is_dtensor(tensor)
    return tensor if own else tensor.as_subclass(Tensor)


def resolved(tensor: Tensor) -> Tensor:
    """A tensor with the same values, which its memory holds; the same object where it does.

    Collectives are waited for, lazy signs and conjugations are carried out, and zeros that torch left out are written.

    Example:
        >>> lazy = torch.complex(torch.ones(2), torch.ones(2)).conj().imag
        >>> lazy.is_neg(), resolved(lazy).is_neg()
        (True, False)
    """
    while is_pending(tensor):
        tensor = tensor.trigger_wait()  # type: ignore[attr-defined]
    if is_wrapper(tensor) or is_dtensor(tensor):
        return tensor
    tensor = bare(tensor)
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_conj().resolve_neg()


def resolve_gradients(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Replace gradients whose memory does not hold their values. Most steps find none, at little cost.

    Args:
        params: Parameters.
        grads: The gradient of each of them.
    """
    lazy = any(map(Tensor.is_neg, grads)) or any(map(Tensor._is_zerotensor, grads))
    if not lazy and set(map(type, grads)) <= {Tensor}:
        return
    for p, grad in zip(params, grads, strict=True):
        found = resolved(grad)
        if found is not grad:
            p.grad = found


def writable_gradient(p: Tensor) -> Tensor:
    """The gradient of a parameter, which must have one: replaced by a copy where it cannot be written in place.

    It lies in the memory order of the parameter.
    """
    assert p.grad is not None
    grad = resolved(p.grad)
    if grad.is_inference() or memory_order(grad) != memory_order(p) or not _is_dense(grad):
        grad = laid_out_like(grad.contiguous(), p)
        grad = grad.clone() if grad.is_inference() else grad
    if grad is not p.grad:
        p.grad = grad
    return grad


def _is_dense(tensor: Tensor) -> bool:
    return is_dtensor(tensor) or is_wrapper(tensor) or tensor.is_contiguous() or memory_order(tensor) is not None
