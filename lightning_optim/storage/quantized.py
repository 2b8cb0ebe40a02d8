"""A slot in 8-bit codes with scales for each block of elements."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.storage.format import Format

BLOCK = 256  # elements that share scales


@dataclass
class Quantized:
    """Codes and scales of one slot of one parameter.

    Attributes:
        shape: The shape of the slot.
        format: How values are quantized.
        codes: (blocks, BLOCK) uint8; the last block is filled up.
        scales: (blocks, format.scales_per_block) float32.
    """

    shape: torch.Size
    format: Format
    codes: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, shape: torch.Size, format: Format, device: torch.device) -> Quantized:
        """A slot of zeros."""
        blocks = -(-shape.numel() // BLOCK)
        quantized = cls(
            torch.Size(shape),
            format,
            torch.zeros(blocks, BLOCK, dtype=torch.uint8, device=device),
            torch.zeros(blocks, format.scales_per_block, dtype=torch.float32, device=device),
        )
        if blocks and device.type != "meta":
            zeros = torch.zeros(blocks, BLOCK, device=device)
            quantized.codes, quantized.scales = format.quantize(zeros, zeros if format.partner else None, zeros)
        return quantized

    def numel(self) -> int:
        """Number of values."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + 4 * self.scales.numel()

    def to(self, device: torch.device | str) -> Quantized:
        """The slot on a device. Lightning moves state by this name, and would copy a dataclass without it."""
        return Quantized(self.shape, self.format, self.codes.to(device), self.scales.to(device))

    def dequantize(self, partner: Tensor | None = None, low: int = 0, high: int | None = None) -> Tensor:
        """Values `low` to `high` of the flat slot, float32. `low` begins a block; `partner` covers the same range."""
        high = self.numel() if high is None else high
        first, last = low // BLOCK, -(-high // BLOCK)
        values = self.format.dequantize(self.codes[first:last], self.scales[first:last], _blocked(partner))
        return values.reshape(-1)[: high - low]

    def quantize(self, values: Tensor, partner: Tensor | None, t: int, low: int = 0) -> None:
        """Replace the values from `low` on by flat float32 `values`, rounding with the random bits of step `t`.

        A value that is not finite is kept as zero, so that it spoils neither its block nor later steps; the parameter,
        which is computed from values that are not rounded, shows it.
        """
        values = torch.nan_to_num(values, 0.0, 0.0, 0.0)
        first, last = low // BLOCK, -(-(low + values.numel()) // BLOCK)
        random = random_bits(t, first, last - first, values.device) if self.format.stochastic else None
        codes, scales = self.format.quantize(_blocked(values), _blocked(partner), random)  # type: ignore[arg-type]
        self.codes[first:last] = codes
        self.scales[first:last] = scales


def _blocked(values: Tensor | None) -> Tensor | None:
    """Flat values as (blocks, BLOCK), filled up with zeros."""
    if values is None:
        return None
    missing = -values.numel() % BLOCK
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def random_bits(t: int, first: int, blocks: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) that depend on the step and the place of the element alone, (blocks, BLOCK) float32.

    A counter-based hash (two rounds of multiply and xor-shift on 32 bits), so a resumed run gets what the
    uninterrupted one would have got, and every rank and engine gets the same. Elements of the two halves of a block
    share a hash, of which each takes 16 bits: as fine as rounding needs.

    Args:
        t: The step.
        first: The number of the first block.
        blocks: How many.
        device: Where.
    """
    half = BLOCK // 2
    start = _signed(first * half * 0x9E3779B1 + (t + 1) * 0x85EBCA77)
    x = torch.arange(blocks * half, dtype=torch.int32, device=device) * _signed(0x9E3779B1) + start  # wraps around
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = (x ^ (x >> 16 & 0xFFFF)) * _signed(multiplier)
    x = (x ^ (x >> 16 & 0xFFFF)).view(blocks, half)
    return torch.cat([x & 0xFFFF, x >> 16 & 0xFFFF], 1).to(torch.float32) * 2.0**-16


def _signed(x: int) -> int:
    """The int32 with the lowest 32 bits of x."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def read(slots: Mapping[str, Any], names: Collection[str], low: int = 0, high: int | None = None) -> dict[str, Tensor]:
    """The values of quantized slots from `low` to `high`, flat, float32."""
    found: dict[str, Tensor] = {}
    for name in names:
        _read_into(found, slots, name, low, high)
    return {name: found[name] for name in names}


def _read_into(found: dict[str, Tensor], slots: Mapping[str, Any], name: str, low: int, high: int | None) -> Tensor:
    # No function inside `read`: one that calls itself is a cycle, which would keep the values until a collection.
    if name not in found:
        slot = slots[name]
        if isinstance(slot, Quantized):
            partner = _read_into(found, slots, slot.format.partner, low, high) if slot.format.partner else None
            found[name] = slot.dequantize(partner, low, high)
        else:
            found[name] = slot.reshape(-1)[low:high]
    return found[name]


def write(slots: Mapping[str, Any], new: Mapping[str, Tensor], t: int, low: int = 0) -> None:
    """Quantize new flat values of quantized slots, those that others are measured in first.

    Args:
        slots: The slots by name.
        new: The new values of all quantized slots that change; a slot whose partner changes is among them.
        t: The step, which the random bits of rounding depend on.
        low: Where the values begin; it begins a block.
    """
    orphans = [name for name, slot in slots.items() if isinstance(slot, Quantized) and slot.format.partner in new]
    assert all(name in new for name in orphans), "a slot in units of another must be written with it"
    for name in sorted(new, key=lambda name: slots[name].format.partner is not None):
        partner = slots[name].format.partner
        high = low + new[name].numel()
        slots[name].quantize(new[name], read(slots, [partner], low, high)[partner] if partner else None, t, low)
