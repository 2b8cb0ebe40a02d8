"""What the pieces of the benchmark run with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contenders import NAMES
from benchmarks.shapes import LISTS, Shape, tiny

Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where the pieces run, and how much of them.

    Attributes:
        tiny: Whether sizes are for Triton's interpreter on a CPU.
        rounds: How often each contender of a race is visited.
        jobs: How many pieces without a clock run side by side.
        optimizers: The optimizers that are raced.
    """

    tiny: bool = False
    rounds: int = 10
    jobs: int = 1
    optimizers: Sequence[str] = NAMES

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def on_gpu(self) -> bool:
        return not self.tiny

    @property
    def lists(self) -> dict[str, Callable[[], list[Shape]]]:
        """The lists of tensors that are raced, by name."""
        return {"tiny": tiny} if self.tiny else LISTS
