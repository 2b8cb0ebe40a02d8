"""Converts state for `state_dict` and `load_state_dict`: plain tensors in a file, quantized slots in the optimizer."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim import storage
from lightning_optim.core.state_layout import STORAGE_OPTIONS, StateLayout
from lightning_optim.core.torch_files import TORCH_FLAGS
from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_dtensor, is_sharded, like, local, logical_shape, shard_of
from lightning_optim.distributed.ranks import gathered
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.errors import OptionError
from lightning_optim.language.options import check_options


def dequantize(layout: StateLayout, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Replace the quantized slots in a state_dict of torch by plain tensors.

    Dequantized values are those of now. So all that is beside them is copied too: counters, other slots, tensors in
    groups. Without quantized slots the tensors are those of the optimizer, which later steps change, as in torch.

    Values are moved to the CPU one parameter after another, so that a save does not need device memory for all of them.
    FSDP1 and FSDP2 move what they gather back to the device, one unit or one tensor at a time.
    """
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    slots = (value for state in state_dict["state"].values() for value in state.values())
    copies = any(isinstance(value, storage.Quantized) for value in slots)
    if copies:
        state_dict["param_groups"] = copy.deepcopy(state_dict["param_groups"])
    for index, (_, p) in zip(order, layout.every_parameter(), strict=True):
        state = state_dict["state"].get(index)
        if state is None:
            continue
        if is_flattened(p) and not p.numel() and shard_of(p).splits:
            del state_dict["state"][index]  # FSDP1 expects state from the ranks that hold elements
            continue
        quantized = [name for name, value in state.items() if isinstance(value, storage.Quantized)]
        values = {name: like(value, p) for name, value in storage.read(state, quantized).items()}
        # Before the first step FSDP2 loads a file into this state_dict, and needs all of it on one device.
        if not (is_dtensor(p) and int(state["step"]) == 0):
            values = {name: value.cpu() for name, value in values.items()}
            if copies:
                values.update({name: _copy(value) for name, value in state.items() if name not in values})
        found = {**state, **values}
        state_dict["state"][index] = _in_one_dtype(found) if is_flattened(p) else found
    return state_dict


def _copy(value: Any) -> Any:
    """A copy of a slot, on the CPU."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    there = value.cpu()
    return there.clone() if local(there).data_ptr() == local(value).data_ptr() else there


def _in_one_dtype(state: dict[str, Any]) -> dict[str, Any]:
    """The state with all tensors in the widest of their dtypes: FSDP1 needs a single dtype."""
    names = [name for name, value in state.items() if isinstance(value, Tensor) and value.dim()]
    dtypes = {state[name].dtype for name in names}
    if len(dtypes) < 2:
        return state
    widest = torch.float32 if torch.float64 not in dtypes else torch.float64
    return {**state, **{name: state[name].cpu().to(widest) for name in names}}


def renumber(state_dict: dict[str, Any], model_order: Sequence[int]) -> dict[str, Any]:
    """A state_dict that numbers parameters by their index in the model; unchanged where that is unknown."""
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    if len(model_order) != len(order):
        return state_dict
    number = dict(zip(order, model_order, strict=True))
    groups = [{**group, "params": [number[i] for i in group["params"]]} for group in state_dict["param_groups"]]
    state = {number.get(i, i): value for i, value in state_dict["state"].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def check(layout: StateLayout, state_dict: dict[str, Any]) -> None:
    """Refuse a state_dict that does not fit, before anything has changed.

    Raises:
        OptionError: for state of a wrong shape or that is not finite, for a step counter that is not a whole number,
        for
            a slot that only some parameters have, and for options that this class refuses.
    """
    owner = type(layout).__name__
    if not all(isinstance(state_dict.get(key), kind) for key, kind in (("state", dict), ("param_groups", list))):
        raise OptionError(f"{owner} cannot load this: a state_dict of an optimizer holds 'state' and 'param_groups'.")
    for group in state_dict["param_groups"]:
        check_options(
            {k: v for k, v in group.items() if k in layout.options and k not in STORAGE_OPTIONS},
            layout.options,
            owner,
        )
        for name in (name for name, slot in layout.slots.items() if slot.per == "optimizer" and name in group):
            if not math.isfinite(float(group[name])):
                raise OptionError(f"{owner} cannot load {name}={float(group[name])!r}: the checkpoint is damaged.")
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = layout.every_parameter()
    if len(order) != len(params):
        return  # torch raises the error
    if any(is_lazy(p) for _, p in params):
        raise OptionError(
            f"{owner} cannot load state for parameters that are not initialized: their layers are lazy and have seen "
            "no batch. Load the model first, or call it once."
        )
    saved_of: dict[tuple[str, ...], set[str]] = {}  # the saved slots, by the slots that a parameter needs
    not_finite = ""
    for index, (i, p) in zip(order, params, strict=True):
        saved = present(state_dict["state"].get(index))
        if not saved:
            continue
        step = float(saved.get("step", 0))
        if not (math.isfinite(step) and step >= 0 and step == int(step)):
            raise OptionError(
                f"{owner} cannot load the counter {step!r} of a parameter of shape {tuple(p.shape)}: it is a number of "
                "steps. The checkpoint is damaged; take an older one."
            )
        _check_slots(layout, i, p, saved)
        not_finite = not_finite or _first_not_finite(layout, saved, p)
        needed = layout.slots_of(i, p)
        has = {name for name in needed if name in saved}
        if saved_of.setdefault(needed, has) != has:
            name = min(saved_of[needed] ^ has)
            raise OptionError(
                f"{owner} cannot load state that has {name} for some parameters and not for one of shape "
                f"{tuple(p.shape)}. The checkpoint is damaged; take an older one."
            )
    if any(is_sharded(p) for _, p in params):  # all ranks raise an error if one finds NaN in its shard
        not_finite = next((found for found in gathered(not_finite) if found), "")
    if not_finite:
        raise OptionError(
            f"{owner} cannot load {not_finite}: it holds NaN or infinity, which every later step would keep. The "
            "checkpoint is damaged, or its run was lost before; take an older one."
        )


def _first_not_finite(layout: StateLayout, saved: dict[str, Any], p: Tensor) -> str:
    """The first saved slot with NaN or infinity, in words; empty where all are finite."""
    if not logical_shape(p).numel():  # earlier versions wrote the means of no elements
        return ""
    for name in (name for name in layout.all_slots() if isinstance(saved.get(name), Tensor)):
        if not local(saved[name]).isfinite().all():
            return f"{name} of a parameter of shape {tuple(logical_shape(p))}"
    return ""


def _check_slots(layout: StateLayout, i: int, p: Tensor, saved: dict[str, Any]) -> None:
    """Refuse a saved slot that is not a number or has a wrong shape."""
    slots, traits = layout.all_slots(), layout.traits_of(i, p)
    for name, value in saved.items():
        without = slots[name].without if name in slots else None
        if name not in slots or (without is not None and traits[without] is None):
            continue
        shape = slots[name].shape(p.shape, traits)
        if not isinstance(value, Tensor | int | float):
            raise OptionError(f"{type(layout).__name__} cannot load {name}: it is a {type(value).__name__}, no tensor.")
        if (found := value.shape if isinstance(value, Tensor) else torch.Size()) != shape:
            raise OptionError(
                f"{type(layout).__name__} cannot load {name} of shape {tuple(found)} for a "
                f"parameter of shape {tuple(p.shape)}; it must be {tuple(shape)}. Was it saved from another model?"
            )


def warn_of_stopped_counters(layout: StateLayout, state_dict: dict[str, Any]) -> None:
    """Say where a saved step counter has a dtype in which it cannot count on."""
    for saved in state_dict["state"].values():
        step = saved.get("step")
        if isinstance(step, Tensor) and step.is_floating_point() and bool((step > 0) & (step + 1 == step)):
            warnings.warn(
                f"{type(layout).__name__} loads a step counter in {str(step.dtype).removeprefix('torch.')}, which "
                f"stops at {float(step):.0f}: the run may have taken more steps, and bias corrections stood still. It "
                "counts on from there, in float32.",
                stacklevel=7,
            )
            return


def present(saved: dict[str, Any] | None) -> dict[str, Any]:
    """The saved slots of a parameter that have a value: torch's SGD saves None before the first step."""
    return {name: value for name, value in (saved or {}).items() if value is not None}


def adopt(
    layout: StateLayout, state_dict: dict[str, Any], before: list[dict[str, Any]], other_groups: bool = False
) -> None:
    """Complete a load: convert options to their types and saved slots to the formats of this optimizer.

    Args:
        layout: The optimizer, with the parameter groups of the state_dict and without state.
        state_dict: The state_dict, which has passed `check`.
        before: The parameter groups before the load, without parameters.
        other_groups: Whether the file has other parameter groups, so that options stay those of this optimizer.
    """
    owner = type(layout).__name__
    warn_of_stopped_counters(layout, state_dict)
    foreign = other_groups
    for group, own in zip(layout.param_groups, before, strict=True):
        for key in TORCH_FLAGS:
            foreign |= group.pop(key, None) is not None
        group.update({k: v for k, v in own.items() if k not in group or k in STORAGE_OPTIONS})
        names = [name for name in layout.options if name in group]
        group.update(check_options({name: group[name] for name in names}, layout.options, owner))
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    taken: set[str] = set()
    fresh: set[str] = set()
    left: set[str] = set()
    for index, (i, p) in zip(order, layout.every_parameter(), strict=True):
        saved = present(state_dict["state"].get(index))
        if saved:
            _restore(layout, p, i, saved)
            taken.update(name for name in saved if name in layout.state[p])
            left.update(name for name in saved if name not in layout.state[p])
            needed = {*layout.state[p], *layout.slots_of_stages(i, p)}
            fresh.update(name for name in needed if name not in saved)
    if fresh or left or foreign:
        takes = f"{', '.join(sorted(taken)) or 'nothing'} taken"
        starts = f"; {', '.join(sorted(fresh))} starts fresh" if fresh else ""
        drops = f"; {', '.join(sorted(left))} of the checkpoint is left out" if left else ""
        source = "of torch.optim" if foreign else "with other state"
        keeps = "; options are those of this optimizer, as its parameter groups are others" if other_groups else ""
        message = f"{owner} loads a checkpoint {source}: {takes}{starts}{drops}{keeps}."
        if fresh or left:
            warnings.warn(message, stacklevel=7)
        else:
            # Imported here: it takes seconds, and an optimizer alone does not need it.
            from lightning.pytorch.utilities import rank_zero_info

            rank_zero_info(message)


def _restore(layout: StateLayout, p: Tensor, i: int, saved: dict[str, Any]) -> None:
    """Store the saved slots of one parameter in the formats of this optimizer."""
    slots, state = layout.all_slots(), layout.state[p]
    state.clear()
    layout.start_state(p, i)
    state["step"].fill_(float(saved.get("step", 0)))
    quantized: dict[str, Tensor] = {}
    held = logical_shape(p).numel() > 0  # without elements, slots keep their first values
    for name in [name for name in saved if name in slots and held]:  # in the same order on every rank
        here = p.device if slots[name].per == "element" else torch.device("cpu")
        dtype = layout.slot_dtype(slots[name], p, i)
        value = saved[name]
        values = (
            value.to(dtype=dtype, device=here, copy=True)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=dtype, device=here)
        )
        if isinstance(state.get(name), storage.Quantized):
            quantized[name] = local(values).reshape(-1)
        else:
            state[name] = values
    storage.write(state, quantized, int(state["step"]))


def agree_on_counters(layout: StateLayout) -> None:
    """Set the step counters of shards without elements to those that other ranks have loaded.

    FSDP1 loads no state for a shard without elements. But all ranks must sort parameters alike, by their counters, so
    that their all-reduces match.
    """
    split = [(i, p) for i, p in layout.every_parameter() if is_flattened(p) and shard_of(p).splits]
    if not split:
        return
    steps = [float(layout.state.get(p, {}).get("step", 0)) for _, p in split]
    groups = [shard_of(p).process_groups for _, p in split]
    found = Reductions([p for _, p in split]).reduce(steps, groups, "tensor", "max")
    for (i, p), step in zip(split, found, strict=True):
        if not p.numel() and step > 0:
            layout.start_state(p, i)
            layout.state[p]["step"].fill_(float(step))
