"""The same by a mapping: the mixin makes the groups, the optimizer and the schedule."""

from __future__ import annotations

from examples.migrate.task import Task, fit
from lightning_optim import ConfiguredOptimizer, OptimizerSpec

SPEC: OptimizerSpec = {
    "name": "adamw",
    "lr": 2e-3,
    "betas": (0.9, 0.95),
    "weight_decay": 0.05,
    "schedule": {"name": "cosine", "warmup_steps": 10},
}


class After(ConfiguredOptimizer, Task):
    def __init__(self, optimizer: OptimizerSpec = SPEC) -> None:
        super().__init__()
        self.save_hyperparameters()


if __name__ == "__main__":
    print(fit(After)[1].callback_metrics["val/accuracy"])
