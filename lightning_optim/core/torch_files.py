"""Special cases of loading: files with other parameter groups, and FSDP2, which fills tensors in place."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.frozen import of_whole_optimizer
from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_dtensor, is_sharded, local
from lightning_optim.distributed.ranks import any_rank

# Tensors that `state_dict` has returned for a loader to fill, by id: a weak reference, and the version counter then.
Lent = dict[int, tuple["weakref.ref[Tensor]", int]]


def regrouped(layout: StateLayout, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of other parameter groups, sorted into the groups of this optimizer.

    So a run of `torch.optim.AdamW(self.parameters())`, a file with a single group, can continue with groups by role.
    Parameters are matched by their order in the model, with or without the frozen ones. Files that Lightning has saved
    number parameters by that order, so there groups may have changed in any way. Options stay those of this optimizer,
    since those of a group of the file are not those of each of its parameters here.

    Returns:
        The state_dict with other groups; the same object where it needs no change.
    """
    saved, own = state_dict["param_groups"], layout.param_groups
    # "differentiable" alone tells nothing: early versions of this package let torch write it into a group.
    of_torch = ["foreach" in group or "fused" in group for group in saved]
    if len(saved) == len(own) and any(of_torch) and not all(of_torch):  # FSDP2 gave torch's options to one group
        groups = [{**group, "params": loaded["params"]} for group, loaded in zip(own, saved, strict=True)]
        return {**state_dict, "param_groups": groups}
    numbers = _numbers_in_file(layout, saved)
    if not numbers:
        return state_dict
    rest = iter(numbers)
    groups = [{**group, "params": [next(rest) for _ in group["params"]]} for group in own]
    groups[0].update(of_whole_optimizer(layout, saved))
    state = {number: slots for number, slots in state_dict["state"].items() if number in numbers}
    return {**state_dict, "state": state, "param_groups": groups}


def _numbers_in_file(layout: StateLayout, saved: list[dict[str, Any]]) -> list[int]:
    """The number of each parameter in the file; empty if the groups are the same or parameters cannot be matched."""
    count, order = len(layout.every_parameter()), layout.model_order
    flattened = any(is_flattened(p) for _, p in layout.every_parameter())
    # FSDP1 has matched parameters by their names, and numbered them as this optimizer does.
    numbers = [*range(count)] if flattened else order
    if all("state_bits" in group for group in saved) and _has_numbers(numbers, layout, saved, not flattened):
        sizes, own = ([len(group["params"]) for group in groups] for groups in (saved, layout.param_groups))
        return [] if sizes == own and numbers == [k for group in saved for k in group["params"]] else [*numbers]
    if len(saved) != 1 or "state_bits" in saved[0] or len(order) != count:
        return []
    ids = saved[0]["params"]
    if len(layout.param_groups) == 1 and len(ids) == count:
        return []
    if flattened:
        return numbers if sorted(ids) == numbers else []
    if len(ids) == count:
        rank = {position: k for k, position in enumerate(sorted(order))}
        return [ids[rank[position]] for position in order]
    return [ids[position] for position in order] if len(ids) > max(order) else []


def _has_numbers(numbers: list[int], layout: StateLayout, saved: list[dict[str, Any]], in_one_group: bool) -> bool:
    """Whether the parameters of this optimizer have these numbers in a file of this package.

    Groups of numbers that follow each other may also be those of torch, by the order in the groups of the file; with
    `in_one_group` a single group has the order of the model all the same. FSDP2 matches parameters by their names.
    """
    ids, every = [group["params"] for group in saved if group["params"]], sorted(numbers)
    if any(is_dtensor(p) for _, p in layout.every_parameter()) or any(isinstance(k, str) for part in ids for k in part):
        return False
    follow = [k for part in sorted(ids) for k in part]
    return sorted(follow) == every and (follow != every or (in_one_group and len(ids) == 1))


def with_options_of(layout: StateLayout, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of another class, with the options of this optimizer; its groups must be as many."""
    saved, own = state_dict["param_groups"], layout.param_groups
    if len(saved) != len(own):
        return state_dict  # torch raises the error
    state = {name for name, slot in layout.slots.items() if slot.per == "optimizer"}
    options = [{key: value for key, value in group.items() if key not in state} for group in own]
    groups = [{**group, "params": loaded["params"]} for group, loaded in zip(options, saved, strict=True)]
    return {**state_dict, "param_groups": groups}


def creates_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether torch's loader calls `step` to create state: lr and all gradients are zero, and there is no closure.

    The weights are loaded by then, so this must not count as a step.
    """
    if any(group.get("lr") != 0 for group in optimizer.param_groups):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moves = any(bool(local(p.grad).any()) for p in params if p.grad is not None)
    return not (any_rank(moves) if any(is_sharded(p) for p in params) else moves)


def lent(state_dict: dict[str, Any]) -> Lent:
    """The tensors of sharded parameters in a state_dict before the first step.

    When FSDP2 loads a file, it fills them in place, or puts others there.
    """
    early = (slots for slots in state_dict["state"].values() if any(map(is_dtensor, slots.values())))
    return {
        id(value): (weakref.ref(value), local(value)._version)
        for slots in early
        for name, value in slots.items()
        if isinstance(value, Tensor) and name != "step" and not float(slots["step"])
    }


def without_lent(state_dict: dict[str, Any], given: Lent) -> dict[str, Any]:
    """The state_dict without the tensors that `state_dict` has returned and that no loader has filled since.

    Where the file lacks a slot, FSDP2 returns the tensor of the optimizer, which must not be taken from the file.
    """
    if not given:
        return state_dict

    def unfilled(value: Any) -> bool:
        reference, version = given.get(id(value), (None, -1))
        original = reference() if reference is not None else None
        return original is not None and original is value and local(original)._version == version

    filled: dict[str, bool] = {}  # by slot; a shard without elements has nothing to fill
    for slots in state_dict["state"].values():
        for name, value in slots.items():
            if isinstance(value, Tensor) and local(value).numel():
                filled[name] = filled.get(name, False) or not unfilled(value)

    def lacks(name: str, value: Any) -> bool:
        return unfilled(value) and bool(local(value).numel() or not filled.get(name, True))

    state = {
        key: {name: value for name, value in slots.items() if not lacks(name, value)}
        for key, slots in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
