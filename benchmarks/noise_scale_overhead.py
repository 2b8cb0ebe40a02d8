"""Measures a step of the digits with and without GradientNoiseScale, from accumulated batches in every step.

`python -m benchmarks.noise_scale_overhead`: medians of alternating fits, one thread.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from examples.digits.digits import DigitsClassifier, DigitsData
from lightning_optim.callbacks import GradientNoiseScale

ROUNDS, EPOCHS, ACCUMULATED = 7, 2, 4


class Times(Callback):
    """When each step began."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if len(self.began) == trainer.global_step:
            self.began.append(time.perf_counter())


def median_step(*callbacks: Callback) -> float:
    """Milliseconds of a step of four batches of 16."""
    seed_everything(0, verbose=False)
    times = Times()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATED,
        callbacks=[times, *callbacks],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsClassifier("adamw"), datamodule=DigitsData(16))
    gaps = [after - before for before, after in zip(times.began[5:], times.began[6:], strict=False)]
    return 1e3 * statistics.median(gaps)


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    pairs = [(median_step(), median_step(GradientNoiseScale(every=1))) for _ in range(ROUNDS)]
    without, with_it = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"without {without:.2f} ms, with {with_it:.2f} ms, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
