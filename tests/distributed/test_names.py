"""One list of wrappers: a name pattern, a role, a report and the noise do not see what wraps a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from lightning_optim import create_optimizer
from lightning_optim.callbacks import GradientNoise, NonFiniteGuard, OptimizerStateMemory
from lightning_optim.distributed.names import named_parameters, owned_parameters
from tests.harness.data import batches
from tests.harness.modules import Configured, vector
from tests.harness.trainers import trainer


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Three layers, of which the middle one may be wrapped; one attribute has the name that DDP uses."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = lambda module: module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.module, self.head = nn.Linear(4, 4), wrap(Block()), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.module(self.first(x)))  # type: ignore[no-any-return]


def inner(module: nn.Module) -> nn.Module:
    module.linear = checkpoint_wrapper(module.linear)  # type: ignore[arg-type]
    return module


def parametrized(module: nn.Module) -> nn.Module:
    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(module.linear, name, nn.Identity())  # type: ignore[arg-type]
    return module


class ReadOnly(nn.Module):
    """What FSDP1, Fabric and torch.compile do to names, without their processes and its compiler."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)
        self.inside = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.inside)(x)  # type: ignore[no-any-return]


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda module: module,
    "activation checkpointing": checkpoint_wrapper,
    "activation checkpointing of a layer": inner,
    "torch.compile": lambda module: cast(nn.Module, torch.compile(module, backend="eager")),
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "parametrizations": parametrized,
    "fsdp1": lambda module: ReadOnly("_fsdp_wrapped_module", module),
    "fabric": lambda module: ReadOnly("_forward_module", module),
    "compiled": lambda module: ReadOnly("_orig_mod", module),
    "two": lambda module: checkpoint_wrapper(ReadOnly("_orig_mod", inner(module))),
}
NAMES = {
    *("first.weight", "first.bias", "module.linear.weight", "module.linear.bias"),
    *("module.norm.weight", "module.norm.bias", "head.weight", "head.bias"),
}
SPEC: dict[str, Any] = {
    "name": "adamw",
    "state_bits": 16,
    "no_decay": ["bias", "norm", "module.linear.weight"],
    "groups": [{"params": ["module.linear.*", "head.bias"], "lr": 0.5}],
}


def settings(net: nn.Module) -> dict[str, Any]:
    """The options of each parameter by its plain name, and of its group."""
    names = {p: name for name, p in named_parameters(net)}
    return {
        names[p]: {key: value for key, value in group.items() if key != "params"}
        for group in create_optimizer(SPEC, net).param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("wrap", WRAPS)
def test_groups_and_roles_see_no_wrapper(wrap: str) -> None:
    net = Net(WRAPS[wrap])
    assert {name for name, _ in named_parameters(net)} == {name for name, *_ in owned_parameters(net)} == NAMES
    assert settings(net) == settings(Net())
    assert settings(nn.DataParallel(net)) == settings(Net())


@pytest.mark.parametrize("wrap", sorted(WRAPS.keys() - {"data parallel", "averaged"}))  # `module.` may be the user's
def test_a_pattern_may_name_the_wrapper(wrap: str) -> None:
    """As a user copies it from `named_parameters`."""
    net = Net(WRAPS[wrap])
    name = next(name for name, _ in net.named_parameters() if "linear" in name and "weight" in name)
    (group, *_) = [
        group
        for group in create_optimizer("adan", net, groups=[{"params": name, "lr": 7.0}]).param_groups
        if group["lr"] == 7.0
    ]
    assert [found for found, p in named_parameters(net) if p is group["params"][0]] == ["module.linear.weight"]


def test_a_weight_in_two_parameters_is_meant_by_its_name() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    assert [name for name, _ in named_parameters(net)] == ["0.bias", "0.weight.original0", "0.weight.original1"]
    groups = create_optimizer("adan", net, groups=[{"params": "0.weight", "lr": 7.0}]).param_groups
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(1, 1e-3), (2, 7.0)]


class Wrapped(Configured):
    """Its network is wrapped, and the gradient of one weight becomes NaN on demand."""

    def __init__(self, wrap: str, broken: bool = False) -> None:
        super().__init__("adamw", lambda: Net(WRAPS[wrap]))
        self.broken = broken

    def on_after_backward(self) -> None:
        if self.broken:
            grads = {name: p.grad for name, p in named_parameters(self)}
            grads["net.module.linear.weight"].fill_(torch.nan)  # type: ignore[union-attr]


def walked(wrap: str) -> torch.Tensor:
    module: LightningModule = Wrapped(wrap)
    trainer(GradientNoise(eta=0.3, seed=1), max_epochs=1).fit(module, batches())
    return vector(module)


@pytest.mark.parametrize("wrap", ["activation checkpointing of a layer", "compiled", "two", "fabric"])
def test_noise_is_the_same_under_every_wrapper(wrap: str) -> None:
    torch.testing.assert_close(walked(wrap), walked("nothing"), rtol=0, atol=0)


@pytest.mark.parametrize("wrap", ["compiled", "parametrizations", "two"])
def test_messages_and_reports_name_parameters_plainly(wrap: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FloatingPointError, match=r"the gradient of net\.module\.linear\.weight is not finite"):
        trainer(NonFiniteGuard("raise"), max_epochs=1).fit(Wrapped(wrap, broken=True), batches())
    trainer(OptimizerStateMemory(), max_epochs=1).fit(Wrapped(wrap), batches())
    printed = capsys.readouterr().out
    assert not any(word in printed for word in ("_orig_mod", "_checkpoint_wrapped", "parametrizations"))
