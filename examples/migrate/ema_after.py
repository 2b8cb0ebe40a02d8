"""The same by IterateAveraging."""

from __future__ import annotations

from examples.migrate.swa_before import Before
from examples.migrate.task import fit
from lightning_optim.callbacks import IterateAveraging


def averaging() -> IterateAveraging:
    return IterateAveraging("ema", decay=0.95)


if __name__ == "__main__":
    print(fit(Before, averaging())[1].callback_metrics["val/accuracy"])
