"""What a user's config says, read and not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optim import ConfiguredOptimizer, OptimizerStrategy, OptionError
from lightning_optim.commands.project import Project

ROOT = Path(__file__).parents[2]
DIGITS = ["--config", f"{ROOT / 'examples' / 'digits' / 'adan.yaml'}"]


class Plain(LightningModule):
    """A module with an optimizer of its own."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.net = torch.nn.Linear(width, 1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


PLAIN = ["--model", "tests.commands.test_project.Plain"]


def test_a_config_is_read_and_its_parts_are_built_on_demand() -> None:
    project = Project([*DIGITS, "--model.width", "8", "--model.optimizer.lr", "0.5"])
    assert project.spec is not None
    assert project.spec.as_config() == {"name": "adan", "lr": 0.5}
    assert project.seed == 0
    assert project.model_class == "examples.digits.digits.DigitsClassifier"
    assert all(p.is_meta for p in project.module(device="meta").parameters())
    one, two = project.module(), project.module(OptimizerStrategy("lion"))
    assert (one.hparams["optimizer"], two.hparams["optimizer"]) == ({"name": "adan", "lr": 0.5}, "lion")
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert type(project.data()).__name__ == "DigitsData"
    trainer: Any = project.trainer(logger=False, enable_progress_bar=False)
    assert trainer.max_epochs == 30
    assert sum(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks) == 2


def test_a_module_trains_with_another_optimizer_than_it_configures() -> None:
    project = Project([*PLAIN, "--model.width", "3"])
    assert project.spec is None
    assert project.data() is None
    assert isinstance(project.module().configure_optimizers(), torch.optim.SGD)
    module: Any = project.module(OptimizerStrategy("gadam"))
    assert [type(callback).__name__ for callback in module.configure_callbacks()] == ["IterateAveraging"]
    by_class = Project([*PLAIN, "--optimizer", "lightning_optim.Adan", "--optimizer.lr", "0.25"])
    with pytest.warns(UserWarning, match="configure_optimizers` will be overridden"):
        optimizer: Any = by_class.module().configure_optimizers()
    assert (type(optimizer).__name__, optimizer.param_groups[0]["lr"]) == ("Adan", 0.25)


class Unannotated(ConfiguredOptimizer, LightningModule):
    """As README's first lines: the parser takes the optimizer as it stands."""

    def __init__(self, optimizer="adan") -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Linear(2, 1)


def test_a_spec_without_an_annotation_is_read() -> None:
    model = ["--model", f"{__name__}.Unannotated"]
    plain, given = Project(model), Project([*model, "--model.optimizer", "{name: lion, lr: 0.5, schedule: cosine}"])
    assert plain.spec is not None
    assert plain.spec.as_config() == "adan"
    assert given.spec is not None
    assert given.spec.as_config() == {"name": "lion", "lr": 0.5, "schedule": "cosine"}
    built: Any = given.module(OptimizerStrategy("muon", lr=0.25))
    assert built.optimizer_strategy().as_config() == {"name": "muon", "lr": 0.25}
    with pytest.raises(OptionError, match="There is no optimizer named 'adamm'"):
        Project([*model, "--model.optimizer", "adamm"])


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "there is no model. Give --config FILE"),
        (["--config", "nowhere.yaml"], "File does not exist: "),
        (["--model", "no.such.Class"], "'no.such.Class'"),
        (["--model", "torch.nn.Linear"], "Import path does not correspond to a subclass of LightningModule"),
        ([*PLAIN, "--model.wodth", "3"], "Option 'wodth' is not accepted"),
        ([*PLAIN, "--trainer.max_epuchs", "3"], "max_epuchs"),
        ([*DIGITS, "--model.optimizer", "adamm"], "There is no optimizer named 'adamm'. Did you mean adam"),
    ],
)
def test_what_cannot_be_read_gets_a_sentence(args: list[str], sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        Project(args)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_callbacks_have_short_names() -> None:
    """In a process of its own, where nothing else has imported them."""
    code = (
        "from lightning_optim.commands.project import Project\n"
        "project = Project(['--model', 'lightning.pytorch.demos.boring_classes.BoringModel', "
        "'--trainer.callbacks=NonFiniteGuard'])\n"
        "print(project.options.trainer.callbacks.class_path)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "lightning_optim.callbacks.NonFiniteGuard\n", done.stderr
