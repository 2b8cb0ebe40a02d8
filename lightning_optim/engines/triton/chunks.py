"""The elements that are added up towards statistics, in chunks of bounded size.

A kernel writes the values of a chunk into a buffer, and torch adds them up, always in the same order. Tensors of one
shape lie in it one after another, so that many small ones cost as few calls as one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_optim.engines.launch import Launch, to_device
from lightning_optim.engines.stacks import Stack, Stacks

ROOM = 1 << 24  # elements of a chunk


@dataclass
class Chunk:
    """Consecutive tiles of the tensors of one stack.

    Attributes:
        stack: The stack.
        low: The first element, counted over all tensors of the stack one after another.
        high: The end.
        tiles: Pairs of some consecutive tiles, each as the first one and the end, and where in the buffer they begin.
        picked: All tiles, on the device.
        offsets: Where in the buffer the elements of each tile begin, on the device.
    """

    stack: Stack
    low: int
    high: int
    tiles: list[tuple[int, int, int]] = field(default_factory=list)
    picked: Tensor = field(init=False)
    offsets: Tensor = field(init=False)

    def build_tables(self, tile: int, device: torch.device) -> None:
        """Fill the tables."""
        picked = torch.cat([torch.arange(a, b, dtype=torch.int32, device="cpu") for a, b, _ in self.tiles])
        rows = (at + tile * torch.arange(b - a, dtype=torch.int64, device="cpu") for a, b, at in self.tiles)
        self.picked, self.offsets = to_device(picked, device), to_device(torch.cat([*rows]), device)

    def add_up(self, which: int, sums: Tensor, values: Tensor) -> None:
        """Add the values of the chunk to the sums of one kind of statistic.

        Args:
            which: The kind of statistic.
            sums: Its sums for all stacks, flat.
            values: The values, (high - low,).
        """
        strides = self.stack.strides.with_members(len(self.stack.params))
        strides.add_up(which, sums[self.stack.starts[which] :], values, self.low)


def chunks_of(launch: Launch, stacks: Stacks) -> list[Chunk]:
    """The chunks of a launch, stack by stack."""
    rows = {position: row for row, position in enumerate(launch.positions)}
    begins = launch.host[:, 0].tolist()
    found: list[Chunk] = []
    for stack in stacks.stacks:
        for member, position in enumerate(stack.positions):
            if position not in rows:
                continue
            begin, end = begins[rows[position]], begins[rows[position] + 1]
            first = member * stack.params[member].param.numel()
            last = first + stack.params[member].param.numel()
            for tile in range(begin, end, ROOM // launch.tile):
                until = min(tile + ROOM // launch.tile, end)
                low, high = first + (tile - begin) * launch.tile, min(first + (until - begin) * launch.tile, last)
                if not found or found[-1].stack is not stack or found[-1].high != low or high - found[-1].low > ROOM:
                    found.append(Chunk(stack, low, low))
                found[-1].tiles.append((tile, until, low - found[-1].low))
                found[-1].high = high
    for chunk in found:
        chunk.build_tables(launch.tile, launch.table.device)
    return found
