"""Run all pairs, and say what agrees.

python -m examples.migrate
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from examples.migrate import (
    adamw_after,
    adamw_before,
    bitsandbytes_after,
    bitsandbytes_before,
    ema_after,
    ema_before,
    swa_after,
    swa_before,
)
from examples.migrate.task import fit


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def accuracy(trainer: Trainer) -> str:
    return f"{float(trainer.callback_metrics['val/accuracy']):.3f}"


def apart(one: Tensor, other: Tensor) -> str:
    """The largest difference of two weights, and the size of the largest weight."""
    return f"{float((one - other).abs().max()):.1e} of {float(one.abs().max()):.2g}"


def halfway(folder: Path) -> ModelCheckpoint:
    """Saves a checkpoint after 2 epochs."""
    return ModelCheckpoint(folder, "{epoch}", every_n_epochs=2, save_top_k=-1)


def findings(folder: Path) -> Iterator[tuple[str, str]]:
    """What was compared, and what came out."""
    half = folder / "epoch=1.ckpt"
    before, _ = fit(adamw_before.Before, halfway(folder))
    after, _ = fit(adamw_after.After)
    yield "AdamW of torch and adamw, weights after 4 epochs", apart(weights(before), weights(after))
    resumed, _ = fit(adamw_after.After, ckpt_path=half)
    yield "2 epochs by torch, its checkpoint, 2 epochs by adamw", apart(weights(before), weights(resumed))

    before, _ = fit(swa_before.Before, ema_before.averaging())
    after, _ = fit(swa_before.Before, ema_after.averaging())
    yield "EMAWeightAveraging and IterateAveraging, averages", apart(weights(before), weights(after))

    before, _ = fit(swa_before.Before, swa_before.averaging(), epochs=8)
    after, trainer = fit(swa_before.Before, swa_after.averaging(), epochs=8)
    yield "SWA and IterateAveraging, averages", apart(weights(before), weights(after))
    state = trainer.optimizers[0].state  # while the model has the average, the slot has the last weights
    last = torch.cat([state[p]["average"].reshape(-1) for p in after.parameters()])
    yield (
        "the same without the last epoch, which SWA leaves out",
        apart(weights(before), (5 * weights(after) - last) / 4),
    )

    if importlib.util.find_spec("bitsandbytes") is None:
        yield "bitsandbytes", "not installed: pip install bitsandbytes"
        return
    runs = [fit(bitsandbytes_before.Before, halfway(folder)), fit(bitsandbytes_after.After)]
    yield "AdamW8bit and adamw with state_bits 8, validation accuracy", " and ".join(accuracy(run) for _, run in runs)
    resumed, run = fit(bitsandbytes_after.After, ckpt_path=half)
    yield "2 epochs by bitsandbytes, its checkpoint, 2 epochs by adamw", accuracy(run)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for what, found in findings(Path(folder)):
            print(f"{what:<64}{found}")


if __name__ == "__main__":
    main()
