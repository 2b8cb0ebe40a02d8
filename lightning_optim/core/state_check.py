"""Refuses a state_dict that does not fit, before anything has changed.

What a slot may hold follows from its declaration: its shape, whether it has a sign, the dtype in which it is stored,
and with what it starts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.core import matrix_slots
from lightning_optim.core.state_layout import STORAGE_OPTIONS, StateLayout
from lightning_optim.distributed.placement import is_sharded, local, logical_shape
from lightning_optim.distributed.ranks import gathered
from lightning_optim.errors import OptionError, is_number, shown
from lightning_optim.language.options import check_options, plain
from lightning_optim.language.program import namespace
from lightning_optim.language.slot import Slot

TAKE_ANOTHER = "The checkpoint is damaged; take an older one."
# The difference of two variances may be rounded to a little below zero.
ROUNDED_BELOW_ZERO = -1e-9


def check_form(owner: str, state_dict: Any) -> None:
    """Refuse what does not have the form of a state_dict.

    Raises:
        OptionError: where it lacks 'state' or 'param_groups', or they are not what torch writes there.
    """
    form = "a state_dict of an optimizer holds 'state', a dict, and 'param_groups', a list of dicts with 'params'."
    if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get("state"), dict):
        raise OptionError(f"{owner} cannot load this: {form}")
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
    ):
        raise OptionError(f"{owner} cannot load this: {form}")
    numbers = [index for group in groups for index in group["params"]]
    if not all(isinstance(index, int | str) for index in numbers) or len(set(numbers)) < len(numbers):
        raise OptionError(f"{owner} cannot load this: 'params' of its groups must be numbers, each of them once.")
    if not all(isinstance(state_dict["state"].get(index, {}), dict) for index in numbers):
        raise OptionError(f"{owner} cannot load this: the state of a parameter must be a dict of slots.")


def check(layout: StateLayout, state_dict: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """Refuse a state_dict that does not fit. With `partial` some parameters may have a slot that others lack.

    Returns:
        The state_dict without slots of other matrices than those of this optimizer.

    Raises:
        OptionError: for options that this class refuses, for state of a wrong shape or type, for values that a slot
            cannot hold, for a step counter that is not a whole number, and for a slot that only some parameters have.
    """
    owner = type(layout).__name__
    own, loaded = layout.param_groups, [{**group} for group in layout.param_groups]
    for i, group in enumerate(state_dict["param_groups"]):
        names = [name for name in group if name in layout.options and name not in STORAGE_OPTIONS]
        options = check_options({name: group[name] for name in names}, layout.options, f"{owner}, loading a checkpoint")
        if i < len(own):
            loaded[i].update({k: v for k, v in options.items() if k not in layout.matrix_options})
            layout.check_all({name: loaded[i][name] for name in layout.options if name in loaded[i]})
        for name in (name for name, slot in layout.slots.items() if slot.per == "optimizer" and name in group):
            _check_value(owner, name, layout.slots[name], group[name], torch.Size(()), "this optimizer")
            if why := _unfit(layout.slots[name], as_tensor(group[name]), torch.float64, None):
                raise OptionError(f"{owner} cannot load {name}: {why}. {TAKE_ANOTHER}")
    layout.check_groups([layout.options_of(group) for group in loaded])
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = layout.every_parameter()
    sizes, here = ([len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], own))
    if sizes != here and _are_named(own, state_dict["param_groups"]):
        raise OptionError(f"{owner} cannot load this checkpoint. {_what_it_was(own, state_dict['param_groups'])}")
    if len(order) != len(params):
        return state_dict  # torch raises the error
    if any(is_lazy(p) for _, p in params):
        raise OptionError(
            f"{owner} cannot load state for parameters that are not initialized: their layers are lazy and have seen "
            "no batch. Load the model first, or call it once."
        )
    layout.param_groups = loaded  # shapes and slots are those under the options of the file
    try:
        state_dict = matrix_slots.without_misfits(layout, state_dict)
        unfit = _check_parameters(layout, state_dict, order, own, partial)
    finally:
        layout.param_groups = own
    if any(is_sharded(p) for _, p in params):  # all ranks raise an error if one finds a bad value in its shard
        unfit = next((found for found in gathered(unfit) if found), "")
    if unfit:
        raise OptionError(
            f"{owner} cannot load {unfit}. The checkpoint is damaged, or its run was lost before; take an older one."
        )
    return state_dict


def _check_parameters(
    layout: StateLayout, state_dict: dict[str, Any], order: list[Any], own: list[dict[str, Any]], partial: bool
) -> str:
    """Refuse the state of a parameter that does not fit, and return in words the first that has bad values.

    Args:
        layout: The optimizer, with the options of the file.
        state_dict: The state_dict.
        order: The numbers of the parameters in it.
        own: The groups of the optimizer.
        partial: Whether some parameters may have a slot that others lack.
    """
    owner, loaded, params = type(layout).__name__, layout.param_groups, layout.every_parameter()
    saved_of: dict[tuple[str, ...], set[str]] = {}  # the saved slots, by the slots that a parameter needs
    unfit, was = "", _what_it_was(own, state_dict["param_groups"])
    for index, (i, p) in zip(order, params, strict=True):
        saved = present(state_dict["state"].get(index))
        needed = layout.slots_of(i, p)
        slots = {
            name: slot for name, slot in layout.all_slots().items() if name in saved and _is_held(slot, layout, i, p)
        }
        if not slots and "step" not in saved:
            continue
        _check_counter(owner, saved, p)
        for name, slot in slots.items():
            # FSDP1 gives each rank its shard, which for a slot per element has the shape of that of the parameter.
            of_matrix = slot.per == "matrix"
            shape = layout.shape_of(slot, i, p) if of_matrix else slot.shape_of(p.shape, layout.traits_of(i, p))
            whose = f"a parameter of shape {tuple(p.shape)}"
            _check_value(owner, name, slot, saved[name], shape, whose, p.dtype, was)
        unfit = unfit or _first_unfit(layout, i, p, saved, slots, loaded[i])
        has = {name for name in needed if name in saved}
        if saved_of.setdefault(needed, has) != has and not partial:
            name = min(saved_of[needed] ^ has)
            raise OptionError(
                f"{owner} cannot load state that has {name} for some parameters and not for one of shape "
                f"{tuple(p.shape)}. {TAKE_ANOTHER}"
            )
    return unfit


def warn_of_stopped_counters(owner: str, state_dict: dict[str, Any]) -> None:
    """Say where a saved step counter has a dtype in which it cannot count on."""
    for saved in state_dict["state"].values():
        step = saved.get("step")
        if isinstance(step, Tensor) and step.is_floating_point() and bool((step > 0) & (step + 1 == step)):
            warnings.warn(
                f"{owner} loads a step counter in {str(step.dtype).removeprefix('torch.')}, which stops at "
                f"{float(step):.0f}: the run may have taken more steps, and bias corrections stood still. It counts on "
                "from there, in float32.",
                stacklevel=8,
            )
            return


def present(saved: dict[str, Any] | None) -> dict[str, Any]:
    """The saved slots of a parameter that have a value: torch's SGD saves None before the first step."""
    return {name: value for name, value in (saved or {}).items() if value is not None}


def as_tensor(value: Any) -> Tensor:
    """A saved value as a tensor, whatever the default dtype and device are."""
    value = plain(value)
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


def _is_held(slot: Slot, layout: StateLayout, i: int, p: Tensor) -> bool:
    """Whether a parameter may have the slot: a row statistic needs rows, and a basis its axis."""
    if slot.per == "matrix" and not any(layout.slots[name] is slot for name in layout.slots_of(i, p)):
        return False
    return slot.without is None or layout.traits_of(i, p)[slot.without] is not None


def _check_counter(owner: str, saved: Mapping[str, Any], p: Tensor) -> None:
    """Refuse a step counter that is not a whole number of at least 0."""
    value = plain(saved.get("step", 0))
    counts = isinstance(value, Tensor) and not value.is_complex() and value.dtype != torch.bool and not value.is_meta
    if counts and value.numel() == 1:
        value = value.item()
    if not is_number(value) or not 0 <= value <= 2**53 or value != int(value):
        raise OptionError(
            f"{owner} cannot load the counter {shown(value)} of a parameter of shape {tuple(p.shape)}: it is a number "
            f"of steps. {TAKE_ANOTHER}"
        )


def _what_it_was(own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> str:
    """Words for why shapes may differ: other parameter groups, whose names are known, or another model."""
    here, there = ([(group.get("name"), len(group["params"])) for group in groups] for groups in (own, saved))
    if here == there or not _are_named(own, saved):
        return "Was it saved from another model?"
    mine, theirs = (", ".join(f"{name} ({count})" for name, count in groups) for groups in (here, there))
    return (
        f"It has the parameter groups {theirs}, and this optimizer {mine}: no_decay, groups or adamw of its spec were "
        "others, or the model was, or which of its layers were frozen. Give the optimizer those of the saved run. The "
        "checkpoint file of a Trainer loads with others too."
    )


def _are_named(*of: list[dict[str, Any]]) -> bool:
    """Whether all parameter groups have names."""
    return all(group.get("name") is not None for groups in of for group in groups)


def _check_value(
    owner: str,
    name: str,
    slot: Slot,
    value: Any,
    shape: torch.Size,
    whose: str,
    dtype: torch.dtype = torch.float32,
    was: str = "Was it saved from another model?",
) -> None:
    """Refuse a saved slot that is no number or tensor of numbers, or that has another shape."""
    value = plain(value)
    if not isinstance(value, Tensor):
        if not (is_number(value) and abs(value) < 2**1000 and slot.per in ("tensor", "optimizer")):
            raise OptionError(f"{owner} cannot load {name}: it is {shown(value)}, no tensor. {TAKE_ANOTHER}")
        return
    if value.shape != shape:
        raise OptionError(
            f"{owner} cannot load {name} of shape {tuple(value.shape)} for {whose}; it must be {tuple(shape)}. {was}"
        )
    if value.layout != torch.strided:
        raise OptionError(f"{owner} cannot load {name} of {whose}: it is sparse, and dense here. {TAKE_ANOTHER}")
    complexes = dtype.is_complex and slot.per == "element"
    if value.is_complex() != complexes or not (value.is_floating_point() or complexes):
        kind = "complex" if complexes else "real floating-point"
        raise OptionError(
            f"{owner} cannot load {name} of {whose}: it has the dtype {value.dtype}, and holds {kind} numbers here. "
            f"{TAKE_ANOTHER}"
        )


def _first_unfit(
    layout: StateLayout, i: int, p: Tensor, saved: Mapping[str, Any], slots: Mapping[str, Slot], group: dict[str, Any]
) -> str:
    """The first saved slot with a value that it cannot hold, in words; empty where there is none.

    Args:
        layout: The optimizer.
        i: The index of the parameter's group.
        p: The parameter.
        saved: Its saved slots.
        slots: The declarations of these slots.
        group: Its group with the options of the file.
    """
    if not logical_shape(p).numel():  # earlier versions wrote the means of no elements
        return ""
    started = "step" not in saved or float(saved["step"]) > 0
    h = {} if started else {**layout.options_of(group), **layout.traits_of(i, p)}
    for name, slot in slots.items():
        if local(as_tensor(saved[name])).is_meta and not p.is_meta:
            return f"{name} of a parameter of shape {tuple(logical_shape(p))}: it has no numbers, on the meta device"
        fixed = not started and name in layout.slots and not slot.copies
        start = slot.start(namespace(h)) if fixed else None
        if why := _unfit(slot, local(as_tensor(saved[name])), layout.slot_dtype(slot, p, i), start):
            return f"{name} of a parameter of shape {tuple(logical_shape(p))}: {why}"
    return ""


def _unfit(slot: Slot, values: Tensor, dtype: torch.dtype, start: float | None) -> str:
    """Why a slot cannot hold these values, in words; empty where it can.

    Args:
        slot: The slot.
        values: What was saved.
        dtype: The dtype of the slot.
        start: What it holds before the first step, where no step was taken; else None.
    """
    values = torch.view_as_real(values) if values.is_complex() else values
    if not values.numel() or values.is_meta:
        return ""
    low, high = map(float, torch.aminmax(values.float() if values.element_size() == 1 else values))
    if not (math.isfinite(low) and math.isfinite(high)):
        return "it holds NaN or infinity, which every later step would keep"
    most = torch.finfo(dtype).max
    if max(-low, high) > most:
        return f"it holds {max(-low, high):.3g}, and the largest number of {dtype} is {most:.3g}"
    if not slot.signed and low < (ROUNDED_BELOW_ZERO if slot.per in ("tensor", "optimizer") else 0):
        return f"it holds {low:.3g}, and is never negative"
    if start is not None and not low == high == start:
        return f"its parameter has taken no step, and it holds values other than {start:g}"
    return ""
