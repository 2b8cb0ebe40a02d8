"""The loss of a step, for optimizers whose update reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.placement import local
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

    def take(self, layout: StateLayout, returned: Any) -> dict[str, Any]:
        """The loss and its second moment as inputs of an update, averaged over ranks. This clears them.

        A loss on the GPU of the parameters stays a tensor, which the host never reads. Any other is read.

        Args:
            layout: The optimizer.
            returned: What the closure returned, which is used if no loss was set.

        Raises:
            RuntimeError: where there is no loss, and where a replay could not read it.
        """
        owner, capturable = type(layout).__name__, layout.defaults["capturable"]
        loss = returned if self.mean is None else self.mean
        square = self.second_moment
        self.set(None, None)
        if loss is None:
            raise RuntimeError(
                f"{owner} reads the loss, and nobody supplied it. Call optimizer.step(closure) with a closure that "
                "returns the loss, or optimizer.set_loss(loss) before optimizer.step()."
            )
        home = local(layout.every_parameter()[0][1]).device
        there = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        if capturable and there != home:
            raise RuntimeError(
                f"{owner}: under capturable=True replays read the loss on the device of the parameters, {home}. Give "
                "it as a tensor there."
            )
        pair = [_number(x, there) for x in (loss, 0.0 if square is None else square)]
        found = mean_over_ranks(torch.stack(pair))
        # A finite loss of that size is read as a gradient of that size is: weights would become as large as it.
        found = torch.where((found[0].abs() > LARGEST_IN_FLOAT32) & found[0].isfinite(), 0.0, found)
        first, second = found.unbind() if capturable or there == home != torch.device("cpu") else found.tolist()
        return {"loss": first, "loss_second_moment": first * first if square is None else second}


def _number(x: Any, device: torch.device) -> Tensor:
    """A number as a float64 tensor of shape (), for which no device is waited for."""
    if isinstance(x, Tensor):
        return x.detach().to(dtype=torch.float64, device=device).reshape(())
    return torch.full((), float(x), dtype=torch.float64, device=device)
