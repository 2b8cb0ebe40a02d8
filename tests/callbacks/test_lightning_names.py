"""`pytorch_lightning` is a copy of `lightning.pytorch`: its Trainer, modules, strategies and loggers count as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from pytorch_lightning.loggers import TensorBoardLogger as TheirTensorBoardLogger
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn

import lightning_optim
from lightning_optim import ConfiguredOptimizer, OptimizerSpec, OptionError
from lightning_optim.callbacks import CheckpointIntegrity, GradientNoise, OptimizerStateMemory
from lightning_optim.callbacks.gradient_noise import clips
from lightning_optim.training.lightning_names import base_of, is_a
from tests.harness.data import batches
from tests.harness.lives import every_callback, fit, net, torchs
from tests.harness.trainers import QUIET

PACKAGE = Path(lightning_optim.__file__).parent
CALLBACKS = Path(CheckpointIntegrity.__init__.__code__.co_filename).parent


class Theirs(pytorch_lightning.LightningModule):
    """The module of the laws, with the other base class."""

    def __init__(self, optimizer: Any = torchs) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.make, self.net = optimizer, net()

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class TheirsByWord(ConfiguredOptimizer, Theirs):  # type: ignore[misc]  # pyright: ignore
    def __init__(self, optimizer: OptimizerSpec = "gadam") -> None:
        super().__init__()
        self.save_hyperparameters()

    configure_optimizers = ConfiguredOptimizer.configure_optimizers


def their_fit(module: Any, *callbacks: Any, **options: Any) -> Any:
    quiet = {**QUIET, "enable_checkpointing": False, "num_sanity_val_steps": 1, "max_epochs": 2}
    fitting = pytorch_lightning.Trainer(callbacks=list(callbacks), **{**quiet, **options})
    fitting.fit(module, batches(), batches(batch_size=16))
    return fitting


@every_callback
def test_every_callback_does_the_same_in_the_other_trainer(make: Any, optimizer: Any) -> None:
    module = Theirs(optimizer)
    their_fit(module, make())
    ours = fit(optimizer, make())[1]
    assert all(map(torch.equal, module.state_dict().values(), ours.state_dict().values()))


def test_companions_come_along() -> None:
    fitting = their_fit(TheirsByWord())
    assert {"IterateAveraging", "CheckpointIntegrity"} <= {type(each).__name__ for each in fitting.callbacks}


def test_asynchronous_checkpoints_are_refused() -> None:
    with pytest.raises(OptionError, match="AsyncCheckpointIO"):
        their_fit(Theirs(), CheckpointIntegrity(), plugins=[AsyncCheckpointIO()])


def test_pictures_are_drawn_on_their_logger(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    logger = TheirTensorBoardLogger(tmp_path)
    drawn: list[str] = []
    logger.experiment.add_figure = lambda name, *_: drawn.append(name)
    their_fit(Theirs(), OptimizerStateMemory(table=False), logger=logger, log_every_n_steps=1)
    assert drawn


def test_a_module_that_clips_itself_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clips(Theirs):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(optimizer, 0.1, "norm")

    for module, own in ((Theirs(), False), (Clips(), True)):
        found: list[bool] = []

        class Look(GradientNoise):
            def on_train_start(self, trainer: Any, pl_module: Any, found: list[bool] = found) -> None:
                found.append(clips(trainer, pl_module))

        their_fit(module, Look(), max_epochs=1)
        assert found == [own]


def test_names() -> None:
    assert is_a(Theirs(), LightningModule)
    assert base_of(Theirs, LightningModule) is pytorch_lightning.LightningModule
    assert base_of(TheirTensorBoardLogger, TensorBoardLogger) is TheirTensorBoardLogger
    assert not is_a(nn.Linear(1, 1), LightningModule)


def sources() -> Iterator[Path]:
    yield from (path for folder in (PACKAGE, CALLBACKS) for path in folder.rglob("*.py"))


def test_no_instance_of_a_class_of_lightning_alone_is_asked_for() -> None:
    found = []
    for path in sources():
        tree = ast.parse(path.read_text())
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning"
            for alias in node.names
        }
        asked = (
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        )
        found += [
            f"{path.name}: {ast.unparse(node)}"
            for node in asked
            if imported & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
        ]
    assert not found, "use is_a of lightning_names: classes of pytorch_lightning are others"
