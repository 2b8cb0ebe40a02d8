"""An exponential moving average by Lightning's callback; WeightAveraging with a function of one's own is alike."""

from __future__ import annotations

from lightning.pytorch.callbacks import EMAWeightAveraging

from examples.migrate.swa_before import Before
from examples.migrate.task import fit


def averaging() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.95)


if __name__ == "__main__":
    print(fit(Before, averaging())[1].callback_metrics["val/accuracy"])
