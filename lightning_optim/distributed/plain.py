"""What lies behind a tensor: memory with an address, or something that torch resolves when the tensor is used.

Engines that use addresses would read raw memory where torch negates a value, waits for a collective or finds zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim.distributed.placement import is_dtensor


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor is no memory of its own: its class handles operations itself. DTensors do not count."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_dtensor(tensor)


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
    """The gradient of a parameter, which must have one, replaced by a copy where it cannot be written in place."""
    assert p.grad is not None
    grad = resolved(p.grad)
    shape_and_strides = zip(grad.shape, grad.stride(), strict=True)
    if grad.is_inference() or any(size > 1 and not stride for size, stride in shape_and_strides):
        grad = torch.empty_like(p, requires_grad=False).copy_(grad)
    if grad is not p.grad:
        p.grad = grad
    return grad
