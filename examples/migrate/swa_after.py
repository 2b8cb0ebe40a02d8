"""The same by IterateAveraging, which works with any optimizer, this one of torch too."""

from __future__ import annotations

from examples.migrate.swa_before import Before
from examples.migrate.task import fit
from lightning_optim.callbacks import IterateAveraging


def averaging() -> IterateAveraging:
    return IterateAveraging("mean", start=0.5, every="epoch")


if __name__ == "__main__":
    print(fit(Before, averaging(), epochs=8)[1].callback_metrics["val/accuracy"])
