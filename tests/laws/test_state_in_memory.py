"""A state_dict that is kept in memory is whole: all of it of one moment, or all of it live.

Where a slot is quantized, it is a copy of the moment. Where none is, its tensors are those of the optimizer, as in
torch, and its numbers (the learning rate) are of the moment, as in torch.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.stages import Average, Lookahead
from lightning_optim.storage import Quantized
from tests.harness import problems
from tests.harness.engines import differences, quantizes
from tests.harness.problems import NAMES, apply, make_params

SHAPES = ((), (5,), (3, 4), (70, 61), (4100,))  # the last two have codes
BITS = [32, 16, 8, "mixed"]
Kept = dict[str, Any]


def build(name: str, params: list[Tensor], bits: Any) -> Optimizer:
    """Two groups, in mixed bits where asked for, with an average and slow weights beside the slots of the page."""
    of_groups = (32, 8) if bits == "mixed" else (bits, bits)
    groups = [{"params": params[:3], "state_bits": of_groups[0]}, {"params": params[3:], "state_bits": of_groups[1]}]
    optimizer = problems.build(name, groups)
    for stage in (Lookahead(k=2), Average()):
        optimizer.append(stage)
    return optimizer


def steps(optimizer: Optimizer, params: list[Tensor], first: int, last: int) -> None:
    """Steps in the first of which one parameter has no gradient, so that parameters are sorted anew."""
    for step, grads in enumerate(problems.gradients(last, SHAPES, torch.float32)):
        if step >= first:
            apply(optimizer, params, [None if i == 1 and step == first else g for i, g in enumerate(grads)], step)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested dicts and lists, in order."""
    if isinstance(value, dict):
        return [x for key in sorted(value, key=str) for x in tensors(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def equal(one: Kept, other: Kept) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_kept_is_of_one_moment_or_live(name: str, bits: Any) -> None:
    if bits in (8, "mixed") and not quantizes(name):
        pytest.skip("it has no state to keep in 8 bits, and says so")
    params = make_params(SHAPES, torch.float32)
    optimizer = build(name, params, bits)
    steps(optimizer, params, 0, 3)
    kept = optimizer.state_dict()
    then, weights = copy.deepcopy(kept), [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    steps(optimizer, params, 3, 6)
    assert [group["lr"] for group in kept["param_groups"]] == [problems.LEARNING_RATE] * 2
    codes = any(isinstance(value, Quantized) for slots in optimizer.state.values() for value in slots.values())
    assert codes == (bits in (8, "mixed"))
    assert equal(kept, then if codes else optimizer.state_dict())
    assert not equal(kept, optimizer.state_dict() if codes else then)

    # What comes back is what a deep copy brings back, if it is of then, and what is there, if it is of now.
    ends: list[Any] = []
    for given in (
        kept,
        then if codes else copy.deepcopy(optimizer.state_dict() | {"param_groups": kept["param_groups"]}),
    ):
        others: list[Tensor] = [torch.nn.Parameter(x.clone()) for x in weights]
        other = build(name, others, bits)
        other.load_state_dict(given)
        steps(other, others, 3, 5)
        ends += [other, others]
    assert differences(*ends) == []


DUPLICATES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: saved_and_loaded(pair),
}


def saved_and_loaded(pair: Any) -> Any:
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_copy_of_an_optimizer_is_of_one_moment(name: str, duplicate: str) -> None:
    """And goes on as the original would have; what the original does later changes nothing in it."""
    params = make_params(SHAPES, torch.float32)
    optimizer = build(name, params, "mixed" if quantizes(name) else 32)
    optimizer.model_order = [1, 0, 2, 4, 3]
    steps(optimizer, params, 0, 3)
    others, other = DUPLICATES[duplicate]((params, optimizer))
    assert other.model_order == optimizer.model_order
    steps(optimizer, params, 3, 5)
    steps(other, others, 3, 5)
    assert differences(optimizer, params, other, others) == []


@pytest.mark.parametrize("name", [name for name in NAMES if quantizes(name)])
def test_the_copy_is_on_the_host_and_a_live_one_takes_no_memory(name: str) -> None:
    """Small tensors, counters and exact slots are copied only beside codes."""
    for bits in (32, 8):
        params = make_params(SHAPES, torch.float32)
        optimizer = problems.build(name, params, state_bits=bits)
        steps(optimizer, params, 0, 2)
        own = {x.data_ptr() for slots in optimizer.state.values() for x in slots.values() if isinstance(x, Tensor)}
        shared = {x.data_ptr() for x in tensors(optimizer.state_dict()["state"])} & own
        assert (shared == own) if bits == 32 else not shared
