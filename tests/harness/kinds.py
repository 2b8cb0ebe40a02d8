"""Kinds of tensors that torch.optim takes, or refuses: what a user may make a parameter or a gradient of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

Dress = Callable[[Tensor], Tensor]


class Named(torch.Tensor):
    """A subclass with memory of its own, as of images with metadata."""


@dataclass(frozen=True)
class Kind:
    """How the values of a parameter and of its gradient are given.

    Attributes:
        param: Makes the tensor of the parameter from plain values.
        grad: Makes the gradient from plain values.
        shapes: The shapes on which it makes a difference.
        dtype: The dtype of the values.
        frozen: Whether the parameter needs no gradient, and gets none.
    """

    param: Dress = lambda x: x
    grad: Dress = lambda x: x
    shapes: tuple[tuple[int, ...], ...] = ((6, 4), (70, 61))
    dtype: torch.dtype = torch.float32
    frozen: bool = False

    def parameter(self, values: Tensor) -> Tensor:
        return nn.Parameter(self.param(values), requires_grad=not self.frozen)


def minus(x: Tensor) -> Tensor:
    """The same values; torch carries out their sign when it reads them."""
    return torch.complex(x, -x).conj().imag


def turned(x: Tensor) -> Tensor:
    return x.t().contiguous().t() if x.dim() == 2 else x.permute(*reversed(range(x.dim()))).contiguous().permute(
        *reversed(range(x.dim()))
    )  # fmt: skip


def sliced(x: Tensor) -> Tensor:
    """With gaps between its elements."""
    return torch.stack([x, x], -1)[..., 0]


def two(x: Tensor, y: Tensor) -> Tensor:
    """A class that handles operations itself: two tensors in one."""
    make: Any = TwoTensor
    return make(x, y)  # type: ignore[no-any-return]


def unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def in_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def in_collective(x: Tensor) -> Tensor:
    """What a functional collective returns, which waits at its first use."""
    import torch.distributed._functional_collectives as collectives

    everyone: Any = dist.group.WORLD
    waited: Tensor = collectives.all_reduce(x, "sum", everyone)
    return waited


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


IMAGES = ((8, 3, 5, 5), (16, 32, 3, 3))

SERVED: dict[str, Kind] = {
    "plain": Kind(),
    "gradient minus": Kind(grad=minus),
    "gradient of a conjugate": Kind(grad=lambda x: torch.complex(x, x).conj().resolve_conj().conj().real),
    "gradient of lazy zeros": Kind(grad=lambda x: torch._efficientzerotensor(x.shape)),
    "gradient of a collective": Kind(grad=in_collective),
    "gradient of a collective, minus": Kind(grad=lambda x: in_collective(-x).neg()),
    "gradient of a subclass": Kind(grad=lambda x: x.as_subclass(Named)),
    "gradient expanded": Kind(grad=lambda x: x[:1].expand(x.shape)),
    "gradient turned": Kind(grad=turned),
    "gradient sliced": Kind(grad=sliced),
    "gradient unaligned": Kind(grad=unaligned),
    "gradient of inference mode": Kind(grad=in_inference),
    "gradient that is a parameter": Kind(grad=nn.Parameter),
    "minus": Kind(minus),
    "subclass": Kind(lambda x: x.as_subclass(Named)),
    "subclass with a gradient of it": Kind(lambda x: x.as_subclass(Named), lambda x: x.as_subclass(Named)),
    "transposed": Kind(turned, turned),
    "transposed, gradient not": Kind(turned),
    "reversed axes": Kind(turned, turned, ((5, 4, 3), (20, 16, 15))),
    "sliced": Kind(sliced),
    "unaligned": Kind(unaligned),
    "channels last": Kind(channels_last, channels_last, IMAGES),
    "channels last, gradient not": Kind(channels_last, shapes=IMAGES),
    "channels last gradient alone": Kind(grad=channels_last, shapes=IMAGES),
    "channels last in 3d": Kind(
        lambda x: x.to(memory_format=torch.channels_last_3d), shapes=((4, 2, 3, 3, 3), (8, 16, 3, 4, 4))
    ),
    "channels last of half precision": Kind(channels_last, channels_last, IMAGES, torch.bfloat16),
    "no axis": Kind(shapes=((),)),
    "no axis, minus": Kind(grad=minus, shapes=((),)),
    "no elements": Kind(shapes=((0,), (0, 5), (5, 0), (6, 0, 3))),
    "no elements, turned": Kind(turned, turned, shapes=((0, 5), (5, 0))),
    "some without elements": Kind(shapes=((3, 4), (0, 5), (2,))),
    "frozen": Kind(frozen=True),
    "complex": Kind(dtype=torch.complex64),
    "complex with a conjugate gradient": Kind(grad=lambda x: x.conj().resolve_conj().conj(), dtype=torch.complex64),
    "complex, transposed": Kind(turned, turned, dtype=torch.complex64),
}

REFUSED: dict[str, tuple[Kind, str]] = {
    "conjugate": (Kind(torch.conj, dtype=torch.complex64), "is a lazy conjugate"),
    "lazy zeros": (Kind(lambda x: torch._efficientzerotensor(x.shape)), "zeros without memory"),
    "expanded": (Kind(lambda x: x[:1].expand(x.shape)), "share memory"),
    "inference mode": (Kind(in_inference, frozen=True), "inference mode"),
    "sparse": (Kind(Tensor.to_sparse), "layout is sparse_coo"),
    "sparse gradient": (Kind(grad=Tensor.to_sparse), "sparse gradient"),
    "gradient of a wrapper": (Kind(grad=lambda x: two(x, x)), "of the class TwoTensor"),
}


def written_down(x: Any) -> Tensor:
    """A contiguous tensor with the same values and nothing lazy about it."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x.detach())
