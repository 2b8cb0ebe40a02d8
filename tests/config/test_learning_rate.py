"""`lr` of a module with a spec: to read, to set, and for Lightning's finder; a user's own `lr` stays the user's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner.tuning import Tuner
from torch import nn

from lightning_optim import ConfiguredOptimizer, OptimizerSpec, OptionError
from lightning_optim.callbacks import WarmupFreeSchedule
from tests.harness.data import batches
from tests.harness.modules import Configured, Plain
from tests.harness.trainers import trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_find", "ignore:.*does not have many workers")
SEARCH: dict[str, Any] = {"min_lr": 1e-5, "max_lr": 0.5, "early_stop_threshold": None}
GROUPED = {"name": "adamw", "groups": [{"params": "net.2.*", "lr": 0.5}], "schedule": "cosine"}


class Rates(Callback):
    """Notes the rates of each step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append([float(group["lr"]) for group in trainer.optimizers[0].param_groups])


def made(spec: Any, kind: Any = Configured) -> Any:
    torch.manual_seed(0)
    return kind(spec)


def find(module: Any) -> float:
    """What Lightning's finder suggests and sets, before a fit."""
    found = Tuner(trainer(max_epochs=1)).lr_find(module, batches(batch_size=1), num_training=30, **SEARCH)
    assert found is not None
    rate = found.suggestion()
    assert rate is not None
    return rate


def test_a_module_without_an_lr_has_that_of_its_optimizer() -> None:
    assert Configured("adan").lr == 1e-3
    assert Configured("torch.optim.Adadelta").lr == 1.0
    module = Configured({"name": "lion", "lr": 0.5, "no_decay": []})
    assert module.lr == 0.5
    module.lr = 0.25
    assert module.lr == 0.25
    assert module.hparams["optimizer"] == {"name": "lion", "lr": 0.25, "no_decay": []}
    assert module.hparams_initial["optimizer"] == module.hparams["optimizer"]
    assert copy.deepcopy(module).lr == pickle.loads(pickle.dumps(module)).lr == 0.25
    with pytest.raises(OptionError, match=r"lr=-1.0 is out of range"):
        module.lr = -1.0
    assert module.lr == 0.25
    assert not hasattr(Configured("no such word"), "lr")


def test_the_finder_sets_it_and_files_hold_it(tmp_path: Path) -> None:
    module = made("adamw")
    rate = find(module)
    assert module.lr == rate != 1e-3
    saving, rates = ModelCheckpoint(tmp_path, "end"), Rates()
    trainer(saving, rates, max_epochs=1).fit(module, batches())
    assert rates.seen == [[rate, rate]] * 4
    assert Configured.load_from_checkpoint(tmp_path / "end.ckpt").lr == rate


@pytest.mark.parametrize("spec", [GROUPED, {**GROUPED, "name": "torch.optim.AdamW"}], ids=lambda spec: spec["name"])
@pytest.mark.parametrize("warm", [0, 1, 2])
def test_the_callback_trains_as_a_fit_after_the_tuner(spec: Any, warm: int, tmp_path: Path) -> None:
    """Groups keep their own rates and the schedule its place, beside factors of another callback before or after."""
    first, second = made(spec), made(spec)
    rate = find(first)
    factors = [[], [WarmupFreeSchedule("linear", beta2=0.6)], [WarmupFreeSchedule("linear", beta2=0.6)]]
    after_tuner, in_fit = Rates(), Rates()
    trainer(*factors[warm], after_tuner, max_epochs=1).fit(first, batches(batch_size=1))
    finder = LearningRateFinder(num_training_steps=30, **SEARCH)
    every = [finder, *factors[warm]] if warm == 1 else [*factors[warm], finder]
    trainer(*every, in_fit, max_epochs=1, default_root_dir=tmp_path).fit(second, batches(batch_size=1))
    assert second.lr == rate
    assert len(in_fit.seen) == 32
    torch.testing.assert_close(torch.tensor(in_fit.seen), torch.tensor(after_tuner.seen))
    assert max(max(row) for row in in_fit.seen) > 10 * rate


def test_what_becomes_of_groups_with_a_rate_of_their_own_is_said(caplog: pytest.LogCaptureFixture) -> None:
    Configured(GROUPED).lr = 0.01
    assert "lr of 'adamw' is 0.01 now; of its groups 'net.2.*' keeps lr=0.5." in caplog.text


class Before(ConfiguredOptimizer, Plain):
    def __init__(self, optimizer: OptimizerSpec) -> None:
        super().__init__()
        self.lr = 0.125
        self.save_hyperparameters()


class After(ConfiguredOptimizer, Plain):
    def __init__(self, optimizer: OptimizerSpec) -> None:
        super().__init__()
        self.save_hyperparameters()
        assert not hasattr(self, "lr")
        self.lr = 0.125


class Class(Configured):
    lr = 0.125


class Base(Plain):
    lr = 0.125


class Behind(ConfiguredOptimizer, Base):
    def __init__(self, optimizer: OptimizerSpec) -> None:
        super().__init__()
        self.save_hyperparameters()


class Named(Configured):
    def __init__(self, optimizer: OptimizerSpec) -> None:
        super().__init__(optimizer)
        self.learning_rate = 0.125


class Argument(ConfiguredOptimizer, Plain):
    def __init__(self, optimizer: OptimizerSpec, lr: float = 0.125) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize("kind", [Before, After, Class, Behind, Named, Argument])
def test_a_rate_of_the_module_is_its_own(kind: Any) -> None:
    module = made({"name": "adamw", "lr": 0.5}, kind)

    def own() -> float:
        if kind is Argument:
            return float(module.hparams["lr"])
        return float(module.learning_rate if kind is Named else module.lr)

    assert own() == 0.125
    rate = find(module)
    assert own() == rate
    assert module.hparams["optimizer"] == {"name": "adamw", "lr": 0.5}


def test_a_parameter_may_have_the_name() -> None:
    class Learned(Configured):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.lr = nn.Parameter(torch.ones(1, dtype=torch.float32))

    module = Learned()
    assert isinstance(module.lr, nn.Parameter)
    assert "lr" in dict(module.named_parameters())
