"""Parameters that cannot be taken as matrices, and those that become other matrices in a file or during training."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_optim import SOAP, Muon, create_optimizer
from lightning_optim.errors import OptionError

SIX = (2, 2, 2, 2, 2, 2)


def matrix(*shape: int) -> Parameter:
    return Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


def steps(optimizer: torch.optim.Optimizer, p: Parameter, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


# ------------------------------------------------------------------ refused when the optimizer is made


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SOAP([matrix(2, 2), matrix(*SIX)], view="axes"), "parameter 1 of group 0: .*6 axes, .*view='matrix'"),
        (lambda: SOAP([("w", matrix(*SIX))], view="axes"), "SOAP: w: .*6 axes"),
        (lambda: SOAP([matrix(*(3,) * 7)], merge_dims=True, max_precond_dim=4), "7 axes after .* Raise max_precond"),
        (lambda: SOAP([{"params": [matrix(2, 2)], "heads": 2}]), "SOAP has no option 'heads', which is one of Muon"),
        (lambda: Muon([{"params": [matrix(2, 2)], "view": "axes"}]), "Muon has no option 'view', which is one of SOAP"),
        (lambda: create_optimizer({"name": "soap", "view": "axes"}, Volume()), "soap: inner.volume: .*6 axes"),
    ],
)
def test_what_cannot_be_taken_as_matrices_is_refused_at_once(make: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        make()


class Volume(nn.Module):
    """A weight of six axes behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.inner = nn.Module()
        self.inner.volume = matrix(*SIX)


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"params": [matrix(*SIX)], "view": "axes"}, "parameter 0 of group 1: .*6 axes"),
        ({"params": [matrix(2, 2)], "blocks": 2}, "no option 'blocks'"),
    ],
)
def test_a_group_that_comes_late_is_refused_and_changes_nothing(group: dict[str, Any], says: str) -> None:
    optimizer = SOAP([matrix(3, 2)])
    with pytest.raises(OptionError, match=says):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "says"), [({"blocks": 2}, "does not divide"), ({"matrix": True}, "fewer than two")]
)
def test_muon_refuses_a_late_group_too(options: dict[str, Any], says: str) -> None:
    optimizer = Muon([{"params": [matrix(4, 4)], "matrix": True}])
    with pytest.raises(OptionError, match=f"Muon: parameter 0 of group 1: .*{says}"):
        optimizer.add_param_group({"params": [matrix(5, 4) if "blocks" in options else matrix(5)], **options})


def test_six_axes_are_served_as_a_matrix_and_merged() -> None:
    for merged in (False, True):
        p = matrix(*SIX)
        steps(SOAP([p], view="axes" if merged else "matrix", merge_dims=merged), p, 2)


@pytest.mark.parametrize(("options", "why"), [({"blocks": 6}, "blocks of 1 row"), ({"heads": 6}, "heads of 1 row")])
def test_the_report_says_why_blocks_of_one_row_are_no_matrices(options: dict[str, Any], why: str) -> None:
    with pytest.warns(UserWarning, match="shapes decide"):
        optimizer = Muon([{"params": [matrix(6, 4)], **options}, {"params": [matrix(4, 4)]}])
    assert f"0.0 [6, 4]: {why}" in repr(optimizer)


# ------------------------------------------------------------------ files

OTHERS: tuple[dict[str, Any], ...] = (
    {"view": "axes"},
    {"view": "axes", "max_precond_dim": 4},
    {"max_precond_dim": 6},
    {"max_precond_dim": 1},
    {"merge_dims": True},
)


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("saved_with_it", [True, False])
def test_a_file_brings_the_options_that_say_what_is_turned(other: dict[str, Any], saved_with_it: bool) -> None:
    """They are options like others: those of the file hold, and the run goes on as it would have."""
    here, there = ({}, other) if saved_with_it else (other, {})
    p, q = matrix(6, 1, 4, 2), matrix(6, 1, 4, 2)
    first, second = SOAP([p], frequency=2, **there), SOAP([q], frequency=2, **here)
    steps(first, p, 5)
    q.data.copy_(p.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["view"] == there.get("view", "matrix")
    steps(first, p, 4, seed=1)
    steps(second, q, 4, seed=1)
    assert torch.equal(p, q)


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("saved_with_it", [True, False])
def test_where_options_stay_other_bases_begin_anew(other: dict[str, Any], saved_with_it: bool) -> None:
    """As where a file has other groups, under options that were written into it here."""
    here, there = ({}, other) if saved_with_it else (other, {})
    p, q = matrix(6, 1, 4, 2), matrix(6, 1, 4, 2)
    first, second = SOAP([p], **there), SOAP([q], **here)
    steps(first, p, 3)
    saved = copy.deepcopy(first.state_dict())
    names = ("view", "max_precond_dim", "merge_dims")
    saved["param_groups"][0].update({name: second.param_groups[0][name] for name in names})
    with pytest.warns(UserWarning, match="nothing taken; .*exp_avg_sq.*step starts fresh"):
        second.load_state_dict(saved)
    begins_anew(second, q)


# ------------------------------------------------------------------ during training


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_options_that_change_during_training_begin_anew(other: dict[str, Any]) -> None:
    """Also right after a load, by which the options of the file came."""
    p = matrix(6, 1, 4, 2)
    optimizer = SOAP([p], frequency=2)
    steps(optimizer, p, 3)
    optimizer.param_groups[0].update(other)
    with pytest.warns(UserWarning, match=r"other matrices .*shape \[6, 1, 4, 2\]. Their state starts anew"):
        begins_anew(optimizer, p)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    optimizer.param_groups[0].update({name: SOAP.options[name].default for name in other})
    with pytest.warns(UserWarning, match="starts anew"):
        begins_anew(optimizer, p)


def test_a_parameter_that_gets_another_shape_is_refused_and_keeps_its_state() -> None:
    p = matrix(4, 3)
    optimizer = SOAP([p])
    steps(optimizer, p, 2)
    p.data = torch.randn(6, 3)
    with pytest.raises(RuntimeError, match=r"shape \(4, 3\), and its parameter \(6, 3\)"):
        steps(optimizer, p, 1)
    assert float(optimizer.state[p]["step"]) == 2


def begins_anew(optimizer: torch.optim.Optimizer, p: Parameter) -> None:
    """The first gradient moves nothing, and the next steps are those of a new optimizer."""
    q = Parameter(p.detach().clone())
    options = {name: optimizer.param_groups[0][name] for name in ("view", "max_precond_dim", "merge_dims", "frequency")}
    fresh = SOAP([q], **options)
    before: Tensor = p.detach().clone()
    steps(optimizer, p, 1)
    assert torch.equal(p, before)
    steps(fresh, q, 1)
    steps(optimizer, p, 3, seed=5)
    steps(fresh, q, 3, seed=5)
    assert torch.equal(p, q)


def test_a_matrix_that_goes_to_adamw_during_training_begins_anew_and_the_reverse_keeps_its_mean() -> None:
    p = matrix(6, 4)
    optimizer = Muon([{"params": [p], "matrix": True}])
    steps(optimizer, p, 3)
    optimizer.param_groups[0]["matrix"] = False
    with pytest.warns(UserWarning, match="starts anew"):
        steps(optimizer, p, 1)
    assert float(optimizer.state[p]["step"]) == 1
    optimizer.param_groups[0]["matrix"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(optimizer, p, 1)
    assert float(optimizer.state[p]["step"]) == 2
