"""Stochastic weight averaging by Lightning's callback."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from examples.migrate.task import Task, fit


class Before(Task):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def averaging() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=5, annealing_epochs=1)


if __name__ == "__main__":
    print(fit(Before, averaging(), epochs=8)[1].callback_metrics["val/accuracy"])
