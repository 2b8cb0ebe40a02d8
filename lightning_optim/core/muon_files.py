"""Files of torch.optim.Muon, alone or with that of torch.optim.AdamW for the rest of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.state_layout import StateLayout
from lightning_optim.errors import OptionError, shown

CLASSIC = (3.4445, -4.7750, 2.0315)


def translated(layout: StateLayout, group: dict[str, Any], state: dict[Any, Any]) -> dict[str, Any]:
    """A group of torch.optim.Muon under our names, with the state of its parameters; any other as it is.

    Raises:
        OptionError: for coefficients that have no name here.
    """
    if "ns_steps" not in group or "exp_avg" not in layout.slots or not layout.matrix_options:
        return group
    coefficients = group.get("ns_coefficients", CLASSIC)
    if not isinstance(coefficients, Sequence | Tensor) or tuple(coefficients) != CLASSIC:
        raise OptionError(
            f"Muon cannot load ns_coefficients={shown(coefficients)}: of torch's it knows {CLASSIC}, which "
            "is coefficients='classic'."
        )
    for index in group["params"]:
        if isinstance(state.get(index), dict) and state[index].get("momentum_buffer") is not None:
            rest = {name: value for name, value in state[index].items() if name != "momentum_buffer"}
            begun = torch.ones((), dtype=torch.float32, device="cpu")
            state[index] = {"step": begun, "exp_avg": state[index]["momentum_buffer"], **rest}
    named = {"coefficients": "classic", "steps": group["ns_steps"], "adjust": group.get("adjust_lr_fn") or "original"}
    own = {key: value for key, value in group.items() if key not in ("ns_steps", "ns_coefficients", "adjust_lr_fn")}
    return {**own, **named}


def refuse_half(layout: StateLayout, state_dict: Mapping[str, Any]) -> None:
    """Refuse the file of torch.optim.Muon where this optimizer has other parameters too.

    Raises:
        OptionError: for such a file.
    """
    groups = state_dict["param_groups"]
    of_muon = layout.matrix_options and any("ns_steps" in group for group in groups)
    count, own = sum(len(group["params"]) for group in groups), len(layout.every_parameter())
    if of_muon and count < own:
        raise OptionError(
            f"{type(layout).__name__} cannot load this alone: torch.optim.Muon had {count} of the {own} parameters. "
            "Give a list of two: [its state_dict, that of torch.optim.AdamW for the rest of the model]."
        )


def joined(layout: StateLayout, files: Sequence[Any]) -> dict[str, Any]:
    """One state_dict of the two of torch.optim.Muon and torch.optim.AdamW, in the groups of this optimizer.

    The parameters of each file are those that follow its rule here, in the order of the model. Options stay those of
    this optimizer.

    Raises:
        OptionError: for anything else, and where the numbers of parameters differ.
    """
    owner = type(layout).__name__
    by_rule = {
        "muon" if "ns_steps" in group else "adamw" if "betas" in group else "": file
        for file in files
        for group in _groups(file)[:1]
    }
    if not layout.matrix_options or len(files) != 2 or by_rule.keys() != {"muon", "adamw"}:
        raise OptionError(
            f"{owner} loads one state_dict; Muon also a list of two: of torch.optim.Muon, and of torch.optim.AdamW for "
            "the rest of the model."
        )
    every = layout.every_parameter()
    order = layout.model_order if len(layout.model_order) == len(every) else range(len(every))
    state: dict[int, Any] = {}
    for rule, file in by_rule.items():
        found = {**file["state"]}
        for group in _groups(file):
            translated(layout, group, found)
        ids = [index for group in _groups(file) for index in group["params"]]
        mine = sorted(
            (k for k, (i, p) in enumerate(every) if layout.traits_of(i, p)["rule"] == rule), key=order.__getitem__
        )
        if len(ids) != len(mine):
            raise OptionError(
                f"{owner} has {len(mine)} parameters for {rule}, and the file of torch.optim has {len(ids)}. Which "
                "parameter follows which rule stands in repr(optimizer); the key adamw of a spec changes it."
            )
        state |= {k: found[index] for k, index in zip(mine, ids, strict=True) if index in found}
    numbers = iter(range(len(every)))
    groups = [{**group, "params": [next(numbers) for _ in group["params"]]} for group in layout.param_groups]
    return {"state": state, "param_groups": groups}


def _groups(file: Any) -> list[dict[str, Any]]:
    groups = file.get("param_groups") if isinstance(file, Mapping) else None
    return list(groups) if isinstance(groups, list) else []
