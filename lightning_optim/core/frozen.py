"""Parameters that are frozen when an optimizer is made, and join it when they are trained.

They have a place in a parameter group from the start, and no state. An optimizer over `module.parameters()` of torch
moves a parameter from the moment on at which it gets `requires_grad_(True)`; so do groups by role with these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.agreement import data_parallel


@dataclass(frozen=True, eq=False)
class Waiting:
    """A frozen parameter.

    Attributes:
        param: The parameter.
        group: The options and the name of its parameter group.
    """

    param: Tensor
    group: dict[str, Any]


def join(optimizer: StateLayout, chosen: Callable[[Waiting], bool] = lambda one: one.param.requires_grad) -> None:
    """Add the chosen parameters to their groups. One that other code has added meanwhile waits no longer.

    Args:
        optimizer: The optimizer.
        chosen: Which parameters join. Default: those that are trained now.
    """
    if not optimizer.waiting:
        return
    present = {id(p) for _, p in optimizer.every_parameter()}
    optimizer.waiting = [one for one in optimizer.waiting if id(one.param) not in present]
    joining = [one for one in optimizer.waiting if chosen(one)]
    if not joining:
        return
    _refuse_beside_ddp(optimizer, joining)
    optimizer.waiting = [one for one in optimizer.waiting if one not in joining]
    groups = {group.get("name"): group for group in optimizer.param_groups}
    for one in joining:
        name = one.group["name"]
        if name in groups:
            params, positions = [*groups[name]["params"], one.param], optimizer.positions
            if all(p in positions for p in params):  # as in an optimizer that is made when all of them train
                params.sort(key=positions.__getitem__)
            groups[name]["params"] = params
        else:
            optimizer.add_param_group({**one.group, "params": [one.param]})
            groups[name] = optimizer.param_groups[-1]
            _schedule_as(optimizer.param_groups[0], groups[name])
    _count_again(optimizer)


def _refuse_beside_ddp(optimizer: StateLayout, joining: list[Waiting]) -> None:
    """Refuse parameters whose gradients DDP does not average, for each rank would train its own.

    Raises:
        RuntimeError: for them.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    new = [one.param for one in joining]
    module = data_parallel([*(p for _, p in optimizer.every_parameter()), *new])
    if module is None:
        return
    averaged = module._get_ddp_logging_data().get("num_parameter_tensors", math.inf)
    if sum(p.requires_grad for p in module._module_parameters) > averaged:
        raise RuntimeError(
            f"{type(optimizer).__name__}: {len(new)} parameters were frozen when DistributedDataParallel wrapped the "
            "model, so it does not average their gradients, and the ranks would drift apart. Unfreeze them before a "
            "fit begins, or train under FSDP2."
        )


def _schedule_as(other: dict[str, Any], group: dict[str, Any]) -> None:
    """Put the rate of a new group where a schedule has brought that of another one."""
    if "initial_lr" in other:
        group["initial_lr"], first = group["lr"], float(other["initial_lr"])
        group["lr"] = group["lr"] * (float(other["lr"]) / first) if first else group["lr"]


def _count_again(optimizer: StateLayout) -> None:
    """Compute anew what depends on which parameters there are."""
    optimizer._most_dims = None
    positions, params = optimizer.positions, [p for _, p in optimizer.every_parameter()]
    optimizer.model_order = [positions[p] for p in params] if all(p in positions for p in params) else []


def in_order_of(optimizer: StateLayout, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict with its groups in the order of those of the same names, which depends on what was frozen."""
    groups = state_dict["param_groups"]
    own, saved = [group.get("name") for group in optimizer.param_groups], [group.get("name") for group in groups]
    if own == saved or not len(own) == len(saved) == len({*own} & {*saved}):
        return state_dict
    of_all = of_whole_optimizer(optimizer, groups)
    rest = [{key: value for key, value in groups[saved.index(n)].items() if key not in of_all} for n in own]
    return {**state_dict, "param_groups": [{**rest[0], **of_all}, *rest[1:]]}


def of_whole_optimizer(optimizer: StateLayout, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What belongs to the whole optimizer, which the first group holds."""
    shared = {name for name, slot in optimizer.slots.items() if slot.per == "optimizer"} | {"predicted"}
    return {key: groups[0][key] for key in shared & groups[0].keys()}


def drop_groups_not_in(optimizer: StateLayout, saved: list[dict[str, Any]]) -> None:
    """Leave empty groups out where a file has none of them: earlier versions made them when parameters joined."""
    own = [group for group in optimizer.param_groups if group["params"]]
    if optimizer.waiting and len(saved) == len(own) < len(optimizer.param_groups):
        optimizer.param_groups = own


def join_as_in(optimizer: StateLayout, saved: list[dict[str, Any]]) -> None:
    """Add the parameters that a file has and this optimizer does not have yet: it was saved after they were unfrozen.

    Args:
        optimizer: The optimizer.
        saved: The parameter groups of the file.
    """
    if not optimizer.waiting or _sizes(optimizer.param_groups) == _sizes(saved):
        return
    total = sum(_sizes(saved))
    for in_groups in (True, False):  # else parameters are in other groups, and are found by their numbers
        for every in (False, True):
            waiting, members = optimizer.waiting, [group["params"] for group in optimizer.param_groups]
            join(optimizer, lambda one, every=every: every or one.param.requires_grad)  # type: ignore[misc]
            own = _sizes(optimizer.param_groups)
            if own == _sizes(saved) or (not in_groups and sum(own) == total):
                return
            undo(optimizer, waiting, members)


def undo(optimizer: StateLayout, waiting: list[Waiting], members: list[list[Tensor]]) -> None:
    """Take parameters that have joined out again."""
    del optimizer.param_groups[len(members) :]
    for group, params in zip(optimizer.param_groups, members, strict=True):
        group["params"] = params
    if optimizer.waiting is not waiting:
        optimizer.waiting = waiting
        _count_again(optimizer)


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]
