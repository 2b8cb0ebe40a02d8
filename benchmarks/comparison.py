"""Whether what a kernel has written is what the reference has written, and where they are furthest apart.

Each tolerance is a number of units in the last place for what is rounded, and a share of what was added for what is
computed: a kernel and torch on a GPU differ by some units in each operation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_optim.storage import Quantized

OF_LARGEST = 1e-6  # share of the largest value by which others may differ
FLIPPED = 0.01  # share of codes that may be rounded to the neighbour, or drawn otherwise where a logarithm differs


def check_parameter(p: Tensor, twin: Tensor, old: Tensor, share: float = OF_LARGEST) -> Iterator[str]:
    """Compare a parameter after a step.

    It may differ by one rounding in half precision and by four in float32, where several operations round; by a
    200000th of its step; and by five times `share` of the largest step, since a step may be a difference of larger
    terms.
    """
    new, own, moved = p.detach().double(), twin.detach().double(), (p.detach().double() - old.double()).abs()
    if p.numel():
        info = torch.finfo(p.dtype)
        unit = info.eps if p.dtype != torch.float32 else 4 * info.eps
        largest = torch.where(moved.isfinite(), moved, 0).max()
        bound = unit * new.abs().clamp(min=info.tiny) + 5e-6 * moved.nan_to_num() + 5 * share * largest
        yield from _apart("the parameter", new, own, bound, f" in a step of at most {largest:.1e}")


def check_values(name: str, value: Tensor, own: Tensor, share: float = OF_LARGEST) -> Iterator[str]:
    """Compare a slot that is not quantized.

    It may differ by one rounding in half precision, else by a hundred-thousandth; and by a `share` of the largest,
    since a moving average of values with both signs cancels.
    """
    if value.shape != own.shape or value.dtype != own.dtype:
        yield f"{name} is {own.dtype} of shape {tuple(own.shape)}, not {value.dtype} of shape {tuple(value.shape)}"
        return
    unit = torch.finfo(value.dtype).eps if value.dtype in (torch.bfloat16, torch.float16) else 1e-5
    value, own = value.detach().double(), own.detach().double()
    if value.numel():
        finite = torch.where(value.isfinite(), value, 0).abs()
        yield from _apart(name, value, own, unit * finite + share * finite.max())


def check_codes(name: str, value: Quantized, own: Quantized, flipped: dict[str, Tensor]) -> Iterator[str]:
    """Compare codes and scales of a slot.

    Codes may be neighbours, in few elements. A ratio to a root that was drawn otherwise may be any.

    Args:
        name: The name of the slot.
        value: What the reference has written.
        own: What the kernel has written.
        flipped: Receives which codes differ. It has those of a partner.
    """
    if not value.codes.numel():
        return
    apart = (value.codes.int() - own.codes.int()).abs()
    flipped[name] = apart > 0
    if value.format.partner is not None:
        apart = torch.where(flipped[value.format.partner], 0, apart)
    share, at = (apart > 0).double().mean().item(), int(apart.argmax())
    if apart.max() > 1 or share > FLIPPED:
        codes = f"{int(own.codes.view(-1)[at])} instead of {int(value.codes.view(-1)[at])} at {at}"
        yield f"codes of {name} ({value.format.name}) differ, {codes}; {100 * share:.2f} % of them differ"
    # The scale of a ratio has eight bits, so the last of them may differ.
    unit = 2.0**-7 if value.format.partner is not None else 1e-5
    yield from _apart(f"scales of {name}", value.scales.double(), own.scales.double(), unit * value.scales.abs())


def _apart(what: str, value: Tensor, own: Tensor, bound: Tensor, more: str = "") -> Iterator[str]:
    """The element that exceeds its bound most, in words."""
    apart = (value - own).abs()
    bad = ~((apart <= bound) | (value == own) | (value.isnan() & own.isnan()))
    if bad.any():
        at = int(torch.where(bad, (apart / bound).nan_to_num(torch.inf, torch.inf), -1.0).argmax())
        found, expected, allowed = (x.reshape(-1)[at].item() for x in (own, value, bound.expand_as(value)))
        differing = f"{int(bad.sum())} of {bad.numel()} differ"
        yield f"{what} is {found:.9g} instead of {expected:.9g} at {at}, allowed {allowed:.1e}{more}; {differing}"
