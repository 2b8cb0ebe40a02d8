"""In which order the results of tiles are combined: level by level, a bounded number of them at a time.

One instance of a kernel would take a millisecond for those of a tensor of 10^9 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_optim.engines.launch import Launch, to_device

MOST = 4096  # results that one instance combines: four at a time for each of 1024


def levels_of(launch: Launch) -> list[Tensor]:
    """The levels of a launch, which it keeps: one, unless a tensor has more than `MOST` tiles.

    Returns:
        For each level where the results that one instance combines begin, and the end, int64. The last level has an
            instance for each tensor.
    """
    if not launch.levels:
        starts = launch.host[:, 0].clone()
        while (counts := starts.diff()).numel() and int(counts.max()) > MOST:
            sections = (counts + MOST - 1) // MOST  # of each tensor
            firsts = torch.zeros_like(starts)
            firsts[1:] = sections.cumsum(0)
            number = torch.arange(int(firsts[-1]), dtype=torch.int64, device="cpu")
            number -= torch.repeat_interleave(firsts[:-1], sections)
            begins = torch.repeat_interleave(starts[:-1], sections) + number * MOST
            launch.levels.append(to_device(torch.cat([begins, starts[-1:]]), launch.table.device))
            starts = firsts
        launch.levels.append(to_device(starts, launch.table.device))
    return launch.levels
