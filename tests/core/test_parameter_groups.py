"""Parameters and groups: what torch takes is taken as torch takes it, keys that are no options included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_optim import SGDW, AdamW, KoalaV, OptionError, create_optimizer
from tests.harness.problems import NAMES, build

GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "a list": lambda net: list(net.parameters()),
    "a generator": lambda net: net.parameters(),
    "names": lambda net: net.named_parameters(),
    "a dict's values": lambda net: dict(net.named_parameters()).values(),
    "a dict's items": lambda net: dict(net.named_parameters()).items(),
    "a dict's keys": lambda net: dict.fromkeys(net.parameters()).keys(),
    "a parameter list": lambda net: nn.ParameterList(net.parameters()),
    "groups": lambda net: [{"params": p} for p in net.parameters()],
    "groups with names": lambda net: ({"params": [pair]} for pair in net.named_parameters()),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("name", NAMES)
def test_what_torch_takes_is_taken(name: str, given: Callable[[nn.Module], Any]) -> None:
    net = nn.Linear(3, 2)
    ours, theirs = build(name, given(net)), torch.optim.AdamW(given(net))
    for own, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [id(p) for p in own["params"]] == [id(p) for p in other["params"]]
        assert own.get("param_names") == other.get("param_names")


@pytest.mark.parametrize("params", [{nn.Parameter(torch.ones(1))}, frozenset([nn.Parameter(torch.ones(1))])])
def test_a_set_has_no_order(params: Any) -> None:
    for given in (params, [{"params": params}]):
        with pytest.raises(TypeError, match="AdamW got a set of parameters, whose order differs from run to run"):
            AdamW(given)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (nn.Linear(2, 2), "got a module; give it module.parameters()"),
        (torch.ones(2), "got a bare tensor"),
        ({"params": [torch.ones(2)]}, r"give it a list of groups: \[\{"),
        ({"weight": torch.ones(2)}, r"params\.items\(\)"),
        ([], "got an empty parameter list"),
        (None, "None is no list of them"),
        ("weight", "'weight' is no list of them"),
        ([{"params": [torch.ones(2)]}, torch.ones(2)], "parameters and parameter groups in one list"),
        ([("a", torch.ones(2)), torch.ones(3)], "with and without names"),
        ([np.ones(2)], "got numpy.ndarray"),
        ([torch.ones(2, requires_grad=True) * 2], "computed from others"),
    ],
    ids=str,
)
def test_what_cannot_be_optimized(params: Any, says: str) -> None:
    with pytest.raises(OptionError, match=f"AdamW.*{says}"):
        AdamW(params)


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_are_no_options_are_kept(name: str) -> None:
    """In the group, in the file, after a load, in a copy: as torch does."""
    keys = {"lr_scale": 0.5, "rho": 0.05, "name": "head", "initial_lr": 0.1, "layer": [1, 2], "use_muon": False}
    if name == "koala_m":
        keys.pop("rho")  # one letter from its option
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = build(name, [{"params": params[:1], **keys}, {"params": params[1:]}])
    assert keys.items() <= optimizer.param_groups[0].items()
    assert not keys.keys() & optimizer.param_groups[1].keys()
    saved = copy.deepcopy(optimizer.state_dict())
    assert keys.items() <= saved["param_groups"][0].items()
    twin = build(name, [{"params": params[:1], "lr_scale": 1.0}, {"params": params[1:]}])
    twin.load_state_dict(saved)
    assert keys.items() <= twin.param_groups[0].items()
    assert keys.items() <= copy.deepcopy(twin).param_groups[0].items()
    assert "lr_scale" in repr(twin)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("weight_decy", "Did you mean weight_decay"),
        ("beta", "Did you mean betas"),
        ("LR", "Did you mean lr"),
        ("weightdecay", "Did you mean weight_decay"),
        ("learning_rate", "use lr"),
        ("fused", "engine='auto' already runs"),
        ("state_bit", "Did you mean state_bits"),
    ],
)
def test_a_near_miss_is_refused(key: str, hint: str) -> None:
    with pytest.raises(OptionError, match=f"AdamW has no option {key!r}.*{hint}"):
        AdamW([{"params": [nn.Parameter(torch.ones(1))], key: True}])


def test_groups_of_another_optimizer() -> None:
    """Flags of torch that say nothing, and state that belongs to the whole optimizer, are left out."""
    p = nn.Parameter(torch.ones(2))
    theirs = torch.optim.AdamW([{"params": [p], "lr": 0.5}])
    group = AdamW(theirs.param_groups).param_groups[0]
    assert group["lr"] == 0.5
    assert not {"foreach", "fused", "capturable", "differentiable"} & group.keys()
    koala = KoalaV([p])
    p.grad = torch.ones(2)
    koala.set_loss(1.0)
    koala.step()
    assert "P" not in KoalaV(koala.param_groups).param_groups[0]


def test_the_users_dicts_stay_as_they_are() -> None:
    group = {"params": [("w", nn.Parameter(torch.ones(1)))], "lr": 1}
    AdamW([group])
    assert group.keys() == {"params", "lr"}


NUMBERS: list[Any] = [
    np.float32(0.25), np.float64(0.25), np.float16(0.25), np.array(0.25), torch.tensor(0.25), torch.tensor([0.25]),
]  # fmt: skip


@pytest.mark.parametrize(
    "number", NUMBERS, ids=lambda number: type(number).__name__ + str(getattr(number, "dtype", ""))
)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_other_libraries(name: str, number: Any) -> None:
    """As an option, in a group, written into a group, in a tuple and in a file: they count as floats."""
    ends = []
    for value in (number, 0.25):
        params = [nn.Parameter(torch.linspace(1, 2, 6).view(2, 3)), nn.Parameter(torch.ones(3))]
        optimizer = build(name, [{"params": params[:1], "weight_decay": value}, {"params": params[1:]}], lr=value)
        if "betas" in optimizer.options:
            betas = optimizer.param_groups[0]["betas"]
            optimizer.param_groups[0]["betas"] = (value, *betas[1:])
            optimizer.param_groups[1]["betas"] = [value, *betas[1:]]
        for _ in range(2):
            optimizer.param_groups[1]["lr"] = value
            for p in params:
                p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
            if optimizer.inputs:
                optimizer.set_loss(0.5)
            optimizer.step()
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                assert not any(isinstance(item, np.generic | np.ndarray) for item in group.values())
            optimizer.load_state_dict(copy.deepcopy(saved))
        ends.append(torch.cat([p.detach().reshape(-1) for p in params]))
    assert torch.equal(*ends)


def test_a_file_that_holds_numbers_of_numpy() -> None:
    p = nn.Parameter(torch.ones(2))
    saved = AdamW([p]).state_dict()
    saved["param_groups"][0].update(
        lr=np.float32(0.25), betas=[np.float64(0.5), np.float32(0.5)], amsgrad=np.bool_(True)
    )
    optimizer = AdamW([p])
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["amsgrad"]) == (0.25, (0.5, 0.5), True)
    assert type(group["lr"]) is float


def test_a_rate_that_a_schedule_takes_below_zero_by_rounding() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = SGDW([p], lr=0.1)
    p.grad = torch.ones(2)
    optimizer.param_groups[0]["lr"] = -1e-18
    optimizer.step()
    assert torch.allclose(p, torch.ones(2))


def test_options_of_a_config() -> None:
    net = nn.Linear(2, 2)
    optimizer = create_optimizer({"name": "adan", "lr": np.float32(0.25), "state_bits": np.int64(8)}, net)
    assert optimizer.defaults["lr"] == 0.25
