"""The value of a slot before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.placement import full_with_axes_reduced, local
from lightning_optim.distributed.plain import bare, memory_format
from lightning_optim.language.axes import as_axes
from lightning_optim.language.program import namespace
from lightning_optim.language.slot import Slot


def first_value(slot: Slot, p: Tensor, dtype: torch.dtype, h: Mapping[str, Any]) -> Tensor:
    """The value of a slot of `p` before the first step, as a tensor that is sharded like `p`."""
    start, p = slot.start(namespace(h)), bare(p)
    if slot.per != "element":
        return torch.full((), start, dtype=torch.float64, device=local(p).device)
    if slot.copies:
        return p.detach().to(dtype=dtype, copy=True, memory_format=memory_format(p))
    if slot.without is not None:
        return full_with_axes_reduced(p, {axis % p.dim() for axis in as_axes(h[slot.without])}, start, dtype)
    value = torch.full_like(p, start, dtype=dtype, memory_format=memory_format(p))
    if value.is_complex():  # real and imaginary parts are elements
        torch.view_as_real(value).fill_(start)
    return value
