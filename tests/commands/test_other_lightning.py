"""Modules of `pytorch_lightning`, whose classes are others than those of `lightning.pytorch`."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning
import torch

from lightning_optim import ConfiguredOptimizer, OptimizerSpec, OptionError
from lightning_optim.callbacks import IterateAveraging
from lightning_optim.cli import main
from lightning_optim.commands.project import Project
from tests.harness.data import samples
from tests.harness.trainers import QUIET

HERE = "tests.commands.test_other_lightning"


class Copied(ConfiguredOptimizer, pytorch_lightning.LightningModule):  # type: ignore[misc]
    """A module of the other package."""

    def __init__(self, optimizer: OptimizerSpec = "adan") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])


def test_its_own_trainer_takes_our_words_and_callbacks() -> None:
    module = Copied({"name": "lion", "schedule": "cosine"})
    averaging: Any = IterateAveraging("ema")
    trainer = pytorch_lightning.Trainer(**{**QUIET, "max_steps": 2, "callbacks": [averaging]})
    trainer.fit(module, torch.utils.data.DataLoader(samples(), batch_size=8))
    assert trainer.global_step == 2
    assert type(trainer.optimizers[0]).__name__ == "Lion"


def test_the_command_says_which_import_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--model", f"{HERE}.Copied"])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said == (
        f"lightning-optim: {HERE}.Copied is a LightningModule of pytorch_lightning, and this command runs those of "
        "lightning.pytorch, which are other classes. Write `from lightning.pytorch import LightningModule` there, or "
        "fit it by a Trainer of pytorch_lightning."
    )


def test_commands_that_read_a_config_say_it_too() -> None:
    with pytest.raises(OptionError, match=r"Write `from lightning\.pytorch import LightningModule` there"):
        Project(["--model", f"{HERE}.Copied"])
