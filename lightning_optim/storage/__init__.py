"""How a slot is kept: in which type, and so at how many bytes per value."""

from __future__ import annotations

import torch

from lightning_optim.slot import Slot


def dtype(param: torch.dtype, bits: int, slot: Slot) -> torch.dtype:
    """The type that a slot of a parameter is kept in.

    Args:
        param: The type of the parameter. float64 and complex parameters keep state of their own type.
        bits: `state_bits` of the group: 32 is float32, 16 is bfloat16.
        slot: A slot that must stay exact, or that is one number, is never kept in fewer bits.
    """
    if slot.per != "element" or param in (torch.float64, torch.complex64, torch.complex128):
        return param if slot.per == "element" else torch.float64
    return torch.bfloat16 if bits == 16 and not slot.exact else torch.float32
