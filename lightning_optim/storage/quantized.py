"""Quantized slots: 8-bit codes, with scales for each block of elements."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.storage.format import Format

BLOCK = 256  # elements that share scales
LARGEST = 2.0**127  # values of this size and above count as infinite, so that no sum of a format overflows
# 2^32 times the irrational numbers of Roberts' sequence, 1/x and 1/x^2 where x^3 = x + 1, rounded to odd numbers.
PER_ELEMENT, PER_STEP = 0xC13FA9A9, 0x91E10DA5


@dataclass
class Quantized:
    """Codes and scales of one slot of one parameter.

    Attributes:
        shape: The shape of the slot.
        format: The format.
        codes: The codes, (blocks, BLOCK) uint8. The last block is padded.
        scales: The scales, (blocks, format.scales_per_block) float32.
        order: The axes of the slot in the order in which its values are stored; None for their own order.
    """

    shape: torch.Size
    format: Format
    codes: Tensor
    scales: Tensor
    order: tuple[int, ...] | None = None

    @classmethod
    def empty(
        cls, shape: torch.Size, format: Format, device: torch.device, order: tuple[int, ...] | None = None
    ) -> Quantized:
        """A slot of zeros."""
        blocks = -(-shape.numel() // BLOCK)
        quantized = cls(
            torch.Size(shape),
            format,
            torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device),
            torch.zeros(blocks, format.scales_per_block, dtype=torch.float32, device=device),
            order,
        )
        if blocks and device.type != "meta":
            zeros = torch.zeros(blocks, BLOCK, dtype=torch.float32, device=device)
            quantized.codes, quantized.scales = format.quantize(zeros, zeros if format.partner else None, zeros)
        return quantized

    def numel(self) -> int:
        """The number of values."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """The size of codes and scales in bytes."""
        return self.codes.numel() + 4 * self.scales.numel()

    def to(self, device: torch.device | str) -> Quantized:
        """The slot on another device. Lightning calls `to` on state, and would copy a dataclass that lacks it."""
        return Quantized(self.shape, self.format, self.codes.to(device), self.scales.to(device), self.order)

    def shaped(self, values: Tensor) -> Tensor:
        """Flat values, as they are stored, in the shape of the slot."""
        if self.order is None:
            return values.view(self.shape)
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return values.view([self.shape[axis] for axis in self.order]).permute(inverse)

    def dequantize(self, partner: Tensor | None = None, low: int = 0, high: int | None = None) -> Tensor:
        """Dequantize a range of the flat slot.

        Args:
            partner: The dequantized values of the partner in this range, flat.
            low: The index of the first value, a multiple of BLOCK.
            high: The index after the last value. Default: all.

        Returns:
            The values, (high - low,) float32.
        """
        high = self.numel() if high is None else high
        first, last = low // BLOCK, -(-high // BLOCK)
        values = self.format.dequantize(self.codes[first:last], self.scales[first:last], _blocked(partner))
        return values.reshape(-1)[: high - low]

    def quantize(self, values: Tensor, partner: Tensor | None, t: int, low: int = 0) -> None:
        """Quantize new values of a range of the flat slot.

        A value that is not finite, or not below 2^127, is stored as zero, so that it spoils neither its block nor later
        steps. It is visible in the parameter, which is computed from the values before rounding.

        Args:
            values: The new values, flat.
            partner: The values of the partner in this range as they will be dequantized, flat.
            t: The step, on which stochastic rounding depends.
            low: The index of the first value, a multiple of BLOCK.
        """
        values = values.to(torch.float32)
        values = torch.where(values.abs() < LARGEST, values, 0.0)
        first, last = low // BLOCK, -(-(low + values.numel()) // BLOCK)
        added = dither(t, first, last - first, values.device) if self.format.stochastic else None
        codes, scales = self.format.quantize(_blocked(values), _blocked(partner), added)  # type: ignore[arg-type]
        self.codes[first:last] = codes
        self.scales[first:last] = scales


def _blocked(values: Tensor | None) -> Tensor | None:
    """Flat values in the shape (blocks, BLOCK), padded with zeros."""
    if values is None:
        return None
    missing = -values.numel() % BLOCK
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def dither(t: int, first: int, blocks: int, device: torch.device) -> Tensor:
    """What is added before rounding to the nearest, so that rounding is right on average: numbers in (-1/2, 1/2).

    They are multiples of two irrational numbers without their whole part: one counts the elements of the local slot and
    one the steps (Roberts' sequence in two dimensions). So they are spread evenly over neighbours, over steps and over
    both, more evenly than random numbers, and errors of successive steps cancel. A resumed run rounds as the
    uninterrupted run would have, and all engines round alike. They are odd multiples of 2^-13: what lies on a code, but
    for the error of arithmetic, stays there.

    Args:
        t: The step.
        first: The index of the first block.
        blocks: The number of blocks.
        device: The device of the result.

    Returns:
        A float32 tensor of shape (blocks, BLOCK).
    """
    index = torch.arange(blocks * BLOCK, dtype=torch.int32, device=device)
    x = index * _signed(PER_ELEMENT) + _signed(first * BLOCK * PER_ELEMENT + t * PER_STEP)  # wraps around
    return ((x >> 19 & 0x1FFF | 1).to(torch.float32) * 2.0**-13 - 0.5).view(blocks, BLOCK)


def _signed(x: int) -> int:
    """The int32 with the lowest 32 bits of x, since torch has no uint32 arithmetic."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def read(slots: Mapping[str, Any], names: Collection[str], low: int = 0, high: int | None = None) -> dict[str, Tensor]:
    """Dequantize a range of several slots.

    Args:
        slots: All slots of a parameter by name; some may be tensors.
        names: The slots to read.
        low: The index of the first value, a multiple of BLOCK.
        high: The index after the last value. Default: all.

    Returns:
        The values by name, each (high - low,) float32.
    """
    values: dict[str, Tensor] = {}
    for name in names:
        _read_into(values, slots, name, slots[name].order, low, high)
    return {name: values[name] for name in names}


def read_shaped(slots: Mapping[str, Any], names: Collection[str]) -> dict[str, Tensor]:
    """Dequantize several slots, each in its shape."""
    return {name: slots[name].shaped(values) for name, values in read(slots, names).items()}


def flat(values: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """The values of a tensor one after another, its axes taken in the given order."""
    return (values if order is None else values.permute(order)).reshape(-1)


def _read_into(
    values: dict[str, Tensor],
    slots: Mapping[str, Any],
    name: str,
    order: tuple[int, ...] | None,
    low: int,
    high: int | None,
) -> Tensor:
    """Add the values of a slot, and those of its partner, to `values`."""
    # Not a function inside `read`: a nested function that calls itself is a reference cycle, which would keep the
    # values alive until the garbage collector runs.
    if name not in values:
        slot = slots[name]
        if isinstance(slot, Quantized):
            partner = slot.format.partner
            of_partner = _read_into(values, slots, partner, order, low, high) if partner else None
            values[name] = slot.dequantize(of_partner, low, high)
        else:
            values[name] = flat(slot, order)[low:high]
    return values[name]


def write(slots: Mapping[str, Any], new: Mapping[str, Tensor], t: int, low: int = 0) -> None:
    """Quantize new values of a range of several slots, those of partners first.

    Args:
        slots: All slots of a parameter by name.
        new: The new values of the quantized slots that change, flat, by name. They must include each slot whose
            partner they include.
        t: The step, on which stochastic rounding depends.
        low: The index of the first value, a multiple of BLOCK.
    """
    dependent = [name for name, slot in slots.items() if isinstance(slot, Quantized) and slot.format.partner in new]
    assert all(name in new for name in dependent), "a slot must be written whenever its partner is"
    for name in sorted(new, key=lambda name: slots[name].format.partner is not None):
        partner = slots[name].format.partner
        high = low + new[name].numel()
        order = slots[name].order
        of_partner = _read_into({}, slots, partner, order, low, high) if partner else None
        slots[name].quantize(new[name], of_partner, t, low)


def write_shaped(slots: Mapping[str, Any], new: Mapping[str, Tensor], t: int) -> None:
    """Quantize new values of whole slots, each in the shape of its slot."""
    write(slots, {name: flat(values, slots[name].order) for name, values in new.items()}, t)
