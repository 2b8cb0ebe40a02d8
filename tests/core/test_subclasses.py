"""Classes that users derive from ours: with a constructor or a step of their own, with options alone, with both."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

import lightning_optim
from lightning_optim import AdamW, OptimizerStrategy, OptionError, create_optimizer, list_optimizers
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from tests.harness.problems import NAMES, apply


class Tenth(AdamW):
    """With a constructor and a step of its own, and options by position and by keyword."""

    def __init__(self, params: Any, lr: float = 0.5, *, extra: str = "") -> None:
        super().__init__(params, lr * 0.1, (0.5, 0.9), weight_decay=0.0)
        self.extra, self.count = extra, 0

    def step(self, closure: Any = None) -> Any:
        self.count = getattr(self, "count", 0) + 1
        return super().step(closure)


class Heir(Tenth):
    """Declares an option alone: the constructor that it inherits runs, and gives it its default."""

    eps: float = 1e-3


class Alone(AdamW):
    lr: float = 0.25
    boost: float = 2.0


class Grown(Alone):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{"boost": 3.0, **options})


class Mixin:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mixed = True


class Mixed(Mixin, AdamW):
    pass


for made in (Tenth, Heir, Alone, Grown, Mixed):
    del OPTIMIZERS[made.name]  # tests of the whole registry shall not find them


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("name", NAMES)
def test_a_constructor_of_ones_own_runs(name: str) -> None:
    page: Any = OPTIMIZERS[name]

    class Own(page):  # type: ignore[misc]
        def __init__(self, params: Any, lr: float = 0.5) -> None:
            self.early = True
            super().__init__(params, lr=lr * 0.1, weight_decay=0.125)
            self.mine = lr

    p = parameter()
    optimizer = Own([p], lr=0.25)
    assert (optimizer.early, optimizer.mine, optimizer.param_groups[0]["lr"]) == (True, 0.25, 0.025)
    assert optimizer.param_groups[0]["weight_decay"] == 0.125
    apply(optimizer, [p], [torch.ones(3)])
    q = parameter()
    other = page([q], lr=0.025, weight_decay=0.125)
    apply(other, [q], [torch.ones(3)])
    assert torch.equal(p, q)
    other.load_state_dict(optimizer.state_dict())  # the same mathematics: nothing to say
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(OptionError, match="out of range"):
        Own([p], lr=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        Own([p], betas=(0.9, 0.9))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    del OPTIMIZERS["own"]


def test_with_positions_attributes_and_a_step() -> None:
    p = parameter()
    optimizer = Tenth([p], 0.5, extra="x")
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.05, (0.5, 0.9), 0.0)
    p.grad = torch.ones(3)
    optimizer.step()
    assert (optimizer.extra, optimizer.count) == ("x", 1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is Tenth
        twin.param_groups[0]["params"][0].grad = torch.ones(3)
        twin.step()
        assert float(twin.state[twin.param_groups[0]["params"][0]]["step"]) == 2


def test_options_alone_and_both() -> None:
    assert Heir([parameter()]).param_groups[0]["eps"] == 1e-3
    assert Heir([parameter()]).count == 0
    assert Alone([parameter()]).defaults["boost"] == 2.0
    assert Alone([parameter()], boost=1).param_groups[0]["lr"] == 0.25
    assert Grown([parameter()]).defaults["boost"] == 3.0
    assert Grown([parameter()], lr=0.5, boost=4.0).defaults["boost"] == 4.0
    with pytest.raises(OptionError, match=r"Grown has no option 'bost'\. Did you mean boost"):
        Grown([parameter()], bost=1)
    mixed = Mixed([parameter()], lr=0.5)
    assert (mixed.mixed, mixed.param_groups[0]["lr"]) == (True, 0.5)


def test_a_file_of_a_subclass_with_options_of_its_own_is_of_another_class() -> None:
    optimizer = AdamW([parameter()])
    with pytest.warns(UserWarning, match="AdamW loads a checkpoint of Alone, which is another class"):
        optimizer.load_state_dict(Alone([parameter()], lr=0.5).state_dict())
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_class_of_the_same_name_takes_no_word() -> None:
    made = type("AdamW", (AdamW,), {"__module__": "elsewhere"})
    assert OPTIMIZERS["adamw"] is AdamW is not made
    assert made([parameter()]).param_groups[0]["weight_decay"] == 0.01


def test_wrappers_of_lightning_are_no_pages() -> None:
    before = list_optimizers()
    net = nn.Linear(2, 2)
    _, wrapped = Fabric(accelerator="cpu", devices=1).setup(net, Tenth(net.parameters(), 0.5))
    net(torch.ones(1, 2)).sum().backward()
    wrapped.step()
    assert list_optimizers() == before
    assert wrapped.optimizer.count == 1


def test_a_spec_with_what_its_constructor_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "tenth", Tenth)
    assert create_optimizer({"name": "tenth", "lr": 0.25}, nn.Linear(2, 2)).param_groups[0]["lr"] == 0.025
    with pytest.raises(OptionError, match=r"Tenth.* has a constructor of its own, and got .*'state_bits'"):
        OptimizerStrategy("tenth", state_bits=8)


def test_a_config_parser_builds_it() -> None:
    """As LightningCLI does for `--optimizer=...`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"})
    arguments = ["--optimizer", f"{__name__}.Tenth", "--optimizer.lr", "0.25", "--optimizer.extra", "y"]
    config = parser.parse_args(arguments)
    options = vars(config.optimizer.init_args)
    assert Tenth([parameter()], **options).extra == "y"
    assert lightning_optim.AdamW is AdamW
