"""Which slot is kept in how many bits, decided on the logical tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_optim.distributed.placement import logical_shape
from lightning_optim.language.slot import Slot
from lightning_optim.storage.dynamic import Dynamic
from lightning_optim.storage.format import Format
from lightning_optim.storage.log import Log
from lightning_optim.storage.quantized import Quantized
from lightning_optim.storage.ratio import Ratio

SMALLEST = 4096  # tensors with fewer elements are not quantized: their state is no memory to speak of


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
    """A quantized slot of zeros.

    Args:
        values: A tensor of the slot's shape and device; only these are used.
        slot: Says whether values are signed.
        partner: The name of the slot whose root this one is measured in, where that one is quantized as well.
        form: The `state_format` of the parameter group, a key of `FORMATS`.
    """
    return Quantized.empty(values.shape, FORMATS[form](slot, partner), values.device)


def _log(slot: Slot, partner: str | None) -> Format:
    """Second moments by their logarithm, and first moments as their ratio to its root."""
    if not slot.signed:
        return Log()
    return Dynamic(signed=True) if partner is None else Ratio(partner)


def _dynamic(slot: Slot, partner: str | None) -> Format:
    """The code of bitsandbytes for every slot."""
    return Dynamic(slot.signed)


# What `state_format` may be (`language/definition.py` names the same words): the format of a slot, given its partner.
FORMATS: dict[str, Callable[[Slot, str | None], Format]] = {"log": _log, "dynamic": _dynamic}


def _reducible(param: torch.dtype) -> bool:
    return param in (torch.float32, torch.bfloat16, torch.float16)
