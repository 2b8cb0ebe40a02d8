"""The same by two words. `no_decay: []` lets biases and norms decay too, as bitsandbytes does without groups."""

from __future__ import annotations

from examples.migrate.task import Task, fit
from lightning_optim import ConfiguredOptimizer, OptimizerSpec

SPEC: OptimizerSpec = {"name": "adamw", "lr": 2e-3, "weight_decay": 0.01, "state_bits": 8, "no_decay": []}


class After(ConfiguredOptimizer, Task):
    def __init__(self, optimizer: OptimizerSpec = SPEC) -> None:
        super().__init__()
        self.save_hyperparameters()


if __name__ == "__main__":
    print(fit(After)[1].callback_metrics["val/accuracy"])
