"""AdamW of torch, as most modules have it: no decay for biases and norms, a warm-up, a cosine."""

from __future__ import annotations

import math
from typing import Any

import torch

from examples.migrate.task import Task, fit


class Before(Task):
    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.ndim > 1]
        rest = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
        total, warmup = self.trainer.estimated_stepping_batches, 10

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    print(fit(Before)[1].callback_metrics["val/accuracy"])
