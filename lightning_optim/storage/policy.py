"""Which slot is stored in which dtype or 8-bit format. This depends on the logical tensor, not on its shards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_optim.distributed.placement import logical_shape
from lightning_optim.distributed.plain import is_wrapper, memory_order
from lightning_optim.language.slot import Slot
from lightning_optim.storage.curve import Curve
from lightning_optim.storage.dynamic import Dynamic
from lightning_optim.storage.format import Format
from lightning_optim.storage.log import Log
from lightning_optim.storage.quantized import Quantized
from lightning_optim.storage.ratio import Ratio

SMALLEST = 4096  # tensors with fewer elements are not quantized: their state takes little memory


def dtype(param: torch.dtype, bits: int, slot: Slot) -> torch.dtype:
    """The dtype in which a slot that is not quantized is stored.

    Args:
        param: The dtype of the parameter. State of float64 and complex parameters has the dtype of the parameter.
        bits: `state_bits` of the parameter group: 32 for float32, 16 for bfloat16, 8 for float32 where a slot is not
            quantized.
        slot: The slot. One that must stay exact, that belongs to a matrix or that holds one number is never stored in
            fewer bits.
    """
    if slot.per in ("tensor", "optimizer"):
        return torch.float64
    if not _reducible(param):
        return param
    return torch.bfloat16 if bits == 16 and slot.per == "element" and not slot.exact else torch.float32


def is_quantized(param: Tensor, bits: int, slot: Slot) -> bool:
    """Whether a slot of this parameter is quantized under `state_bits=bits`."""
    reducible = can_be_quantized(slot) and _reducible(param.dtype) and not is_wrapper(param)
    return bits == 8 and reducible and logical_shape(param).numel() >= SMALLEST


def can_be_quantized(slot: Slot) -> bool:
    """Whether a slot may be quantized at all."""
    return slot.per == "element" and slot.without is None and not slot.exact


def empty(values: Tensor, slot: Slot, partner: str | None, form: str) -> Quantized:
    """A quantized slot of zeros.

    Args:
        values: A tensor of the shape and on the device of the slot, and in its memory order. Its values are not used.
        slot: The slot.
        partner: The slot relative to whose square root this one is quantized, if that one is quantized as well.
        form: The `state_format` of the parameter group, a key of `FORMATS`.
    """
    return Quantized.empty(values.shape, FORMATS[form](slot, partner), values.device, memory_order(values))


def _log(slot: Slot, partner: str | None) -> Format:
    """The format "log": scales like a logarithm, on which first moments are relative to the root of the second."""
    if not slot.signed:
        return Log()
    return Curve() if partner is None else Ratio(partner)


def _dynamic(slot: Slot, partner: str | None) -> Format:
    """The format "dynamic": the dynamic tree quantization of bitsandbytes for every slot."""
    return Dynamic(slot.signed)


# The format of a slot and its partner, for each value of `state_format` (the same words as in language/definition.py).
FORMATS: dict[str, Callable[[Slot, str | None], Format]] = {"log": _log, "dynamic": _dynamic}


def _reducible(param: torch.dtype) -> bool:
    """Whether state of parameters of this dtype may be stored in fewer bits."""
    return param in (torch.float32, torch.bfloat16, torch.float16)
