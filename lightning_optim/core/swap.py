"""A parameter and a slot that exchange their values, so that the model holds other weights for a while."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def swap(p: Tensor, state: dict[str, Any], slot: str) -> None:
    """Exchange a parameter and its slot; a second call brings both back.

    A parameter in 16 bits cannot store what is in the slot, which therefore keeps its value; the weights of training
    are in a slot `raw` until they are put back.
    """
    other = state[slot]
    if other.dtype == p.dtype:
        raw = p.detach().clone()
        p.copy_(other)
        other.copy_(raw)
    elif "raw" in state:
        p.copy_(state.pop("raw"))
    else:
        state["raw"] = p.detach().to(other.dtype)
        p.copy_(other)
