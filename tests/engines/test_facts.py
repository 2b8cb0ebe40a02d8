"""The kinds of tensors, as guards of torch find them and as lists do where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_optim.engines import gradients
from lightning_optim.engines.gradients import Gradients, Kinds

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.double(),
    "size": lambda x: x[:2],
    "strides": lambda x: x.t(),
    "sign": torch._neg_view,
    "zeros": lambda x: torch._efficientzerotensor(x.shape),
    "class": torch.nn.Parameter,
}


@pytest.fixture(params=[True, False], ids=["guards", "lists"])
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the guards of torch, and without."""
    if not request.param:
        monkeypatch.setattr(gradients, "TensorGuards", None)
    return bool(request.param)


def square() -> Tensor:
    """A matrix that lies the other way round when it is turned."""
    return torch.arange(9.0).view(3, 3)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_one_tensor_is_seen(change: str, guarded: bool) -> None:
    assert (Kinds([square()]).guards is not None) == guarded
    kinds = Kinds([torch.ones(2), square()])
    assert kinds.are_of([torch.zeros(2), square()])
    assert not kinds.are_of([torch.zeros(2), CHANGES[change](square())])
    assert kinds.are_of([torch.zeros(2), square()])
    assert not kinds.are_of([torch.zeros(2)])


def test_what_only_guards_tell_apart_is_of_the_same_kinds(guarded: bool) -> None:
    once = square()
    kinds = Kinds([once, once])
    assert kinds.are_of([once, once])
    assert kinds.are_of([square(), square()])


def test_gradients_that_moved_keep_their_kinds(guarded: bool) -> None:
    first, others = [torch.ones(2), square()], [torch.ones(2), square()]
    before = Gradients.of(first)
    assert Gradients.of(first, before) is before
    moved = Gradients.of(others, before)
    assert moved.kinds is before.kinds
    assert moved.addresses == [x.data_ptr() for x in others]
    shifted = torch.zeros(10)[1:]
    assert Gradients.of([shifted, others[0]]).aligned == [False, True]
