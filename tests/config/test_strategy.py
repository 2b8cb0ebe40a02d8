"""From a word or a mapping to an optimizer: groups, schedules, companions, and clear words for what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_optim
from lightning_optim import (
    Adan,
    ConfiguredOptimizer,
    KoalaV,
    OptimizerStrategy,
    OptionError,
    create_optimizer,
    list_optimizers,
)
from lightning_optim.callbacks import IterateAveraging, LookaheadSync, LossInput
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.errors import shown
from tests.config.bad import BAD, FOREIGN
from tests.harness.data import batches
from tests.harness.modules import Configured
from tests.harness.nets import frozen_net, plain_net
from tests.harness.trainers import trainer


def fit(module: LightningModule, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Any:
    found = trainer(*callbacks, **{"max_epochs": 1, **options})
    found.fit(module, batches(), ckpt_path=ckpt_path)
    return found


def names(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, set[str]]:
    """The names of the parameters in each group, by the name of the group."""
    known = {p: name for name, p in module.named_parameters()}
    return {group["name"]: {known[p] for p in group["params"]} for group in optimizer.param_groups}


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(("spec", "words"), BAD + FOREIGN, ids=lambda value: shown(value)[:40])
def test_wrong_specs(spec: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        OptimizerStrategy.parse(spec)
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match=words):
        create_optimizer(spec, plain_net())
    module = Configured(spec)
    with pytest.raises(OptionError, match=words):
        fit(module)
    assert not module.losses


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("net", "spec", "words"),
    [
        (frozen_net, "adan", r"Configured has no parameter to train: .*all are frozen \(requires_grad=False\)"),
        (nn.Identity, "adan", r"Configured has no parameter to train: it has none at all"),
        (sparse, "adamw", r"net.0 is an embedding with sparse=True.*make it sparse=False, or .*SparseAdam"),
        (
            plain_net,
            {"name": "adan", "groups": [{"params": "head.*", "lr": 0.1}]},
            r"groups: no parameter matches 'head.\*'; names are like net.0.weight, net.0.bias",
        ),
    ],
)
def test_what_does_not_fit_the_module(net: Callable[[], nn.Module], spec: Any, words: str) -> None:
    module = Configured(spec, net)
    with pytest.raises(OptionError, match=words):
        fit(module)
    assert not module.losses


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (list, "Adan got an empty parameter list. Does the model have parameters"),
        (lambda: [nn.Parameter(torch.ones(2))] * 2, r"Adan got the same parameter twice.*\(2,\).*tied weight"),
        (plain_net, r"Adan got a module; give it module.parameters\(\), or use create_optimizer"),
        (lambda: [{"params": [nn.Parameter(torch.ones(2))], "lrr": 1}], "Adan has no option 'lrr'. Did you mean lr"),
        (lambda: [{"params": [nn.Parameter(torch.ones(2))], "lr": -1}], "Adan: lr=-1.0 is out of range"),
    ],
)
def test_wrong_parameter_lists(params: Callable[[], Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Adan(params())


def test_the_same_parameter_in_two_groups() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(OptionError, match=r"Adan got the same parameter twice: number 0 .* is in group 0 already"):
        Adan([{"params": [p]}, {"params": [p]}])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_refuses_alike(name: str) -> None:
    """The base does the checks, so no page is without them."""
    cls = OPTIMIZERS[name]
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"lr": -1.0}, f"{cls.__name__}: lr=-1.0 is out of range"),
        ({"lr": "1"}, f"{cls.__name__}: lr='1' must be a number"),
        ({"learning_rate": 1.0}, f"{cls.__name__} has no option 'learning_rate'"),
        ({"state_bits": 7}, f"{cls.__name__}: state_bits=7 must be one of"),
    )
    for options, words in wrong:
        with pytest.raises(OptionError, match=words):
            cls([nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(OptionError, match=f"{cls.__name__} got an empty parameter list"):
        cls([])
    weight = nn.Embedding(4, 2, sparse=True).weight
    weight.grad = torch.ones(4, 2).to_sparse()
    optimizer = cls([weight])
    if cls.inputs:
        optimizer.set_loss(1.0)
    with pytest.raises(RuntimeError, match=rf"{cls.__name__} got a sparse gradient of shape \(4, 2\).*SparseAdam"):
        optimizer.step()


def test_a_module_without_the_argument_is_told_what_to_add() -> None:
    class Forgetful(ConfiguredOptimizer, LightningModule):
        def training_step(self, batch: Any, index: int) -> None: ...

    words = r"Forgetful has no hparams.optimizer.*`optimizer: OptimizerSpec`.*self.save_hyperparameters\(\)"
    with pytest.raises(OptionError, match=words):
        fit(Forgetful())


def test_koala_without_a_loss_in_manual_optimization() -> None:
    class Manual(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = plain_net()

        def training_step(self, batch: list[Tensor], index: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.mse_loss(self.net(batch[0]), batch[1]))  # not manual_backward
            optimizer.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return KoalaV(self.parameters())

    with pytest.raises(RuntimeError, match=r"KoalaV reads the loss, and nobody supplied it.*set_loss"):
        fit(Manual())


def test_a_schedule_needs_an_end() -> None:
    module = Configured({"name": "adan", "schedule": "cosine"})
    words = "schedule 'cosine' needs to know how long training is.*max_epochs nor max_steps.*Set max_steps"
    with pytest.raises(OptionError, match=words):
        fit(module, max_epochs=-1)
    assert not module.losses
    assert fit(Configured({"name": "adan", "schedule": "cosine"}), max_epochs=-1, max_steps=3).global_step == 3
    constant = {"name": "adan", "schedule": {"name": "constant", "warmup_steps": 2}}
    assert fit(Configured(constant), max_epochs=-1, max_time={"seconds": 1}).global_step > 4


# ---------------------------------------------------------------- groups


class Zoo(nn.Module):
    """One of each kind of layer that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.batch, self.group = nn.BatchNorm1d(4), nn.GroupNorm(2, 4)
        self.layer, self.rms = nn.LayerNorm(4), nn.RMSNorm(4)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.recurrent = nn.LSTM(4, 4)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(4, 8)


BIASES = {
    *("linear.bias", "conv.bias", "head.bias", "attention.in_proj_bias", "attention.out_proj.bias"),
    *("attention.bias_k", "attention.bias_v", "recurrent.bias_ih_l0", "recurrent.bias_hh_l0"),
}
NORMS = {f"{layer}.{name}" for layer in ("batch", "group", "layer", "instance") for name in ("weight", "bias")} | {
    "rms.weight"
}
WEIGHTS = {
    *("linear.weight", "conv.weight", "head.weight", "scale", "embed.weight"),
    *("attention.in_proj_weight", "attention.out_proj.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"),
}


def decays(module: nn.Module, **options: Any) -> dict[str, float]:
    """The decay of every parameter by its name."""
    optimizer = create_optimizer({"name": "adan", "weight_decay": 0.1, **options}, module)
    known = {p: name for name, p in module.named_parameters()}
    return {known[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_biases_and_normalisation_do_not_decay() -> None:
    zoo = Zoo()
    assert set(dict(zoo.named_parameters())) == BIASES | NORMS | WEIGHTS
    found = decays(zoo)
    assert {name for name, decay in found.items() if decay == 0} == BIASES | NORMS
    assert {name for name, decay in found.items() if decay == 0.1} == WEIGHTS


@pytest.mark.parametrize(
    ("no_decay", "without"),
    [
        ([], set()),
        (["bias"], BIASES),
        (["norm"], NORMS),
        (["embedding"], {"embed.weight"}),
        (["head.*"], {"head.weight", "head.bias"}),
        (["bias", "*.weight"], BIASES | {n for n in WEIGHTS | NORMS if n.endswith(".weight")}),
        (["scale"], {"scale"}),
    ],
)
def test_roles_and_patterns_change_what_decays(no_decay: list[str], without: set[str]) -> None:
    assert {name for name, decay in decays(Zoo(), no_decay=no_decay).items() if decay == 0} == without


@pytest.mark.parametrize("key", ["no_decay", "full_precision"])
def test_a_word_that_means_no_parameter_is_refused(key: str) -> None:
    """A mistyped role would let norms decay, or put their state in 8 bits, without a word."""
    words = rf"{key}: no parameter matches 'nrom'\. Roles are bias, norm, embedding; names are like .*mean norm\?"
    with pytest.raises(OptionError, match=words):
        create_optimizer({"name": "adamw", "state_bits": 8, key: ["bias", "nrom"]}, Zoo())
    module = plain_net()
    module[0].requires_grad_(False)
    create_optimizer({"name": "adamw", key: ["embedding", "0.*"]}, module)  # frozen, and a role that nobody has


def test_an_embedding_that_is_tied_to_a_head_keeps_its_role() -> None:
    """Also where the head comes first."""
    head, embedding = nn.Linear(64, 100, bias=False), nn.Embedding(100, 64)
    head.weight = embedding.weight
    for module in (nn.Sequential(head, embedding), nn.Sequential(embedding, head)):
        optimizer = create_optimizer({"name": "adamw", "state_bits": 8}, module)
        assert [group["state_bits"] for group in optimizer.param_groups] == [32]


def test_groups_are_the_same_for_all_options() -> None:
    """So a checkpoint of one setting is read under another."""
    module = Zoo()
    for options in ({}, {"weight_decay": 0.1}, {"state_bits": 8}, {"weight_decay": 0.1, "state_bits": 16}):
        found = names(create_optimizer({"name": "adan", **options}, module), module)
        assert list(found.values()) == [WEIGHTS - {"embed.weight"}, {"embed.weight"}, BIASES | NORMS]


def test_lamb_leaves_the_layer_wise_rate_to_weights() -> None:
    module = plain_net()
    optimizer = create_optimizer("lamb", module)
    assert [group["adapt"] for group in optimizer.param_groups] == [True, False]
    assert names(optimizer, module)["no_decay"] == {"0.bias", "2.bias"}


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_always_adapt_is_for_biases_too(name: str) -> None:
    optimizer = create_optimizer({"name": name, "always_adapt": True}, plain_net())
    assert [group["adapt"] for group in optimizer.param_groups] == [True, True]


def test_overrides_by_pattern_first_match_counts_and_wins() -> None:
    module = Zoo()
    groups = [
        {"params": "head.bias", "weight_decay": 0.5},
        {"params": "head.*", "lr": 1.0},
        {"params": "embedding", "betas": [0.5, 0.5, 0.5]},
    ]
    optimizer = create_optimizer({"name": "adan", "lr": 0.1, "weight_decay": 0.2, "groups": groups}, module)
    rows = {
        name: (group["lr"], group["weight_decay"], group["betas"])
        for group in optimizer.param_groups
        for name in names(optimizer, module)[group["name"]]
    }
    usual = (0.98, 0.92, 0.99)
    assert rows["head.bias"] == (0.1, 0.5, usual)
    assert rows["head.weight"] == (1.0, 0.2, usual)
    assert rows["embed.weight"] == (0.1, 0.2, (0.5, 0.5, 0.5))
    assert rows["linear.weight"] == (0.1, 0.2, usual)
    assert rows["linear.bias"] == rows["rms.weight"] == (0.1, 0.0, usual)


def test_few_bits_spare_embeddings_biases_and_norms() -> None:
    module = Zoo()
    optimizer = create_optimizer({"name": "adan", "state_bits": 16}, module)
    bits = {
        name: group["state_bits"]
        for group in optimizer.param_groups
        for name in names(optimizer, module)[group["name"]]
    }
    assert {name for name, kept in bits.items() if kept == 32} == BIASES | NORMS | {"embed.weight"}
    assert {name for name, kept in bits.items() if kept == 16} == WEIGHTS - {"embed.weight"}


def test_frozen_parameters_are_left_out() -> None:
    module = plain_net()
    module[0].requires_grad_(False)
    optimizer = create_optimizer("adamw", module)
    assert names(optimizer, module) == {"main": {"2.weight"}, "no_decay": {"2.bias"}}


def test_a_tied_weight_counts_once() -> None:
    module = Zoo()
    module.head.weight = module.embed.weight
    optimizer = create_optimizer({"name": "adan", "weight_decay": 0.1}, module)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in params}) == len(params) == len(list(module.parameters()))


def test_parameters_as_they_are_given_make_one_group() -> None:
    module = Zoo()
    optimizer = create_optimizer({"name": "adan", "weight_decay": 0.1}, module.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


# ---------------------------------------------------------------- specs, schedules, companions


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_word_trains_a_module(name: str) -> None:
    module = Configured(name)
    start = [p.detach().clone() for p in module.parameters()]
    optimizer = fit(module).optimizers[0]
    assert type(optimizer) is OPTIMIZERS[name]
    assert getattr(lightning_optim, type(optimizer).__name__) is type(optimizer)
    assert all(p.isfinite().all() for p in module.parameters())
    assert not all(torch.equal(p, q) for p, q in zip(module.parameters(), start, strict=True))


def test_a_spec_is_a_word_a_mapping_or_a_strategy() -> None:
    spec = {"name": "adan", "lr": 1, "betas": [0.9, 0.9, 0.9]}
    strategy = OptimizerStrategy.parse(spec)
    assert OptimizerStrategy.parse(strategy) is strategy
    assert strategy == OptimizerStrategy("adan", lr=1, betas=[0.9, 0.9, 0.9])
    assert strategy.as_config() == spec
    assert OptimizerStrategy("adan").as_config() == "adan"
    assert OptimizerStrategy.parse(strategy.as_config()) == strategy
    group = strategy.create(plain_net()).param_groups[0]
    assert (group["lr"], group["betas"]) == (1.0, (0.9, 0.9, 0.9))
    assert isinstance(group["lr"], float)


def test_names_can_be_searched() -> None:
    assert list_optimizers("koala*") == ["koala_m", "koala_v"]
    assert set(list_optimizers()) == {*OPTIMIZERS, "gadam", "gadamx", "ranger"}


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [(1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]),
        (
            {"name": "linear", "warmup_steps": 4, "final": 0.2},
            [1 / 4, 2 / 4, 3 / 4, 1, 1, 0.8, 0.6, 0.4],
        ),
    ],
)
def test_schedules_run_over_all_steps(schedule: Any, factors: list[float]) -> None:
    rates: list[float] = []

    class Watching(Configured):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    fit(Watching({"name": "adan", "lr": 0.5, "schedule": schedule}), max_epochs=2)
    assert rates == pytest.approx([0.5 * factor for factor in factors])


@pytest.mark.parametrize(
    ("spec", "companion"),
    [
        ("gadam", IterateAveraging),
        ("gadamx", IterateAveraging),
        ("ranger", LookaheadSync),
        ("koala_v", LossInput),
        ({"name": "koala_m", "lr": 0.1}, LossInput),
    ],
)
def test_companions_come_along_unless_they_are_there(spec: Any, companion: type) -> None:
    found = [callback for callback in fit(Configured(spec)).callbacks if isinstance(callback, companion)]
    assert len(found) == 1
    mine = companion()
    found = [callback for callback in fit(Configured(spec), mine).callbacks if isinstance(callback, companion)]
    assert found == [mine]
    assert not any(isinstance(callback, companion) for callback in fit(Configured("adan")).callbacks)


class Word(str, Enum):
    ADAN = "adan"


@pytest.mark.parametrize(
    "spec",
    [
        "adan",
        {"name": "adamw", "lr": 0.01, "no_decay": ["bias"]},
        OptimizerStrategy("adan", lr=0.02),
        "ranger",
        Word.ADAN,
        np.str_("adan"),
        {"name": Word.ADAN, "lr": np.float32(0.5), "no_decay": ("bias",), "schedule": np.str_("cosine")},
        {"name": "lion", "lr": torch.tensor(0.5), "groups": ({"params": ("*",), "lr": np.float64(0.25)},)},
    ],
)
def test_a_checkpoint_holds_plain_words_and_resumes(spec: Any, tmp_path: Path) -> None:
    assert yaml.safe_dump(dict(Configured(spec).hparams_initial))  # what loggers write to hparams.yaml
    fit(Configured(spec), ModelCheckpoint(tmp_path, "{step}"))
    path = tmp_path / "step=4.ckpt"
    hparams = torch.load(path, weights_only=True)["hyper_parameters"]
    assert OptimizerStrategy.parse(hparams["optimizer"]) == OptimizerStrategy.parse(spec)
    again = Configured.load_from_checkpoint(path, weights_only=True)
    assert again.optimizer_strategy() == OptimizerStrategy.parse(spec)
    rest = fit(again, ModelCheckpoint(tmp_path / "again"), ckpt_path=path, max_epochs=2)
    assert rest.global_step == 8
    assert {float(state["step"]) for state in rest.optimizers[0].state.values()} == {8.0}
