"""Training sharded over two CPU ranks equals replicated training and resumes exactly: FSDP1 and FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from tests.harness.data import seeded_samples
from tests.harness.modules import Made
from tests.harness.nets import seeded_net
from tests.harness.ranks import run_ranks
from tests.harness.strategies import KINDS, Kind, strategy_of
from tests.harness.trainers import trainer


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def fit(kind: Kind, folder: Path, resume: Path | None = None) -> list[float]:
    """Two epochs of four steps, with a checkpoint after the first; the losses of this rank."""
    model = Made(adamw, seeded_net)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    fitting = trainer(saving, strategy=strategy_of(kind), max_epochs=2, use_distributed_sampler=True)
    fitting.fit(model, DataLoader(seeded_samples(64), batch_size=8), ckpt_path=resume)
    return [round(loss, 5) for loss in model.losses]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("fsdp")])
def test_sharded_training_equals_replicated_and_resumes(kind: Kind, tmp_path: Path) -> None:
    losses = run_ranks(fit, kind, tmp_path / "first")
    assert losses == run_ranks(fit, "ddp", tmp_path / "ddp")
    resumed = run_ranks(fit, kind, tmp_path / "second", resume=tmp_path / "first" / "step=4.ckpt")
    assert resumed == [mine[4:] for mine in losses]
