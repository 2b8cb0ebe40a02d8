"""Sums towards statistics, in strips: some tiles of one tensor, which one thread adds up in their order.

The first strip of a tensor adds to the sums themselves. Each later one has a window of its own, as large as the part of
the statistic that its elements belong to, which is added to the sums afterwards. So the order of all additions follows
from the size of a tensor, and not from the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_optim.engines.launch import Launch
from lightning_optim.engines.stacks import Stacks
from lightning_optim.language.symbols import Symbol

LEAST = 256  # tiles in a strip: a window of it is small beside its elements
MOST = 64  # strips in a tensor, and so threads that serve it
LINE = 8  # numbers in a line of the cache: vectors that cross lines are stored at half the speed
ROOM = 1 << 22  # numbers in the windows of one call


@dataclass
class Call:
    """Strips that are added up in one call of the kernel.

    Attributes:
        bounds: The first tile of each strip, and the end of the last one.
        windows: What is added afterwards: the sum and the window, each as the first number and the end.
        size: The number of values in all windows.
    """

    bounds: list[int]
    windows: list[tuple[int, int, int, int]] = field(default_factory=list)
    size: int = 0


class Strips:
    """The strips of a launch for some means.

    Args:
        launch: The launch.
        stacks: The stacks of its batch.
        of: The means.

    Attributes:
        dtype: The compute dtype of the launch. Launches of one dtype add to the same sums.
        which: For each mean, its kind of statistic.
        starts: Where the sums of each mean begin in memory.
        size: The number of all sums. Windows follow them.
        windows: For each tile and mean, where the first number of the statistic of its tensor is, or would be.
    """

    def __init__(self, launch: Launch, stacks: Stacks, of: Sequence[Symbol]) -> None:
        self.stacks, self.launch = stacks, launch
        self.dtype = launch.params[0].compute_dtype
        self.which = [stacks.axes.index(symbol.axes) for symbol in of]
        self.sizes = [stacks.sizes[self.dtype][which] for which in self.which]
        self.starts, self.size = [], 0
        for size in self.sizes:
            self.starts.append(self.size)
            self.size += -(-size // LINE) * LINE
        first = [
            [starts[which] + start for which, start in zip(self.which, self.starts, strict=True)]
            for _, starts in (stacks.of_position[position] for position in launch.positions)
        ]
        rows = torch.tensor(first, dtype=torch.int64, device="cpu").view(len(first), len(of))
        self.windows = rows[launch.tiles.long()].contiguous()
        self.calls = self._cut(first)

    def _cut(self, first: list[list[int]]) -> list[Call]:
        """Cut the tiles of each tensor into strips, and give each strip but the first its window."""
        ends = self.launch.table[1:, 0].tolist()
        call = Call([0])
        calls = [call]
        begin = 0
        for row, end in enumerate(ends):
            length = max(LEAST, -(-(end - begin) // MOST))
            for tile in range(begin, end, length):
                last = min(tile + length, end)
                if tile > begin:
                    if call.size > ROOM:
                        call = Call([tile])
                        calls.append(call)
                    self._window(call, row, first[row], begin, tile, last)
                call.bounds.append(last)
            begin = end
        return calls

    def _window(self, call: Call, row: int, first: list[int], begin: int, tile: int, last: int) -> None:
        """Make the windows of a strip."""
        stack, _ = self.stacks.of_position[self.launch.positions[row]]
        elements = self.launch.params[row].param.numel()
        low, high = ((x - begin) * self.launch.tile for x in (tile, last))
        for i, which in enumerate(self.which):
            start, end = stack.strides.window(which, low, min(high, elements))
            at = self.size + call.size + (first[i] + start) % LINE
            self.windows[tile:last, i] = at - start
            call.windows.append((first[i] + start, first[i] + end, at, at + end - start))
            call.size += ((end - start) // LINE + 2) * LINE

    def run(self, sums: Tensor, kernel: Callable[[Sequence[int]], None]) -> None:
        """Add all elements to the sums.

        Args:
            sums: Float64 memory, (size,) and behind it as much as the largest call needs.
            kernel: A function that adds up strips in that memory, given by their bounds.
        """
        for call in self.calls:
            sums[self.size : self.size + call.size].zero_()
            kernel(call.bounds)
            for first, end, low, high in call.windows:
                sums[first:end] += sums[low:high]

    def parts(self, sums: Tensor) -> list[Tensor]:
        """The sums of each mean."""
        return [sums[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True)]

    @property
    def needed(self) -> int:
        """The size of the memory that `run` needs."""
        return self.size + max(call.size for call in self.calls)
