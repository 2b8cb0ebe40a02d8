"""What loaders of torch do to a state_dict: files of torch.optim with other groups, and FSDP2's loading in place."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_dtensor, is_sharded, local
from lightning_optim.distributed.ranks import any_rank

Handed = dict[int, tuple["weakref.ref[Tensor]", int]]  # tensors by their id, with the version that they had

# What a torch.optim checkpoint says about how torch runs a step; it means nothing here.
TORCH_FLAGS = ("foreach", "fused", "capturable", "differentiable")


def regrouped(optimizer: StateLayout, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of `torch.optim` with one group for all, in the groups of an optimizer that has more; else as it is.

    What was trained by `torch.optim.AdamW(self.parameters())` goes on in groups by role. Parameters are found by their
    order in the model, those that are frozen included or not. Options are the optimizer's own: one set of the
    checkpoint's would undo what the groups are for.
    """
    if not all(isinstance(state_dict.get(key), kind) for key, kind in (("state", dict), ("param_groups", list))):
        return state_dict
    saved, own = state_dict["param_groups"], optimizer.param_groups
    of_torch = [any(flag in group for flag in TORCH_FLAGS) for group in saved]
    if len(saved) == len(own) and any(of_torch) and not all(of_torch):  # by FSDP2, to the last one
        groups = [{**group, "params": dealt["params"]} for group, dealt in zip(own, saved, strict=True)]
        return {**state_dict, "param_groups": groups}
    count = len(optimizer.every_parameter())
    if len(saved) != 1 or "state_bits" in saved[0] or len(optimizer.model_order) != count:
        return state_dict
    ids = saved[0]["params"]
    if len(own) == 1 and len(ids) == count:
        return state_dict
    if any(is_flattened(p) for _, p in optimizer.every_parameter()):  # FSDP1 has found out which is which
        numbers = list(range(count)) if sorted(ids) == list(range(count)) else []
    elif len(ids) == count:
        rank = {place: k for k, place in enumerate(sorted(optimizer.model_order))}
        numbers = [ids[rank[place]] for place in optimizer.model_order]
    else:
        numbers = [ids[place] for place in optimizer.model_order] if len(ids) > max(optimizer.model_order) else []
    if not numbers:
        return state_dict
    rest = iter(numbers)
    groups = [{**group, "params": [next(rest) for _ in group["params"]]} for group in own]
    return {
        **state_dict,
        "state": {i: v for i, v in state_dict["state"].items() if i in numbers},
        "param_groups": groups,
    }


def is_rehearsal(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step without closure is none: torch's loader takes one to make state, with lr and all gradients zero.

    It comes after the weights were loaded, and must count nothing.
    """
    if any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moved = any(bool(local(p.grad).any()) for p in params if p.grad is not None)
    return not (any_rank(moved) if any(is_sharded(p) for p in params) else moved)


def without_own(state_dict: dict[str, Any], handed: Handed) -> dict[str, Any]:
    """The state_dict without the tensors that this optimizer gave away itself and that nobody has filled since.

    FSDP2 loads a full file into the optimizer's state_dict. What the file lacks comes back as it was, and would pass
    for the file's.
    """

    if not handed:
        return state_dict

    def own(value: Any) -> bool:
        reference, version = handed.get(id(value), (None, -1))
        held = reference() if reference is not None else None
        return held is not None and held is value and local(held)._version == version

    there: dict[str, bool] = {}  # slots of which something is filled; nobody fills a part without elements
    for saved in state_dict["state"].values():
        for name, value in saved.items():
            if isinstance(value, Tensor) and local(value).numel():
                there[name] = there.get(name, False) or not own(value)

    def lacks(name: str, value: Any) -> bool:
        return own(value) and bool(local(value).numel() or not there.get(name, True))

    state = {
        key: {name: value for name, value in saved.items() if not lacks(name, value)}
        for key, saved in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def given_away(state_dict: dict[str, Any]) -> Handed:
    """What `without_own` needs to know again the tensors of a state_dict that counts no step as yet."""
    return {
        id(value): (weakref.ref(value), local(value)._version)
        for saved in state_dict["state"].values()
        for value in saved.values()
        if isinstance(value, Tensor) and is_dtensor(value) and not float(saved["step"])
    }
