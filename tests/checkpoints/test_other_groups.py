"""A run goes on where the spec sorts the parameters of the same model into other groups than that of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn

from lightning_optim import OptionError, create_optimizer
from tests.harness.data import batches
from tests.harness.modules import Configured, vector
from tests.harness.ranks import run_ranks
from tests.harness.strategies import strategy_of
from tests.harness.trainers import trainer

MUON: dict[str, Any] = {"name": "muon", "lr": 0.01}
ADAMW: dict[str, Any] = {"name": "adamw", "lr": 0.01}
PRODIGY: dict[str, Any] = {"name": "prodigy"}


def net() -> nn.Sequential:
    """Matrices of equal shape, so that shapes do not tell which is which."""
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def fitted(spec: Any, epochs: int, folder: Path | None = None, ckpt_path: Path | None = None, **options: Any) -> Any:
    """The module after a fit, beside its Trainer."""
    seed_everything(0, verbose=False)
    module = Configured(spec, net)
    one = trainer(max_epochs=epochs, **options)
    one.fit(module, batches(), ckpt_path=ckpt_path)
    if folder:
        one.save_checkpoint(folder / "end.ckpt")
    return module, one


def moments(one: Any, module: Any, slot: str = "exp_avg") -> list[torch.Tensor]:
    return [one.optimizers[0].state[p][slot] for p in module.net.parameters()]


def group(of: dict[str, Any], params: str, **options: Any) -> dict[str, Any]:
    """The spec with a parameter group of its own, which by itself changes no option."""
    return {**of, "groups": [{"params": params, "lr": of.get("lr", 1.0), **options}]}


WARM = {**ADAMW, "schedule": {"name": "constant", "warmup_steps": 3}}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ADAMW, group(ADAMW, "net.1.*")),
        (group(ADAMW, "net.0.*"), group(ADAMW, "net.1.*")),
        (MUON, group(MUON, "net.1.weight")),
        (group(MUON, "net.1.weight"), group(MUON, "net.2.weight")),
        (group(MUON, "net.2.weight"), MUON),
        (PRODIGY, group(PRODIGY, "net.1.*")),  # d belongs to the whole optimizer
        (WARM, group(WARM, "net.1.*")),
    ],
    ids=str,
)
def test_every_parameter_finds_its_state(first: Any, second: Any, tmp_path: Path) -> None:
    """The run takes the same steps, bit for bit, as one that has had these groups from the start."""
    fitted(first, 1, tmp_path)
    module, one = fitted(second, 2, ckpt_path=tmp_path / "end.ckpt")
    right, straight = fitted(second, 2)
    assert all(map(torch.equal, moments(one, module), moments(straight, right)))
    assert torch.equal(vector(module), vector(right))


@pytest.mark.parametrize("spec", [MUON, ADAMW], ids=str)
@pytest.mark.parametrize("frozen", [True, False])
def test_layers_that_joined_during_the_saved_run_find_theirs_too(spec: Any, frozen: bool) -> None:
    first, second = net(), net()
    first[1].requires_grad_(False)
    optimizer = create_optimizer(spec, first)
    for _ in range(2):
        optimizer.zero_grad()
        first(torch.ones(3, 4)).sum().backward()
        optimizer.step()
        first[1].requires_grad_(True)
    optimizer.consolidate_state_dict()
    saved = optimizer.state_dict()
    second[1].requires_grad_(not frozen)
    other = create_optimizer(group(spec, "0.*"), second)
    other.load_state_dict(saved)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
        assert optimizer.state[p]["step"] == other.state[q]["step"]


def test_other_groups_of_another_model_are_told_in_words_and_nothing_has_changed() -> None:
    model = net()
    model[1].requires_grad_(False)
    optimizer = create_optimizer(MUON, model)
    saved = create_optimizer(group(MUON, "0.*"), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))).state_dict()
    sizes = [len(part["params"]) for part in optimizer.param_groups]
    with pytest.raises(OptionError, match=r"Muon cannot load this checkpoint. It has the parameter groups 0\.\* \("):
        optimizer.load_state_dict(saved)
    assert [len(part["params"]) for part in optimizer.param_groups] == sizes


def resumed_and_straight(folder: Path) -> list[list[torch.Tensor]]:
    """The moments of matrices of equal shape that have changed places between two groups."""
    first, second = group(MUON, "net.1.weight"), group(MUON, "net.2.weight")
    fitted(first, 1, folder, strategy=strategy_of("fsdp1 full"))
    runs = [
        fitted(second, 2, ckpt_path=path, strategy=strategy_of("fsdp1 full")) for path in (folder / "end.ckpt", None)
    ]
    return [moments(one, module) for module, one in runs]


def test_fsdp1_finds_them_too(tmp_path: Path) -> None:
    for resumed, straight in run_ranks(resumed_and_straight, tmp_path):
        assert all(map(torch.equal, resumed, straight))


def test_a_tensor_that_adamw_serves_no_longer_keeps_its_first_moment(tmp_path: Path) -> None:
    first, before = fitted({**MUON, "adamw": ["bias", "norm", "head", "net.1.weight"]}, 1, tmp_path)
    with pytest.warns(UserWarning, match="with other parameter groups.*exp_avg_sq of the checkpoint is left out"):
        module, one = fitted(MUON, 1, ckpt_path=tmp_path / "end.ckpt")
    assert list(one.optimizers[0].state[module.net[1].weight]) == ["step", "exp_avg"]
    assert all(map(torch.equal, moments(one, module), moments(before, first)))


def test_without_the_order_of_the_model_it_is_refused_with_both_lists() -> None:
    """A plain `state_dict` numbers parameters as torch does, by their place in the groups."""
    saved = create_optimizer(MUON, net())
    for p in saved.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    saved.step()
    other = create_optimizer({**MUON, "adamw": ["bias", "norm", "head", "0.weight"]}, net())
    start = {name: value for name, value in other.state_dict().items() if name != "state"}
    with pytest.raises(OptionError, match=r"groups adamw \(1\), .* and this optimizer adamw \(2\).* adamw of its spec"):
        other.load_state_dict(saved.state_dict())
    assert not other.state
    assert {name: value for name, value in other.state_dict().items() if name != "state"} == start
