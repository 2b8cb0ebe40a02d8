"""A fit under any strategy with validation, and its best checkpoint tested and predicted with; what each saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.harness.data import batches
from tests.harness.modules import Make, Toy
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import trainer

SHARDED_FILES = [pytest.param(kind, marks=pytest.mark.full) for kind in ("fsdp1 sharded", "fsdp2 sharded")]
JOURNEYS = ["ddp", "fsdp1 full", "fsdp2 full", *SHARDED_FILES]


class Outer(Toy):
    """A network with a parameter of its own in the outermost unit, which FSDP treats differently, and maybe a norm."""

    def __init__(self, make: Make, with_norm: bool) -> None:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(6) if with_norm else nn.Identity()
        super().__init__(make, lambda: nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 2)))
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, -1.0]))
        self.seen: dict[str, list[float]] = {"train": self.losses, "val": [], "test": [], "predict": []}

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs * self.scale)

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        loss = self.loss(batch)
        self.seen["val"].append(loss.item())
        self.log("val", loss, sync_dist=True)

    def test_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.seen["test"].append(self.loss(batch).item())

    def predict_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.seen["predict"].append(loss.item())
        return loss


def journey(
    kind: Kind,
    make: Make,
    callback: Callable[[], Callback],
    folder: Path,
    with_norm: bool = False,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Every rank sees the same samples, so every strategy must do what one process does."""
    module = Outer(make, with_norm)
    saving = ModelCheckpoint(folder, "{step}", monitor="val", save_top_k=-1, every_n_epochs=1)
    fitting = trainer(callback(), saving, strategy=strategy_of(kind), max_epochs=3)
    fitting.fit(module, batches(), batches(batch_size=16), ckpt_path=resume)
    scores = {path.split("step=")[-1]: float(score) for path, score in saving.best_k_models.items()}
    best = saving.best_model_path
    if kind.startswith("fsdp"):  # Lightning does not shard a module again that is sharded
        for what in ("test", "predict"):
            fresh, running = Outer(make, with_norm), trainer(strategy=strategy_of(kind))
            getattr(running, what)(fresh, batches(batch_size=16), ckpt_path=best)
            module.seen[what] = fresh.seen[what]
    else:
        fitting.predict(module, batches(batch_size=16), return_predictions=False)
        last = module.seen["predict"].copy()
        fitting.test(module, batches(batch_size=16), ckpt_path="best", verbose=False)
        module.seen["predict"].clear()
        fitting.predict(module, batches(batch_size=16), ckpt_path="best", return_predictions=False)
        assert last == module.seen["val"][-len(last) :]  # of the model as the fit leaves it
    assert module.seen["predict"] == module.seen["test"]
    assert saving.best_model_score is not None
    return {**module.seen, "scores": scores, "best": float(saving.best_model_score)}
