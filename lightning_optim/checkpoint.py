"""State as it leaves and as it comes back: plain tensors in files, codes and exact types in memory."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.distributed import like, local
from lightning_optim.errors import OptionError
from lightning_optim.options import check_options

if TYPE_CHECKING:
    from lightning_optim.optimizer import Optimizer

# What a torch.optim checkpoint says about how torch runs a step; it means nothing here.
TORCH_FLAGS = ("foreach", "fused", "capturable", "differentiable")
# Options that say how state is kept, not how to train: a checkpoint does not change them.
OWN = ("state_bits", "state_format")


def decoded(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict that torch made, with plain tensors in the place of codes."""
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, (_, p) in zip(order, optimizer.every_parameter(), strict=True):
        state = state_dict["state"].get(index, {})
        coded = [name for name, value in state.items() if isinstance(value, storage.Coded)]
        if coded:
            values = storage.read(state, coded)
            state_dict["state"][index] = {**state, **{name: like(values[name], p) for name in coded}}
    return state_dict


def adopt(optimizer: Optimizer, state_dict: dict[str, Any], before: list[dict[str, Any]]) -> None:
    """Make the groups and the state that torch has just loaded the optimizer's own.

    Args:
        optimizer: Holds what torch made of the state_dict, cast to the parameters' types.
        state_dict: What was loaded.
        before: The groups of the optimizer before, without parameters.
    """
    owner = type(optimizer).__name__
    for group, own in zip(optimizer.param_groups, before, strict=True):
        for key in TORCH_FLAGS:
            group.pop(key, None)
        group.update({k: v for k, v in own.items() if k not in group or k in OWN})
        names = [name for name in optimizer.options if name in group]
        group.update(check_options({name: group[name] for name in names}, optimizer.options, owner))
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    fresh: set[str] = set()
    foreign: set[str] = set()
    for index, (i, p) in zip(order, optimizer.every_parameter(), strict=True):
        saved = state_dict["state"].get(index)
        if saved:
            _restore(optimizer, p, i, saved)
            foreign.update(name for name in saved if name not in optimizer.state[p])
            fresh.update(name for name in optimizer.state[p] if name not in saved)
    if fresh or foreign:
        starts = f"{', '.join(sorted(fresh))} starts fresh" if fresh else ""
        drops = f"{', '.join(sorted(foreign))} of the checkpoint is left out" if foreign else ""
        said = " and ".join(word for word in (starts, drops) if word)
        warnings.warn(f"{owner} loads a checkpoint with other state: {said}.", stacklevel=7)


def _restore(optimizer: Optimizer, p: Tensor, i: int, saved: dict[str, Any]) -> None:
    """Put the saved slots of one parameter in place, in the storage that this optimizer keeps them in."""
    slots, state = optimizer.all_slots(), optimizer.state[p]
    state.clear()
    optimizer.start_state(p, i)
    state["step"].fill_(float(saved.get("step", 0)))
    coded: dict[str, Tensor] = {}
    for name in [name for name in saved if name in slots]:  # in an order that is the same on every rank
        here = p.device if slots[name].per == "element" else torch.device("cpu")
        dtype = optimizer.slot_dtype(slots[name], p, i)
        values = torch.as_tensor(saved[name]).to(dtype=dtype, device=here, copy=True)
        is_coded = isinstance(state.get(name), storage.Coded)
        shape = p.shape if is_coded else state.get(name, values).shape
        if values.shape != shape:
            raise OptionError(
                f"{type(optimizer).__name__} cannot load {name} of shape {tuple(values.shape)} for a parameter of "
                f"shape {tuple(p.shape)}; it must be {tuple(shape)}. Was it saved from another model?"
            )
        if is_coded:
            coded[name] = local(values).reshape(-1)
        else:
            state[name] = values
    storage.write(state, coded, int(state["step"]))
