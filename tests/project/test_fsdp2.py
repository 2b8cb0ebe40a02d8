"""The module on the page about FSDP2 trains there as in one process, and its config is read."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, rank, strategy_of, world_size
from tests.harness.trainers import QUIET, trainer
from tests.harness.worlds import whole

PAGE = (Path(__file__).parents[2] / "docs" / "fsdp2.md").read_text()
# eps keeps AdamW from scaling rounding errors up: the gradient of a key's bias is zero but for these.
OPTIMIZER = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}


def module_in(folder: str, **options: Any) -> Any:
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("sharded").Bytes(**options)
    finally:
        sys.path.remove(folder)


def weights(folder: str, kind: Kind) -> dict[str, Tensor]:
    """What four steps end in: on each rank its share of the same batches."""
    seed_everything(0, verbose=False)
    model = module_in(folder, optimizer=OPTIMIZER)
    tokens = torch.randint(0, 256, (16, 9), generator=torch.Generator().manual_seed(1))
    mine = torch.cat([batch.chunk(world_size())[rank()] for batch in tokens.chunk(4)])
    data = DataLoader(TensorDataset(mine), batch_size=4 // world_size())
    trainer(max_epochs=1, strategy=strategy_of(kind)).fit(model, data)
    return whole(model)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (code,) = re.findall(r"```python\n(# sharded.py\n.*?)```", PAGE, re.DOTALL)
    (tmp_path / "sharded.py").write_text(code)
    monkeypatch.delitem(sys.modules, "sharded", raising=False)
    return str(tmp_path)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_two_ranks_end_where_one_process_does(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = weights(folder, "single")
    monkeypatch.delitem(sys.modules, "sharded")
    for found in run_ranks(weights, folder, "fsdp2 full"):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_config_is_read(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "config.yaml").write_text(config)
    args = ["--config", str(tmp_path / "config.yaml"), "--trainer.accelerator=cpu", "--trainer.devices=1"]
    made = LightningCLI(
        subclass_mode_model=True, run=False, args=args, trainer_defaults=QUIET, seed_everything_default=0
    )
    assert type(made.trainer.strategy).__name__ == "ModelParallelStrategy"
    assert made.model.half
    monkeypatch.delitem(sys.modules, "sharded")
