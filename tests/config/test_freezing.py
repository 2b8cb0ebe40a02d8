"""`freeze` of a spec: before the strategy wraps the model, said once, refused where it means nothing, undone later."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn

from lightning_optim import ConfiguredOptimizer, OptimizerSpec, OptionError, create_optimizer
from lightning_optim.config.attach import attach
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.distributed.names import plain_name
from lightning_optim.reports.memory import state_memory
from tests.harness.data import batches
from tests.harness.modules import Configured, Plain
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import trainer

BODY = {"net.0.weight", "net.0.bias"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def frozen(module: nn.Module) -> set[str]:
    return {plain_name(name, module) for name, p in module.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["0.*"], {"0.weight", "0.bias"}),
        (["norm", "0.bias"], {"1.weight", "1.bias", "0.bias"}),
        (["weight"], {"0.weight", "2.weight"}),
        (["head"], {"2.weight"}),
        ([], set()),
    ],
)
def test_roles_and_patterns(words: list[str], names: set[str]) -> None:
    net = network()
    optimizer = create_optimizer("adamw", net, freeze=words)
    assert frozen(net) == names
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in net.parameters() if p.requires_grad}
    torch.autograd.backward(net(torch.ones(3, 4)).square().sum())
    optimizer.step()
    assert sum(entry.bytes for entry in state_memory(optimizer) if entry.kind == "state") == sum(
        8 * p.numel() + 4 for p in held
    )


def test_a_tied_weight_is_frozen_by_any_of_its_names() -> None:
    net = nn.ModuleDict({"body": nn.Embedding(5, 4), "head": nn.Linear(4, 5)})
    net["head"].weight = net["body"].weight
    create_optimizer("adamw", net, freeze=["head.weight"])
    assert frozen(net) == {"body.weight"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["body.*"],
            r"freeze: no parameter matches 'body.\*'. Roles are weight, bias, norm, embedding, head; names are",
        ),
        (["nrom"], r"freeze: no parameter matches 'nrom'.*Did you mean norm"),
        (["embedding"], "freeze: no parameter matches 'embedding'"),
        (["*"], r"freeze=\['\*'\] leaves no parameter of (Sequential|Configured) to train"),
        (["weight", "bias", "norm"], "leaves no parameter of"),
        ("0.*", r"freeze='0.\*' must be a list of roles"),
    ],
)
def test_what_is_refused(words: Any, message: str) -> None:
    net = network()
    with pytest.raises(OptionError, match=message):
        create_optimizer("adamw", net, freeze=words)
    assert not frozen(net)
    module = Configured({"name": "adamw", "freeze": words}, network)
    with pytest.raises(OptionError, match=message):
        trainer(max_epochs=1).fit(module, batches())
    assert not module.losses
    assert not frozen(module)


@pytest.mark.parametrize("option", [{"freeze": ["net.0"]}, {"groups": [{"params": "net.0"}]}], ids=str)
def test_the_name_of_a_module_is_told_the_pattern(option: Any) -> None:
    with pytest.raises(OptionError, match=r"no parameter matches 'net.0'.* Write 'net.0.\*' for all parameters in it"):
        create_optimizer("adamw", Configured("adamw", network), **option)


def test_parameters_without_names_are_refused() -> None:
    with pytest.raises(OptionError, match=r"got parameters, and freeze=\['bias'\] is by their names and roles"):
        create_optimizer("adamw", network().parameters(), freeze=["bias"])


class Late(ConfiguredOptimizer, LightningModule):
    """Creates its network in `configure_model`, and has hooks of its own that call no others."""

    def __init__(self, optimizer: OptimizerSpec) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None: ...

    def configure_model(self) -> None:
        self.net = network()

    def training_step(self, batch: Any, index: int) -> Any:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


def run(kind: Kind, late: bool, spec: dict[str, Any], words: str = "net.0.*") -> tuple[set[str], dict[str, Any], bool]:
    """What is frozen after a fit, the rates by name, and whether the body has stayed."""
    full = {"name": "adamw", "freeze": [words], **spec}
    module: Any = Late(full) if late else Configured(full, network)
    start = network().state_dict()["0.bias"]
    fitting = trainer(strategy=strategy_of(kind), max_epochs=2)
    fitting.fit(module, batches())
    names = {p: plain_name(name, module) for name, p in module.named_parameters()}
    held = {names[p]: group["lr"] for group in fitting.optimizers[0].param_groups for p in group["params"]}
    bias = module.net[0].bias.detach()
    bias = bias.full_tensor() if hasattr(bias, "full_tensor") else bias
    return frozen(module), held, bias.numel() != 6 or torch.equal(bias, start)


def test_it_is_early_enough_for_ddp() -> None:
    """DDP waits for the gradients of all parameters that need one when it wraps the model."""
    for both in run_ranks(runs, [("ddp", False, {}), ("ddp", True, {})]):
        for names, held, stayed in both:
            assert names == BODY
            assert held.keys() == {"net.1.weight", "net.1.bias", "net.2.weight", "net.2.bias"}
            assert stayed


def runs(cases: list[tuple[Kind, bool, dict[str, Any]]]) -> list[tuple[set[str], dict[str, Any], bool]]:
    return [run(*case) for case in cases]


def test_sharded_as_in_one_process() -> None:
    """With rates by depth, whose layers have other names when they are wrapped."""
    spec = {"layer_decay": 0.5, "lr": 0.5, "groups": [{"params": "net.2.bias", "lr_multiplier": 2}]}
    alone = run("single", False, spec)
    assert alone[0] == BODY
    assert alone[1] == {"net.1.weight": 0.25, "net.1.bias": 0.25, "net.2.weight": 0.5, "net.2.bias": 1.0}
    cases: list[Any] = [("fsdp1 full", False, spec), ("fsdp2 full", False, spec), ("ddp", False, spec)]
    for found in run_ranks(runs, cases):
        assert found == [alone] * 3


def test_a_strategy_that_has_wrapped_the_model_is_told_off() -> None:
    (message, _) = run_ranks(too_late)
    assert "comes too late for net.0.weight: the strategy has wrapped the model. Let the module derive from" in message


def too_late() -> str:
    class Own(Plain):
        def configure_optimizers(self) -> Any:
            return OptimizerStrategy.parse({"name": "adamw", "freeze": ["net.0.*"]}).configure(self)

    try:
        trainer(strategy=strategy_of("ddp"), max_epochs=1).fit(Own(network), batches())
    except OptionError as error:
        return str(error)
    return ""


def unfrozen_under(kind: Kind) -> str:
    module = Tuned({"name": "adamw", "freeze": ["net.0.*"]}, network)
    try:
        trainer(Unfreezes(), strategy=strategy_of(kind), max_epochs=2).fit(module, batches())
    except RuntimeError as error:
        return str(error)
    return ""


def test_what_joins_under_ddp_is_refused_for_it_would_not_be_averaged() -> None:
    for said in run_ranks(unfrozen_under, "ddp"):
        assert "AdamW: 2 parameters were frozen when DistributedDataParallel wrapped the model" in said
    assert run_ranks(unfrozen_under, "fsdp2 full") == ["", ""]


def test_another_optimizer_for_a_module_that_configures_its_own() -> None:
    class Own(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Own(network)
    attach(module, OptimizerStrategy.parse({"name": "adamw", "freeze": ["net.0.*"]}))
    trainer(max_epochs=1).fit(module, batches())
    assert frozen(module) == BODY


class Tuned(Configured):
    @property
    def backbone(self) -> nn.Module:
        return self.net[0]  # type: ignore[index,no-any-return]


class Unfreezes(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch >= 1:
            pl_module.net[0].requires_grad_(True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to")
@pytest.mark.parametrize("tuned", [False, True])
def test_unfrozen_later_and_resumed(tuned: bool, tmp_path: Path) -> None:
    spec = {"name": "adamw", "lr": 0.01, "freeze": ["net.0.*"], "schedule": "cosine"}

    def fit(*callbacks: Callback, **options: Any) -> Tuned:
        module = Tuned(spec, network)
        start = module.net[0].weight.detach().clone()  # type: ignore[index]
        tuning = BackboneFinetuning(1, backbone_initial_lr=1e-3, verbose=False) if tuned else Unfreezes()
        fitting = trainer(tuning, *callbacks, max_epochs=4)
        fitting.fit(module, batches(), **options)
        assert not torch.equal(module.net[0].weight, start)  # type: ignore[index]
        assert not frozen(module)
        assert sum(len(group["params"]) for group in fitting.optimizers[0].param_groups) == 6
        return module

    if tuned:
        spec.pop("schedule")  # torch's schedulers, and ours, take no group that comes later
    whole = fit(ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1))
    for file in ["epoch=0.ckpt", *(["epoch=2.ckpt"] if not tuned else [])]:  # Lightning leaves the backbone frozen then
        rest = fit(ckpt_path=tmp_path / file)
        assert all(map(torch.equal, rest.parameters(), whole.parameters())), file


def test_it_is_said_once_with_what_becomes_of_statistics(caplog: pytest.LogCaptureFixture) -> None:
    def normed() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    module = Configured({"name": "adamw", "freeze": ["net.0.*", "norm"]}, normed)
    with caplog.at_level(logging.INFO):
        trainer(max_epochs=1).fit(module, batches())
    said = [record.message for record in caplog.records if record.message.startswith("freeze")]
    assert said == [
        "freeze: net.0.weight, net.0.bias, net.1.weight and 1 more do not train.",
        "freeze: the running statistics of net.1 still follow the data, as in torch. Where they shall stay, call "
        "eval() on these modules in on_train_epoch_start.",
    ]
    assert module.net[1].num_batches_tracked == 4  # type: ignore[index]
