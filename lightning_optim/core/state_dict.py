"""State as it leaves and as it comes back: plain tensors in files, codes and exact types in memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.core.state_layout import STORAGE_OPTIONS, StateLayout
from lightning_optim.core.torch_files import TORCH_FLAGS
from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_dtensor, is_sharded, like, local, logical_shape, shard_of
from lightning_optim.distributed.ranks import gathered
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.errors import OptionError
from lightning_optim.language.options import check_options


def dequantized(optimizer: StateLayout, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict that torch made, with plain tensors in the place of codes.

    Codes become values on the CPU, one parameter after the other, so that a save takes no memory of the device for
    all of them. FSDP1 and FSDP2 take what they gather back to the device themselves, by units and by tensors.
    """
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    for index, (_, p) in zip(order, optimizer.every_parameter(), strict=True):
        state = state_dict["state"].get(index)
        if state is None:
            continue
        if is_flattened(p) and not p.numel() and shard_of(p).splits:
            del state_dict["state"][index]  # FSDP1 wants to hear of a tensor from those who hold some of it
            continue
        quantized = [name for name, value in state.items() if isinstance(value, storage.Quantized)]
        values = {name: like(value, p) for name, value in storage.read(state, quantized).items()}
        # FSDP2 asks for a state_dict before the first step too, to load a file into it, and wants all on one device.
        if not (is_dtensor(p) and int(state["step"]) == 0):
            values = {name: value.cpu() for name, value in values.items()}
        found = {**state, **values}
        state_dict["state"][index] = _of_one_type(found) if is_flattened(p) else found
    return state_dict


def _of_one_type(state: dict[str, Any]) -> dict[str, Any]:
    """The state with its tensors in the widest of their types, as FSDP1 wants them."""
    wide = [name for name, value in state.items() if isinstance(value, Tensor) and value.dim()]
    types = {state[name].dtype for name in wide}
    if len(types) < 2:
        return state
    widest = torch.float32 if torch.float64 not in types else torch.float64
    return {**state, **{name: state[name].cpu().to(widest) for name in wide}}


def renumbered(state_dict: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """A state_dict in which parameters have the numbers of their places in the model; as it is where none is known."""
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    if len(places) != len(order):
        return state_dict
    number = dict(zip(order, places, strict=True))
    groups = [{**group, "params": [number[i] for i in group["params"]]} for group in state_dict["param_groups"]]
    state = {number.get(i, i): value for i, value in state_dict["state"].items()}
    return {**state_dict, "state": state, "param_groups": groups}


def check(optimizer: StateLayout, state_dict: dict[str, Any]) -> None:
    """Refuse what cannot be meant, while nothing has changed yet.

    Raises:
        OptionError: for state of a wrong shape or with NaN or infinity in it, for a counter that counts nothing, for a
            slot that is there for some parameters only, and for options that this class refuses.
    """
    owner = type(optimizer).__name__
    if not all(isinstance(state_dict.get(key), kind) for key, kind in (("state", dict), ("param_groups", list))):
        raise OptionError(f"{owner} cannot load this: a state_dict of an optimizer holds 'state' and 'param_groups'.")
    for group in state_dict["param_groups"]:
        check_options(
            {k: v for k, v in group.items() if k in optimizer.options and k not in STORAGE_OPTIONS},
            optimizer.options,
            owner,
        )
        for name in (name for name, slot in optimizer.slots.items() if slot.per == "optimizer" and name in group):
            if not math.isfinite(float(group[name])):
                raise OptionError(f"{owner} cannot load {name}={float(group[name])!r}: the checkpoint is damaged.")
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    own = optimizer.every_parameter()
    if len(order) != len(own):
        return  # torch says so
    known: dict[tuple[str, ...], set[str]] = {}
    infinite = ""
    for index, (i, p) in zip(order, own, strict=True):
        saved = present(state_dict["state"].get(index))
        if not saved:
            continue
        step = float(saved.get("step", 0))
        if not (math.isfinite(step) and step >= 0 and step == int(step)):
            raise OptionError(
                f"{owner} cannot load the counter {step!r} of a parameter of shape {tuple(p.shape)}: it is a number of "
                "steps. The checkpoint is damaged; take an older one."
            )
        _check_slots(optimizer, i, p, saved)
        infinite = infinite or _not_finite(optimizer, saved, p)
        needed = optimizer.slots_of(i, p)
        has = {name for name in needed if name in saved}
        if known.setdefault(needed, has) != has:
            name = min(known[needed] ^ has)
            raise OptionError(
                f"{owner} cannot load state that has {name} for some parameters and not for one of shape "
                f"{tuple(p.shape)}. The checkpoint is damaged; take an older one."
            )
    if any(is_sharded(p) for _, p in own):  # what is wrong may be in the shard of one rank
        infinite = next((found for found in gathered(infinite) if found), "")
    if infinite:
        raise OptionError(
            f"{owner} cannot load {infinite}: it holds NaN or infinity, with which no step is of use. The checkpoint "
            "is damaged, or its run was lost before; take an older one."
        )


def _not_finite(optimizer: StateLayout, saved: dict[str, Any], p: Tensor) -> str:
    """The first of the saved slots that holds what is no number, in words; empty where none does."""
    for name in (name for name in optimizer.all_slots() if isinstance(saved.get(name), Tensor)):
        if not local(saved[name]).isfinite().all():
            return f"{name} of a parameter of shape {tuple(logical_shape(p))}"
    return ""


def _check_slots(optimizer: StateLayout, i: int, p: Tensor, saved: dict[str, Any]) -> None:
    slots, traits = optimizer.all_slots(), optimizer.traits_of(i, p)
    for name, value in saved.items():
        without = slots[name].without if name in slots else None
        if name not in slots or (without is not None and traits[without] is None):
            continue
        shape = slots[name].shape(p.shape, traits)
        if not isinstance(value, Tensor | int | float):
            raise OptionError(
                f"{type(optimizer).__name__} cannot load {name}: it is a {type(value).__name__}, no tensor."
            )
        if torch.as_tensor(value).shape != shape:
            raise OptionError(
                f"{type(optimizer).__name__} cannot load {name} of shape {tuple(torch.as_tensor(value).shape)} for a "
                f"parameter of shape {tuple(p.shape)}; it must be {tuple(shape)}. Was it saved from another model?"
            )


def present(saved: dict[str, Any] | None) -> dict[str, Any]:
    """The saved slots of a parameter that hold something: torch's SGD writes None for one that it has not made yet."""
    return {name: value for name, value in (saved or {}).items() if value is not None}


def adopt(
    optimizer: StateLayout, state_dict: dict[str, Any], before: list[dict[str, Any]], other_groups: bool = False
) -> None:
    """Make the groups that torch has just loaded, and the state that was saved, the optimizer's own.

    Args:
        optimizer: Has the groups of the state_dict, and no state.
        state_dict: What is loaded; it passed `check`.
        before: The groups of the optimizer before, without parameters.
        other_groups: Whether the checkpoint had other groups than the optimizer, which keeps its own.
    """
    owner = type(optimizer).__name__
    foreign = other_groups
    for group, own in zip(optimizer.param_groups, before, strict=True):
        for key in TORCH_FLAGS:
            foreign |= group.pop(key, None) is not None
        group.update({k: v for k, v in own.items() if k not in group or k in STORAGE_OPTIONS})
        names = [name for name in optimizer.options if name in group]
        group.update(check_options({name: group[name] for name in names}, optimizer.options, owner))
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    taken: set[str] = set()
    fresh: set[str] = set()
    left: set[str] = set()
    for index, (i, p) in zip(order, optimizer.every_parameter(), strict=True):
        saved = present(state_dict["state"].get(index))
        if saved:
            _restore(optimizer, p, i, saved)
            taken.update(name for name in saved if name in optimizer.state[p])
            left.update(name for name in saved if name not in optimizer.state[p])
            needed = {*optimizer.state[p], *optimizer.slots_of_stages(i, p)}
            fresh.update(name for name in needed if name not in saved)
    if fresh or left or foreign:
        takes = f"{', '.join(sorted(taken)) or 'nothing'} taken"
        starts = f"; {', '.join(sorted(fresh))} starts fresh" if fresh else ""
        drops = f"; {', '.join(sorted(left))} of the checkpoint is left out" if left else ""
        whose = "of torch.optim" if foreign else "with other state"
        keeps = "; options are those of this optimizer, as its parameter groups are others" if other_groups else ""
        said = f"{owner} loads a checkpoint {whose}: {takes}{starts}{drops}{keeps}."
        if fresh or left:
            warnings.warn(said, stacklevel=7)
        else:
            # Here, since it takes seconds to import, which an optimizer alone does not.
            from lightning.pytorch.utilities import rank_zero_info

            rank_zero_info(said)


def _restore(optimizer: StateLayout, p: Tensor, i: int, saved: dict[str, Any]) -> None:
    """Put the saved slots of one parameter in place, in the storage that this optimizer keeps them in."""
    slots, state = optimizer.all_slots(), optimizer.state[p]
    state.clear()
    optimizer.start_state(p, i)
    state["step"].fill_(float(saved.get("step", 0)))
    quantized: dict[str, Tensor] = {}
    for name in [name for name in saved if name in slots]:  # in an order that is the same on every rank
        here = p.device if slots[name].per == "element" else torch.device("cpu")
        dtype = optimizer.slot_dtype(slots[name], p, i)
        values = torch.as_tensor(saved[name]).to(dtype=dtype, device=here, copy=True)
        if isinstance(state.get(name), storage.Quantized):
            quantized[name] = local(values).reshape(-1)
        else:
            state[name] = values
    storage.write(state, quantized, int(state["step"]))


def agree_on_counters(optimizer: StateLayout) -> None:
    """Give pieces without elements the counters that others loaded for them.

    FSDP1 loads no state where there is no element, and parameters are sorted by their counters for sums over ranks.
    """
    cut = [(i, p) for i, p in optimizer.every_parameter() if is_flattened(p) and shard_of(p).splits]
    if not cut:
        return
    steps = [float(optimizer.state.get(p, {}).get("step", 0)) for _, p in cut]
    groups = [shard_of(p).process_groups for _, p in cut]
    found = Reductions([p for _, p in cut]).reduce(steps, groups, "tensor", "max")
    for (i, p), step in zip(cut, found, strict=True):
        if not p.numel() and step > 0:
            optimizer.start_state(p, i)
            optimizer.state[p]["step"].fill_(float(step))
