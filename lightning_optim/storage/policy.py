"""Which slot is kept in how many bits, decided on the logical tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.distributed.placement import logical_shape
from lightning_optim.language.slot import Slot
from lightning_optim.storage.dynamic import Dynamic
from lightning_optim.storage.log import Log
from lightning_optim.storage.quantized import Quantized
from lightning_optim.storage.ratio import Ratio

SMALLEST = 4096  # tensors with fewer elements are not quantized: their state is no memory to speak of
FORMATS = ("log", "dynamic")


def dtype(param: torch.dtype, bits: int, slot: Slot) -> torch.dtype:
    """The type that a slot of a parameter is kept in where it is a tensor.

    Args:
        param: The type of the parameter. float64 and complex parameters keep state of their own type.
        bits: `state_bits` of the group: 32 is float32, 16 is bfloat16, 8 leaves as float32 what is not quantized.
        slot: A slot that must stay exact, or that is one number, is never kept in fewer bits.
    """
    if slot.per != "element" or not _reducible(param):
        return param if slot.per == "element" else torch.float64
    return torch.bfloat16 if bits == 16 and not slot.exact else torch.float32


def is_quantized(param: Tensor, bits: int, slot: Slot) -> bool:
    """Whether a slot of this parameter is kept in 8-bit codes."""
    return bits == 8 and can_be_quantized(slot) and _reducible(param.dtype) and logical_shape(param).numel() >= SMALLEST


def can_be_quantized(slot: Slot) -> bool:
    """Whether a slot may be kept in codes at all."""
    return slot.per == "element" and slot.without is None and not slot.exact


def empty(values: Tensor, slot: Slot, partner: str | None, form: str) -> Quantized:
    """A quantized slot without content.

    Args:
        values: A tensor of the slot's shape and device; only these are used.
        slot: Says whether values are signed.
        partner: The name of the slot whose root this one is measured in, where that one is kept quantized as well.
        form: "log" codes second moments by their logarithm with stochastic rounding and first moments as their ratio to
            its root; "dynamic" is the code of bitsandbytes for every slot.
    """
    if form == "dynamic":
        return Quantized.empty(values.shape, Dynamic(slot.signed), values.device)
    if not slot.signed:
        return Quantized.empty(values.shape, Log(), values.device)
    if partner is not None:
        return Quantized.empty(values.shape, Ratio(partner), values.device)
    return Quantized.empty(values.shape, Dynamic(signed=True), values.device)


def _reducible(param: torch.dtype) -> bool:
    return param in (torch.float32, torch.bfloat16, torch.float16)
