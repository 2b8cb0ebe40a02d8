"""After any refusal nothing has changed: weights, state, groups and counters are those of before, bit for bit.

What a file may not hold is generated from the declarations of slots, so that each new page falls under the law.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from lightning_optim import OptionError, storage
from lightning_optim.core.optimizer import Optimizer
from tests.harness.problems import NAMES, apply, build, flat, gradients, make_params

SHAPES = ((64, 70), (3,), ())
BAD_NUMBERS: dict[str, Any] = {
    "nan": float("nan"),
    "infinite": float("inf"),
    "huge": 10**400,
    "a text": "0.1",
    "none": None,
    "a bool": True,
    "a list": [0.1],
    "complex": 1j,
    "a tensor of three": torch.zeros(3),
    "a tensor of nan": torch.tensor(float("nan")),
    "a bool in a tensor": torch.tensor(True),
    "an array": np.zeros(3),
    "an object": object(),
}


def after_steps(name: str, bits: int = 32) -> tuple[Optimizer, list[torch.Tensor]]:
    params = make_params(SHAPES, torch.float32)
    optimizer = build(name, params, state_bits=bits)
    for step, grads in enumerate(gradients(2, SHAPES, torch.float32)):
        apply(optimizer, params, grads, step)
    return optimizer, params


def snapshot(optimizer: Optimizer, params: list[torch.Tensor]) -> Any:
    """All that a refusal must leave alone, with the codes of quantized slots."""
    state = {
        i: {key: (vars(v) if isinstance(v, storage.Quantized) else v) for key, v in optimizer.state[p].items()}
        for i, p in enumerate(params)
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return copy.deepcopy([flat(params), state, groups, optimizer.defaults, len(optimizer.stages)])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def write(at: tuple[str, int], key: str, value: Any, file: dict[str, Any]) -> None:
    """Write a value into the state of a parameter, or into a group, of a file."""
    part, i = at
    file[part][i][key] = value


def bad_files(optimizer: Optimizer, saved: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files with one fault each: what, and the file."""

    def edited(what: str, edit: Callable[[dict[str, Any]], None]) -> tuple[str, dict[str, Any]]:
        file = copy.deepcopy(saved)
        edit(file)
        return what, file

    for what, value in {
        "text": "3", "complex": 3j, "negative": -1, "fraction": 2.5, "nan": float("nan"), "bool": True,
        "complex tensor": torch.tensor(3j), "two": torch.tensor([1.0, 2.0]), "endless": float("inf"), "list": [3],
        "huge": 1e300, "bool tensor": torch.tensor(True), "meta": torch.tensor(3.0, device="meta"),
    }.items():  # fmt: skip
        yield edited(f"counter: {what}", partial(write, ("state", 0), "step", value))
    for name in (name for name in saved["state"][0] if name in optimizer.slots):
        slot, value = optimizer.slots[name], saved["state"][0][name]
        wrong: dict[str, Any] = {
            "text": "values", "list": [1.0], "complex": torch.zeros_like(value, dtype=torch.complex64),
            "ints": torch.zeros_like(value, dtype=torch.int64), "bools": torch.zeros_like(value, dtype=torch.bool),
            "nan": torch.full_like(value, torch.nan), "infinity": torch.full_like(value, -torch.inf),
            "shape": torch.zeros(2, 2, 2), "object": {"a": 1}, "meta": torch.empty_like(value, device="meta"),
        }  # fmt: skip
        if slot.per == "element":
            wrong["a number"] = 1.0
            wrong["beyond float32"] = torch.full_like(value, 1e300, dtype=torch.float64)
        if not slot.signed:
            wrong["negative"] = -torch.ones_like(value)
        for what, other in wrong.items():
            yield edited(f"{name}: {what}", partial(write, ("state", 0), name, other))
        if not slot.copies:

            def unstarted(file: dict[str, Any], key: str = name) -> None:
                file["state"][0]["step"] = torch.tensor(0.0)
                file["state"][0][key] = torch.full_like(file["state"][0][key], 7.0)

            yield edited(f"{name}: beside counter 0", unstarted)
    for name, slot in optimizer.slots.items():
        if slot.per == "optimizer" and name in saved["param_groups"][0]:
            for what, other in {"text": "1", "nan": torch.tensor(torch.nan), "two": torch.zeros(2), "1j": 1j}.items():
                yield edited(f"{name}: {what}", partial(write, ("param_groups", 0), name, other))
            if not slot.signed:
                yield edited(f"{name}: -1", partial(write, ("param_groups", 0), name, -1.0))
    for what, other in BAD_NUMBERS.items():
        if (what, optimizer.name) != ("none", "adafactor"):  # whose lr may be None
            yield edited(f"lr: {what}", partial(write, ("param_groups", 0), "lr", other))
    yield edited("no state", lambda file: file.pop("state"))
    yield edited("no groups", lambda file: file.pop("param_groups"))
    yield edited("groups in a dict", lambda file: file.update(param_groups={}))
    yield edited("a group that is none", lambda file: file.update(param_groups=[3]))
    yield edited("a group without parameters", lambda file: file["param_groups"][0].pop("params"))
    yield edited("a parameter twice", lambda file: file["param_groups"][0].update(params=[0, 0, 1]))
    yield edited("state that is none", lambda file: file["state"].update({0: [1.0]}))
    yield edited("too few parameters", lambda file: file["param_groups"][0].update(params=[0, 1]))
    yield edited("one group more", lambda file: file["param_groups"].append({"params": []}))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_refused_file(name: str, bits: int) -> None:
    try:
        optimizer, params = after_steps(name, bits)
    except OptionError:
        pytest.skip("it has nothing to keep in 8 bits, and says so")
    saved = optimizer.state_dict()
    before = snapshot(optimizer, params)
    for what, file in bad_files(optimizer, saved):
        with pytest.raises(ValueError, match=r"\w \w+") as caught:
            optimizer.load_state_dict(file)
        by_torch = "different number of parameter groups" in str(caught.value) or "size of optimizer's" in str(
            caught.value
        )
        assert isinstance(caught.value, OptionError) or by_torch, what
        assert same(snapshot(optimizer, params), before), what
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    optimizer.load_state_dict(saved)
    assert same(snapshot(optimizer, params), before)


def test_a_load_that_fails_late() -> None:
    """In a hook of the user, after the state was replaced."""
    optimizer, params = after_steps("adamw", 8)
    saved, before = copy.deepcopy(optimizer.state_dict()), snapshot(optimizer, params)
    saved["param_groups"][0]["lr"] = 0.5
    saved["state"][0]["exp_avg"].zero_()

    def fail(given: Any) -> None:
        assert given.param_groups[0]["lr"] == 0.5
        raise KeyError("mine")

    handle = optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        optimizer.load_state_dict(saved)
    handle.remove()
    assert same(snapshot(optimizer, params), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_group(name: str) -> None:
    optimizer, params = after_steps(name)
    before = snapshot(optimizer, params)
    new = torch.nn.Parameter(torch.ones(2))
    groups: dict[str, Any] = {
        "a set": {"params": {new}}, "a frozen set": {"params": frozenset([new])}, "a text": {"params": "weight"},
        "none": {"params": None}, "a number": {"params": 3}, "no parameters": {"lr": 0.1}, "no dict": [new],
        "a module": {"params": torch.nn.Linear(2, 2)}, "a mapping": {"params": {"weight": new}},
        "an array": {"params": [np.zeros(2)]}, "twice": {"params": [new, new]}, "known": {"params": params[:1]},
        "not a leaf": {"params": [new * 2]}, "half named": {"params": [("a", new), torch.nn.Parameter(torch.ones(3))]},
        "named beside unnamed": {"params": [("a", new)]}, "a near miss": {"params": [new], "weight_decy": 0.1},
        "of others": {"params": [new], "fused": True}, "an engine": {"params": [new], "engine": "reference"},
        "shared memory": {"params": [torch.nn.Parameter(params[0].detach()[1])]},
    }  # fmt: skip
    groups |= {f"lr: {what}": {"params": [new], "lr": value} for what, value in BAD_NUMBERS.items()}
    if name == "adafactor":
        del groups["lr: none"]
    for what, group in groups.items():
        given = dict(group) if isinstance(group, dict) else group
        with pytest.raises(OptionError, match=r"\w \w+"):
            optimizer.add_param_group(group)
        others = params if what in ("known", "shared memory") else [torch.nn.Parameter(torch.ones(5))]
        with pytest.raises(OptionError, match=r"\w \w+"):
            type(optimizer)([{"params": others}, group])
        assert same(snapshot(optimizer, params), before), what
        assert not isinstance(group, dict) or group.keys() == given.keys(), "the user's dict"


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_value_that_was_written_into_a_group(name: str) -> None:
    """Found by the step that would use it, which moves no weight and no counter."""
    optimizer, params = after_steps(name)
    grads = [torch.ones_like(p) for p in params]
    for key in (key for key, option in optimizer.options.items() if option.type is float):
        right = optimizer.param_groups[0][key]
        before = snapshot(optimizer, params)
        for what, value in BAD_NUMBERS.items():
            optimizer.param_groups[0][key] = value
            with pytest.raises(OptionError, match=rf"{type(optimizer).__name__}: {key}=") as caught:
                apply(optimizer, params, grads)
            assert caught.value, what
            optimizer.param_groups[0][key] = right
            assert same(snapshot(optimizer, params), before), what
    apply(optimizer, params, grads)
