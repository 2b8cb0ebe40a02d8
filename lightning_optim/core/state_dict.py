"""Converts state for `state_dict` and `load_state_dict`: plain tensors in a file, quantized slots in the optimizer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.core import matrix_slots
from lightning_optim.core.checkpoint_source import CLASS_KEY, DEVICE_KEY, Loaded, Source, page_of, slots_elsewhere
from lightning_optim.core.first_values import first_value
from lightning_optim.core.parameter_groups import TORCH_FLAGS
from lightning_optim.core.state_check import as_tensor, present, warn_of_stopped_counters
from lightning_optim.core.state_layout import RAW, STORAGE_OPTIONS, StateLayout
from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_dtensor, like, local, logical_shape, shard_of
from lightning_optim.distributed.plain import laid_out_like
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.language.options import check_options, plain

# Options that folders of earlier versions lack; off, they are not asked for.
LATER = ("cautious", "cautious_decay")


def dequantize(
    layout: StateLayout, state_dict: dict[str, Any], gathered: dict[matrix_slots.Key, Tensor] | None = None
) -> dict[str, Any]:
    """Replace the quantized slots in a state_dict of torch by plain tensors.

    Dequantized values are those of now. So all that is beside them is copied too: counters, other slots, tensors in
    groups. Without quantized slots the tensors are those of the optimizer, which later steps change, as in torch.

    Values are moved to the CPU one parameter after another, so that a save does not need device memory for all of them.
    FSDP1 and FSDP2 move what they gather back to the device, one unit or one tensor at a time.
    """
    filled_by_fsdp2 = _is_filled_by_fsdp2(layout)
    for group in state_dict["param_groups"]:
        group.update({name: plain(group[name]) for name in layout.options if name in group})
        if not filled_by_fsdp2:
            group[CLASS_KEY] = page_of(type(layout))
        for name in LATER if filled_by_fsdp2 else ():
            if not group.get(name):
                group.pop(name, None)
    _show_device(layout, state_dict)
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    held = (state_dict["state"].get(index, {}) for index in order)
    of_matrices = matrix_slots.of_file(layout, gathered)
    copies = any(isinstance(value, storage.Quantized) for slots in held for value in slots.values())
    if copies:
        state_dict["param_groups"] = copy.deepcopy(state_dict["param_groups"])
    every = layout.every_parameter()
    of_flat = {name for i, p in every if is_flattened(p) for name in layout.slots_of(i, p)}
    for_all = {name for name in of_flat if layout.slots[name].per == "element"}
    for index, (_, p) in zip(order, every, strict=True):
        state = state_dict["state"].get(index)
        if state is None:
            continue
        if is_flattened(p) and not p.numel() and shard_of(p).splits:
            del state_dict["state"][index]  # FSDP1 expects state from the ranks that hold elements
            continue
        quantized = [name for name, value in state.items() if isinstance(value, storage.Quantized)]
        values = {name: like(value, p) for name, value in storage.read_shaped(state, quantized).items()}
        if is_dtensor(p) and layout.evaluates() and "raw" not in state:  # FSDP2 loads no slot that is not there
            values["raw"] = first_value(RAW, p, layout.slot_dtype(RAW, p, 0), {})
        # Before the first step FSDP2 loads a file into this state_dict, and needs all of it on one device.
        if not (is_dtensor(p) and int(state.get("step", 0)) == 0):
            values = {name: value.cpu() for name, value in values.items()}
            if copies:
                values.update({name: _copy(value) for name, value in state.items() if name not in values})
        values.update({name: of_matrices[p, name] for name in state if (p, name) in of_matrices})
        found = {**state, **values}
        state_dict["state"][index] = _in_one_dtype(_with_all(for_all, found)) if is_flattened(p) else found
    return state_dict


def _with_all(names: set[str], state: dict[str, Any]) -> dict[str, Any]:
    """The state with zeros for what other parameters have: FSDP1 needs the same slots for all of a unit."""
    like = next((value for value in state.values() if isinstance(value, Tensor) and value.dim()), None)
    if like is None:
        return state
    return {**state, **{name: torch.zeros_like(like) for name in sorted(names - state.keys())}}


def _copy(value: Any) -> Any:
    """A copy of a slot, on the CPU."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    there = value.cpu()
    return there.clone() if local(there).data_ptr() == local(value).data_ptr() else there


def _show_device(layout: StateLayout, state_dict: dict[str, Any]) -> None:
    """Put one element on the device of the parameters into a group, where FSDP2 would find no tensor that tells it.

    It reads the device for a full file off the first tensor with an axis, and a state of single numbers has none.
    """
    sharded = [p for _, p in layout.every_parameter() if is_dtensor(p)]
    held = (value for slots in state_dict["state"].values() if isinstance(slots, dict) for value in slots.values())
    if sharded and not any(isinstance(value, storage.Quantized) or getattr(value, "ndim", 0) for value in held):
        device = local(sharded[0]).device
        state_dict["param_groups"][0][DEVICE_KEY] = torch.zeros(1, dtype=torch.float32, device=device)


def _is_filled_by_fsdp2(layout: StateLayout) -> bool:
    """Whether FSDP2 may load a file into this state_dict, whose keys a folder must have, an early one too."""
    params = [p for _, p in layout.every_parameter()]
    return any(map(is_dtensor, params)) and not any(float(layout.state.get(p, {}).get("step", 0)) for p in params)


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


def adopt(layout: StateLayout, state_dict: dict[str, Any], before: list[dict[str, Any]], source: Source) -> None:
    """Complete a load: convert options to their types and saved slots to the formats of this optimizer.

    Args:
        layout: The optimizer, with the parameter groups of the state_dict and without state of its parameters.
        state_dict: The state_dict, which has passed `check`.
        before: The parameter groups before the load, without parameters.
        source: Where the state_dict comes from.
    """
    owner = type(layout).__name__
    warn_of_stopped_counters(owner, state_dict)
    device = next((local(p).device for _, p in layout.every_parameter()), torch.device("cpu"))
    shared = [name for name, slot in layout.slots.items() if slot.per == "optimizer"]
    for group, own in zip(layout.param_groups, before, strict=True):
        for key in (*TORCH_FLAGS, CLASS_KEY, DEVICE_KEY):
            group.pop(key, None)
        stay = (*STORAGE_OPTIONS, *layout.matrix_options)
        kept = {k: v for k, v in own.items() if (k not in group and k not in shared) or k in stay}
        group.update(kept)
        names = [name for name in layout.options if name in group]
        group.update({name: as_tensor(group[name]).to(device, torch.float64) for name in shared if name in group})
        group.update(check_options({name: group[name] for name in names}, layout.options, owner))
    saved_in_group = {name for group in state_dict["param_groups"] for name in group}
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    loaded = Loaded()
    for index, (i, p) in zip(order, layout.every_parameter(), strict=True):
        saved = present(state_dict["state"].get(index))
        if saved:
            _restore(layout, p, i, saved, loaded)
    if loaded.taken or loaded.fresh:
        loaded.fresh.update(name for name in shared if name in layout.param_groups[0] and name not in saved_in_group)
    said = loaded.sentence(owner, source)
    if loaded.fresh or loaded.left or source.other_class:
        warnings.warn(said, stacklevel=8)
    elif not source.is_own or source.keeps_options:
        # Imported here: it takes seconds, and an optimizer alone does not need it.
        from lightning.pytorch.utilities import rank_zero_info

        rank_zero_info(said)


def _restore(layout: StateLayout, p: Tensor, i: int, saved: dict[str, Any], loaded: Loaded) -> None:
    """Store the saved slots of one parameter in the formats of this optimizer, and note what became of each."""
    slots, state = layout.all_slots(), layout.state[p]
    state.clear()
    if layout.matrix_options:
        saved, left_by_rule = _of_rule(layout, p, i, saved)
        loaded.left |= left_by_rule
    unknown = {name for name in saved if name != "step" and name not in slots}
    left = unknown & slots_elsewhere() if unknown else set()
    foreign = {name: saved[name] for name in saved if name in unknown - left}
    if len(foreign) < len(saved):
        layout.start_state(p, i)
        count = float(saved.get("step", 0))
        if count and any(name not in saved and name in slots and slots[name].spans_all_steps for name in state):
            loaded.fresh |= state.keys()  # what begins now under an old counter would be taken for a whole one
            loaded.left |= left | (saved.keys() & slots.keys())
            state.update({name: _as_torch_casts(value, p) for name, value in foreign.items()})
            return
        state["step"].fill_(count)
    counter = {"step"} & saved.keys() & state.keys()
    taken = {name: saved[name] for name in saved if name in slots and _can_be_quantized_beside(saved, state.get(name))}
    if not matrix_slots.are_all_in(layout, saved, i, p):  # its bases and its second moment belong together
        taken = {name: value for name, value in taken.items() if name not in layout.slots}
        state["step"].zero_()
        counter = set()
    quantized: dict[str, Tensor] = {}
    values_of = taken if logical_shape(p).numel() else {}  # without elements, slots keep their first values
    for name, value in values_of.items():  # in the same order on every rank
        slot = layout.slot(name, i, p)
        if slot.per == "matrix":
            value = matrix_slots.own_part(layout, slot, i, p, as_tensor(value))
        dtype = layout.slot_dtype(slot, p, i)
        values = as_tensor(value).to(dtype=dtype, device=p.device, copy=True)
        if isinstance(state.get(name), storage.Quantized):
            quantized[name] = local(values)
        else:
            state[name] = values if slot.per == "matrix" else laid_out_like(values, p)
    for name, stored in state.items():  # a slot is written whenever its partner is
        if isinstance(stored, storage.Quantized) and name not in quantized and stored.format.partner in quantized:
            quantized[name] = torch.zeros_like(quantized[stored.format.partner])
    if quantized:
        storage.write_shaped(state, quantized, int(state["step"]))
    loaded.taken |= taken.keys() | counter
    loaded.left |= left
    loaded.fresh |= {*state, *layout.slots_of_stages(i, p)} - taken.keys() - counter
    state.update({name: _as_torch_casts(value, p) for name, value in foreign.items()})


def _of_rule(layout: StateLayout, p: Tensor, i: int, saved: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The saved slots that the rule of a parameter uses, and the names of others that hold something.

    Zeros are what FSDP1 was given for a slot that the parameter did not have.
    """
    own = {*layout.slots_of(i, p), *layout.all_slots().keys() - layout.slots.keys()}
    holds = _holding(p, saved)
    padding = (
        {name for name, slot in layout.slots.items() if slot.mean_square_by and name not in holds} if holds else set()
    )
    unused = (saved.keys() & layout.slots.keys()) - own
    kept = {
        name: value for name, value in saved.items() if name not in unused | (padding if "exp_avg" in holds else set())
    }
    return kept, unused & holds


def _holding(p: Tensor, saved: dict[str, Any]) -> set[str]:
    """The names of the saved slots that are not zero everywhere. All ranks that share a DTensor must call it."""
    names = sorted(name for name, value in saved.items() if isinstance(value, Tensor))
    found: list[Any] = [float(local(saved[name]).any()) for name in names]
    if is_dtensor(p) and names:
        found = Reductions([p]).reduce(found, [shard_of(p).process_groups] * len(names), "tensor", "max")
    return {name for name, held in zip(names, found, strict=True) if held}


def _can_be_quantized_beside(saved: dict[str, Any], slot: Any) -> bool:
    """Whether the file holds the partner too, without which a quantized slot cannot be written."""
    return not isinstance(slot, storage.Quantized) or slot.format.partner is None or slot.format.partner in saved


def _as_torch_casts(value: Any, p: Tensor) -> Any:
    """What another program keeps in the state of a parameter: a copy on its device, in its dtype, as torch loads it."""
    if isinstance(value, Tensor):
        dtype = p.dtype if p.is_floating_point() and value.is_floating_point() else value.dtype
        return value.to(device=p.device, dtype=dtype, copy=True)
    return copy.deepcopy(value)


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
