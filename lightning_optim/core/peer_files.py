"""Files of other libraries, whose counters and moments stand in other places or under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core import muon_files, soap_files
from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.placement import is_dtensor

# What other libraries call a slot: its name here, and the factor of its values.
RENAMED = {
    **{"neg_pre_grad": ("prev_grad", -1.0), "pre_grad": ("prev_grad", 1.0)},  # Adan of its authors and of timm
    "exp_avg_fast": ("exp_avg", 1.0),  # AdEMAMix of its authors
}
# Adafactor of fairseq and transformers: the slot here, and the axis along which it has size 1 here.
FACTORS = {"exp_avg_sq_row": ("row_var", -1), "exp_avg_sq_col": ("col_var", -2)}
# bitsandbytes: the slots that its first state can be, in the order of preference.
FIRST = ("exp_avg", "square_avg", "momentum_buffer")
# Schedule-Free of its authors: numbers of a group, beside its counter k and the rate of now.
NUMBERS = ("weight_sum", "lr_max")
# Prodigy of its authors: numbers of every group that are one here, and numbers that are none here.
OF_PRODIGY, NOT_OF_PRODIGY = ("d", "d_max", "d_numerator"), ("k", "d_denom", "d_hat", "fsdp_in_use", "slice_p")
PACKED = "__bnb_optimizer_quant_state__"


def translated(layout: StateLayout, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict in the words of this package; the same object where it needs no change.

    It moves a step counter of a parameter group (apex, TransformerEngine, timm, the authors' Adan), and what else
    schedulefree keeps there, to the parameters. It translates names of slots, and codes of bitsandbytes and torchao. A
    momentum without a counter has one step.

    Args:
        layout: The optimizer.
        state_dict: A state_dict of the right form.
    """
    muon_files.refuse_half(layout, state_dict)
    state = {key: _slots(layout, slots) for key, slots in state_dict["state"].items()}
    groups: list[dict[str, Any]] = []
    for group in state_dict["param_groups"]:
        group = soap_files.group_of(layout, group)
        group = _of_prodigy(layout, _of_schedule_free(layout, group, state), state, is_first=not groups)
        group = muon_files.translated(layout, group, state)
        held = [index for index in group["params"] if isinstance(state.get(index), dict) and state[index]]
        without = [index for index in held if "step" not in state[index]]
        if "step" in group and "step" not in layout.options and len(without) == len(held):
            for index in without:
                state[index] = {"step": group["step"], **state[index]}
            group = {key: value for key, value in group.items() if key != "step"}
        for index in held:  # torch.optim.SGD counts no steps
            of_sgd = "momentum_buffer" in layout.slots and "state_bits" not in group and "step" not in state[index]
            if of_sgd and state[index].get("momentum_buffer") is not None:
                state[index] = {"step": 1.0, **state[index]}
        groups.append(group)
    same = all(state[key] is slots for key, slots in state_dict["state"].items())
    if same and all(new is old for new, old in zip(groups, state_dict["param_groups"], strict=True)):
        return state_dict
    return {**state_dict, "state": state, "param_groups": groups}


def _of_prodigy(layout: StateLayout, group: Any, state: dict[Any, Any], is_first: bool) -> Any:
    """A group of prodigyopt, whose d is in each group, with slots in the shape of the parameter; else the same object.

    A parameter that was zero when it began has a single 0 as p0 there. Also ADOPT's name for decoupled weight decay.
    """
    if "decouple" in group and "decoupled" in layout.options:
        group = {"decoupled" if key == "decouple" else key: value for key, value in group.items()}
    if not {*OF_PRODIGY, "k"} <= group.keys() or "p0" not in layout.slots:
        return group
    for index in (index for index in group["params"] if state.get(index)):
        slots, like = {**state[index]}, state[index].get("exp_avg_sq")
        for name in ("p0", "s", "exp_avg"):  # without exp_avg where the first beta is 0
            value = slots.get(name, torch.zeros((), dtype=torch.float32, device="cpu"))
            if isinstance(like, Tensor) and isinstance(value, Tensor) and value.numel() in (1, like.numel()):
                slots[name] = (value if value.numel() > 1 else value.reshape(-1).expand(like.numel())).view_as(like)
        state[index] = slots
    left = NOT_OF_PRODIGY if is_first else (*NOT_OF_PRODIGY, *OF_PRODIGY)
    numbers = {name: torch.tensor(float(group[name]), dtype=torch.float64, device="cpu") for name in OF_PRODIGY}
    return {key: numbers.get(key, value) for key, value in group.items() if key not in left}


def _slots(layout: StateLayout, slots: Any) -> Any:
    """The slots of one parameter under our names; the same object where they need no change."""
    if not isinstance(slots, dict):
        return slots
    found = {name: _dequantized(value) for name, value in slots.items()}
    if soap_files.is_of_authors(found):
        return soap_files.slots_of(layout, found)
    if isinstance(found.get(PACKED), dict):
        found.update(found.pop(PACKED))
    if "state1" in found and "state1" not in layout.slots:
        found = _of_bitsandbytes(layout, found)
    for name, (ours, factor) in RENAMED.items():
        if name in found and ours in layout.slots and ours not in found and isinstance(found[name], Tensor):
            found[ours] = factor * found.pop(name)
    for name, (ours, axis) in FACTORS.items():
        if name in found and ours in layout.slots and isinstance(found[name], Tensor):
            found[ours] = found.pop(name).unsqueeze(axis)
            found.pop("RMS", None)  # of the parameter, which is computed anew
    if "RMS" in found and "variance" in layout.slots and "exp_avg_sq" in found:
        found["variance"] = found.pop("exp_avg_sq")
        found.pop("RMS")
    same = found.keys() == slots.keys() and all(found[name] is slots[name] for name in slots)
    return slots if same else found


def _of_schedule_free(layout: StateLayout, group: dict[str, Any], state: dict[Any, Any]) -> dict[str, Any]:
    """The group without the numbers that schedulefree keeps in it, which each of its parameters gets."""
    if not (layout.evaluates() and "weight_sum" in layout.slots and {"k", *NUMBERS} <= group.keys()):
        return group
    numbers = {"step": group["k"], **{name: max(group[name], 0.0) for name in NUMBERS}}
    for index in group["params"]:
        if isinstance(state.get(index), dict) and "z" in state[index]:
            state[index] = {**numbers, **state[index]}
    return {key: value for key, value in group.items() if key not in ("k", "scheduled_lr", *NUMBERS)}


def _dequantized(value: Any) -> Any:
    """A plain tensor of a quantized one of torchao; anything else as it is."""
    subclass = isinstance(value, Tensor) and type(value) not in (Tensor, torch.nn.Parameter) and not is_dtensor(value)
    return value.dequantize() if subclass and (hasattr(value, "codes") or hasattr(value, "scale")) else value


def _of_bitsandbytes(layout: StateLayout, found: Mapping[str, Any]) -> dict[str, Any]:
    """The states of bitsandbytes, dequantized, under the names that they have in torch.optim."""
    second = "state2" in found and found["state2"] is not None
    first = "exp_avg" if second else next((name for name in FIRST if name in layout.slots), "exp_avg")
    names = {"1": first, **({"2": "exp_avg_sq"} if second else {})}
    helpers = [f"{word}{i}" for word in ("state", "qmap", "absmax", "max", "new_max") for i in "12"]
    rest = {name: value for name, value in found.items() if name not in (*helpers, "gnorm_vec", "unorm_vec")}
    for i, name in names.items():
        value = found[f"state{i}"]
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            value = _decoded(value, found.get(f"qmap{i}"), found.get(f"absmax{i}"))
        rest[name] = value
    return rest


def _decoded(codes: Tensor, qmap: Any, absmax: Any) -> Tensor:
    """Values of block-wise codes; the codes themselves, which a load refuses, where their scales are missing."""
    if not (isinstance(qmap, Tensor) and isinstance(absmax, Tensor)):
        return codes
    size = next((n for n in (256, 2048, 128, 64, 512, 1024, 4096) if -(-codes.numel() // n) == absmax.numel()), 0)
    if not size:
        return codes
    scales = absmax.float().repeat_interleave(size)[: codes.numel()].view(codes.shape)
    return qmap.float()[codes.long()] * scales
