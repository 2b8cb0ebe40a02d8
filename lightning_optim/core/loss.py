"""The loss of a step, for optimizers whose update reads it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.ranks import mean_over_ranks
from lightning_optim.language.math import LARGEST_IN_FLOAT32


class Loss:
    """The mean loss of a batch of samples and the mean of their squared losses, until a step uses them."""

    def __init__(self) -> None:
        self.mean: Any = None
        self.second_moment: Any = None

    def set(self, mean: Any, second_moment: Any) -> None:
        """Set the loss of the next step."""
        self.mean, self.second_moment = mean, second_moment

    def take(self, owner: str, returned: Any) -> dict[str, float]:
        """The loss and its second moment as inputs of an update, averaged over ranks. This clears them.

        Args:
            owner: The optimizer, for the message.
            returned: What the closure returned, which is used if no loss was set.

        Raises:
            RuntimeError: where there is no loss.
        """
        loss = returned if self.mean is None else self.mean
        square = self.second_moment
        self.set(None, None)
        if loss is None:
            raise RuntimeError(
                f"{owner} reads the loss, and nobody supplied it. Call optimizer.step(closure) with a closure that "
                "returns the loss, or optimizer.set_loss(loss) before optimizer.step()."
            )
        device = loss.device if isinstance(loss, Tensor) else "cpu"
        pair = (
            torch.as_tensor(x, dtype=torch.float64, device=device).detach().reshape(())
            for x in (loss, 0.0 if square is None else square)
        )
        first, second = mean_over_ranks(torch.stack([*pair])).tolist()
        if LARGEST_IN_FLOAT32 < abs(first) < math.inf:
            first, second = 0.0, 0.0  # as a gradient of that size is read: weights would become as large as it
        return {"loss": first, "loss_second_moment": first * first if square is None else second}
