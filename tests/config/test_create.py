"""`create_optimizer` without a Trainer: it does all that a spec asks, or says what it cannot do."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_optim
from lightning_optim import ConfiguredOptimizer, OptimizerStrategy, OptionError, create_optimizer
from lightning_optim.callbacks import Communication, IterateAveraging, LookaheadSync
from lightning_optim.config.recipes import RECIPES
from lightning_optim.core.optimizer import OPTIMIZERS
from tests.harness.data import batches
from tests.harness.modules import Configured, Plain, vector
from tests.harness.nets import plain_net
from tests.harness.trainers import trainer

# A value of each key of a spec that differs from its default, and why create_optimizer refuses it, if it does.
KEYS: dict[str, tuple[Any, str]] = {
    "no_decay": (["norm"], ""),
    "full_precision": (["weight"], ""),
    "groups": ([{"params": "2.*", "lr": 0.5}], ""),
    "layer_decay": (0.5, ""),
    "freeze": (["0.weight"], ""),
    "no_weight_decay": (False, ""),
    "schedule": ("cosine", "schedule='cosine' needs a Trainer. Use ConfiguredOptimizer, or .*torch.optim.lr_scheduler"),
    "adamw": (["bias"], "it serves all parameters alike. Only muon has AdamW beside it"),
    "communication": ("bf16", "communication='bf16' needs a Trainer. .*lightning_optim.callbacks.Communication"),
}


def declaring_net() -> nn.Sequential:
    """It wants to keep a weight without decay."""
    net: Any = plain_net()
    net.no_weight_decay = lambda: {"2.weight"}
    return net  # type: ignore[no-any-return]


def groups(optimizer: torch.optim.Optimizer) -> Any:
    return [
        {key: len(value) if key == "params" else value for key, value in group.items()}
        for group in optimizer.param_groups
    ]


def test_no_key_of_a_spec_is_dropped() -> None:
    parameters = inspect.signature(OptimizerStrategy.__init__).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == set(KEYS), "a new key: say what becomes of it"
    rest = {"name": "adamw", "state_bits": 8}
    usual = groups(create_optimizer(rest, declaring_net()))
    for key, (value, refusal) in KEYS.items():
        if refusal:
            with pytest.raises(OptionError, match=refusal):
                create_optimizer({**rest, key: value}, declaring_net())
        else:
            assert groups(create_optimizer({**rest, key: value}, declaring_net())) != usual, key


@pytest.mark.parametrize("key", [key for key, (value, refusal) in KEYS.items() if value and not refusal])
def test_names_and_roles_need_a_module(key: str) -> None:
    with pytest.raises(OptionError, match=rf"create_optimizer got parameters, and {key}=.* Give it the module"):
        create_optimizer({"name": "adamw", key: KEYS[key][0]}, plain_net().parameters())
    nothing: Any = None if key == "layer_decay" else []
    assert (
        create_optimizer({"name": "adamw", key: nothing}, plain_net().parameters()).param_groups[0]["weight_decay"] > 0
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_says_which_callback_it_goes_without(name: str) -> None:
    (title,) = RECIPES[name].callbacks
    words = rf"{name!r}, without its callback {title}, which needs a Trainer. .*lightning_optim.callbacks.{title}"
    with pytest.warns(UserWarning, match=words):
        create_optimizer(name, plain_net())


def test_options_beside_the_name() -> None:
    net = plain_net()
    assert create_optimizer("adan", net, lr=1e-2).param_groups[0]["lr"] == 1e-2
    spec = {"name": "adan", "lr": 1.0, "eps": 1e-4}
    for given in (spec, OptimizerStrategy.parse(spec)):
        group = create_optimizer(given, net, lr=1e-2, state_bits=16).param_groups[0]
        assert (group["lr"], group["eps"], group["state_bits"]) == (1e-2, 1e-4, 16)
    assert [g["lr"] for g in create_optimizer("adan", net, groups=[{"params": "0.*", "lr": 0.5}]).param_groups] == [
        *(0.5, 0.5, 1e-3, 1e-3)
    ]
    for wrong in ({"lrr": 1.0}, {"lr": "1"}, {"name": "lion"}, {"self": 1}):
        with pytest.raises(OptionError):
            create_optimizer("adan", net, **wrong)


def test_a_tensor_lr_stays_and_a_config_holds_its_number() -> None:
    lr = torch.tensor(0.5)
    strategy = OptimizerStrategy.parse("adan", lr=lr)
    assert strategy.create(plain_net()).param_groups[0]["lr"] is lr
    assert strategy.as_config() == {"name": "adan", "lr": 0.5}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_config_is_a_copy(name: str) -> None:
    """What a user changes later in a spec, or in what `as_config` returned, changes no strategy."""
    words, group = ["bias"], {"params": ["0.*"], "lr": 0.5}
    strategy = OptimizerStrategy(name, no_decay=words, groups=[group], schedule={"name": "constant"})
    before = strategy.as_config()
    words.append("norm")
    group["lr"] = 1.0
    mine: Any = strategy.as_config()
    mine["groups"][0]["lr"] = 2.0
    assert strategy.as_config() == before
    assert OptimizerStrategy.parse(before) == strategy


# ---------------------------------------------------------------- in a Trainer


class Bare(Plain):
    """Uses a strategy without the mixin."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.strategy = OptimizerStrategy.parse(spec)

    def configure_optimizers(self) -> Any:
        return self.strategy.configure(self)


class Hiding(Configured):
    def configure_callbacks(self) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("spec", "callback"),
    [
        ("ranger", LookaheadSync),
        ("gadam", IterateAveraging),
        ({"name": "adan", "communication": "bf16"}, Communication),
    ],
)
@pytest.mark.parametrize("module", [Bare, Hiding])
def test_a_missing_companion_is_missed(spec: Any, callback: Any, module: type[Any]) -> None:
    words = f"comes with the callback {callback.__name__}, which the Trainer does not have"
    with pytest.warns(UserWarning, match=words):
        trainer(max_epochs=1).fit(module(spec), batches())
    mine = callback("bf16") if callback is Communication else callback()
    trainer(mine, max_epochs=1).fit(module(spec), batches())


def test_the_order_of_base_classes() -> None:
    words = r"class Wrong: LightningModule comes before ConfiguredOptimizer.*class Wrong\(ConfiguredOptimizer, Light"
    with pytest.raises(OptionError, match=words):

        class Wrong(LightningModule, ConfiguredOptimizer):  # type: ignore[misc]
            pass

    with pytest.raises(OptionError, match="class Wrong: LightningModule comes before"):
        type("Wrong", (Plain, ConfiguredOptimizer), {})
    pytorch_lightning = pytest.importorskip("pytorch_lightning")
    with pytest.raises(OptionError, match="class Wrong: LightningModule comes before"):
        type("Wrong", (pytorch_lightning.LightningModule, ConfiguredOptimizer), {})
    type("Right", (ConfiguredOptimizer, pytorch_lightning.LightningModule), {})


# ---------------------------------------------------------------- groups and their names


def test_a_group_may_have_many_patterns() -> None:
    spec = {"name": "adamw", "groups": [{"params": ["0.*", "2.weight"], "lr": 0.5}]}
    net = plain_net()
    rates = {p: group["lr"] for group in create_optimizer(spec, net).param_groups for p in group["params"]}
    assert [rates[p] for p in net.parameters()] == [0.5, 0.5, 0.5, 1e-3]
    with pytest.raises(OptionError, match=r"groups: no parameter matches '9\.\*'"):
        create_optimizer({"name": "adamw", "groups": [{"params": ["0.*", "9.*"], "lr": 0.5}]}, net)
    with pytest.raises(OptionError, match=r"all parameters that 0\.weight matches are in groups before it"):
        create_optimizer("adamw", net, groups=[{"params": "0.*", "lr": 1.0}, {"params": "0.weight", "lr": 2.0}])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["embedding", "main", "no_decay"]),
        ({"state_bits": 8}, ["full_precision", "main", "no_decay+full_precision"]),
        ({"no_decay": [], "full_precision": []}, ["main"]),
        (
            {"groups": [{"params": "2.*", "lr": 0.5}]},
            ["embedding", "main", "no_decay", "2.*", "no_decay+2.*"],
        ),
        (
            {"groups": [{"params": ["1.weight", "2.*"], "lr": 0.5, "name": "head"}]},
            ["main", "head", "no_decay", "no_decay+head"],
        ),
    ],
)
@pytest.mark.parametrize("name", ["adamw", "adan"])
def test_names_of_groups_are_short_and_differ(name: str, options: Any, expected: list[str]) -> None:
    net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    found = [group["name"] for group in create_optimizer({"name": name, **options}, net).param_groups]
    assert sorted(found) == sorted(expected)


# ---------------------------------------------------------------- packages that keep the class


class Keeps(Plain):
    """As models of neuralforecast and darts do: the class is a hyper-parameter."""

    def __init__(self, optimizer_cls: Any = lightning_optim.Adan, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = self.hparams["optimizer_cls"](self.parameters(), lr=self.hparams["lr"])
        return made


def test_a_class_as_hyper_parameter_loads_after_one_line(tmp_path: Path) -> None:
    trainer(ModelCheckpoint(tmp_path, "end"), max_epochs=1).fit(Keeps(), batches())
    with pytest.raises(pickle.UnpicklingError, match=r"Unsupported global: GLOBAL lightning_optim\.optimizers\.adan"):
        Keeps.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    with torch.serialization.safe_globals([lightning_optim.Adan]):  # add_safe_globals, and taken back
        again = Keeps.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert again.hparams["optimizer_cls"] is lightning_optim.Adan


# ---------------------------------------------------------------- frozen parameters


class Thawing(Configured):
    """Its first layer is frozen, and trains from the second step on."""

    def __init__(self, joins: bool) -> None:
        super().__init__("adamw")
        self.first: nn.Module = next(self.net.children())
        self.first.requires_grad_(False)
        self.joins = joins

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.first.requires_grad_(True)
            if self.joins:
                self.trainer.optimizers[0].add_param_group({"params": list(self.first.parameters())})


def test_frozen_parameters_are_named_once_and_join(caplog: pytest.LogCaptureFixture) -> None:
    module = Thawing(joins=False)
    before = vector(module.first)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        trainer(max_epochs=1).fit(module, batches())
    told = [record.message for record in caplog.records if "frozen" in record.message]
    assert told == [
        "AdamW keeps no state for frozen parameters: net.0.weight, net.0.bias. They join it when they get "
        "requires_grad_(True)."
    ]
    assert not torch.equal(before, vector(module.first))


def test_frozen_parameters_that_join_move() -> None:
    module = Thawing(joins=True)
    before = vector(module.first)
    trainer(max_epochs=1).fit(module, batches())
    assert not torch.equal(vector(module.first), before)
