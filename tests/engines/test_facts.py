"""What a step looks at of tensors, found by each of three ways: one call of C++, guards of torch, and lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.engines import native
from lightning_optim.engines.facts import Facts, Kinds

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.double(),
    "size": lambda x: x[:2],
    "shape": lambda x: x.flatten(),
    "strides": lambda x: x.t(),
    "sign": torch._neg_view,
    "zeros": lambda x: torch._efficientzerotensor(x.shape),
    "sparse": lambda x: x.to_sparse(),
}


def square() -> Tensor:
    """A matrix that lies the other way round when it is turned."""
    return torch.arange(9.0).view(3, 3)


def looked_at_twice(tensors: list[Tensor], slots: int = 0) -> Facts:
    """Facts that a second step has found again: from then on one call may compare."""
    facts = Facts.of(tensors, slots=slots)
    assert Facts.of(tensors, facts) is facts
    return facts


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("of_gradients", [False, True])
def test_a_change_of_one_tensor_is_seen(change: str, of_gradients: bool, way_of_looking: str) -> None:
    once = [torch.ones(2), square()]
    facts = looked_at_twice(once)
    others = [torch.ones(2), CHANGES[change](square())]
    if of_gradients:  # only one call reads them without a list of them
        params = [torch.nn.Parameter(x.detach()) for x in others if not x.is_sparse]
        if len(params) < 2 or change in ("sign", "zeros"):
            pytest.skip("no parameter of this kind has such a gradient here")
        for param, grad in zip(params, others, strict=True):
            param.grad = grad
        found = facts.followed_by(params, of_gradients=True)
        assert found is None
        return
    try:
        found = Facts.of(others, facts)
    except RuntimeError:  # torch refuses the address of a sparse one
        assert change == "sparse"
        return
    assert found.kinds is not facts.kinds


def test_one_call_confirms_what_lists_find(way_of_looking: str) -> None:
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(square())]
    for p in params:
        p.grad = torch.zeros_like(p)
    grads = [p.grad for p in params if p.grad is not None]
    facts = looked_at_twice(grads)
    in_one_call = way_of_looking == "one call"
    assert facts.followed_by(grads) is (facts if in_one_call else None)
    assert facts.followed_by(params, of_gradients=True) is (facts if in_one_call else None)
    assert facts.followed_by(grads[:1]) is None
    params[1].grad = None
    assert facts.followed_by(params, of_gradients=True) is None
    params[1].grad = torch.zeros(3, 3)
    if in_one_call:
        moved = facts.followed_by(params, of_gradients=True)
        assert moved is not None
        assert moved.kinds is facts.kinds
        assert moved.listed == [grads[0].data_ptr(), params[1].grad.data_ptr()]


def test_a_slot_that_was_turned_is_seen(way_of_looking: str) -> None:
    tensors = [torch.ones(2), square(), square()]
    facts = looked_at_twice(tensors, slots=2)
    tensors[2].t_()
    assert Facts.of(tensors, facts) is not facts
    tensors[2].t_()
    assert Facts.of(tensors, facts) is facts


def test_classes_are_told_apart_by_lists_and_guards() -> None:
    kinds = Kinds([torch.ones(2), square()])
    assert not kinds.are_of([torch.ones(2), torch.nn.Parameter(square())])
    assert not kinds.are_of([torch.ones(2)])


class WithoutStrides(Tensor):
    """A wrapper that refuses to say how it lies in memory."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...]) -> WithoutStrides:
        make: Any = Tensor._make_wrapper_subclass
        return make(cls, shape, dtype=torch.float32, dispatch_sizes_strides_policy="strides")  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if "is_contiguous" in str(func):
            return True
        raise NotImplementedError("it has no strides")


def test_a_wrapper_without_strides_is_looked_at_by_lists(way_of_looking: str) -> None:
    wrapper = WithoutStrides((3, 3))
    kinds = Kinds([torch.ones(2), wrapper])
    assert kinds.are_of([torch.zeros(2), wrapper])
    library = native.native()
    if library is not None:
        assert library.describe([wrapper]) is None
        assert library.look([wrapper], False, native.numbers(9), native.numbers(1), native.numbers(1)) > native.MOVED


def test_what_only_guards_tell_apart_is_of_the_same_kinds(way_of_looking: str) -> None:
    once = square()
    facts = looked_at_twice([once, once])
    others = [square(), square()]
    assert Facts.of(others, facts).kinds is facts.kinds


def test_tensors_that_moved_keep_their_kinds(way_of_looking: str) -> None:
    first, others = [torch.ones(2), square()], [torch.ones(2), square()]
    before = looked_at_twice(first)
    moved = Facts.of(others, before)
    assert moved is not before
    assert moved.kinds is before.kinds
    assert moved.listed == moved.addresses.tolist() == [x.data_ptr() for x in others]
    assert Facts.of(others, moved) is moved
    shifted = torch.zeros(10)[1:]
    assert Facts.of([shifted, others[0]]).aligned.tolist() == [False, True]


def test_memory_that_torch_shares_until_it_is_written_is_its_own_in_a_step(way_of_looking: str) -> None:
    """Kernels write where addresses point: a lazy clone must have its own memory by then."""
    once = [torch.ones(2), square()]
    facts = looked_at_twice(once)
    lazy = torch._lazy_clone(once[0])
    moved = Facts.of([lazy, once[1]], facts)
    assert moved is not facts
    assert moved.listed[0] != once[0].data_ptr()
