"""What an optimizer of another library says of a checkpoint that it cannot go on from, before it takes a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lightning_optim.errors import OptionError, shown

ADVICE = (
    "Go on with the optimizer and the groups of the checkpoint, or begin anew with its weights alone: "
    "load_from_checkpoint, and fit without ckpt_path."
)


def check_files(optimizer: torch.optim.Optimizer, slots: Mapping[str, Any] | None) -> None:
    """Let an optimizer refuse state_dicts that are not of its class, when it loads them.

    torch takes any file with as many groups, and fails in the next step, or goes on with other options. Options that a
    file of an older version lacks keep their values.

    Args:
        optimizer: The optimizer.
        slots: The state that a step creates, by name; None where this is not known.
    """

    def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        name, groups, theirs = type(optimizer).__name__, optimizer.param_groups, state_dict["param_groups"]
        mine = [len(group["params"]) for group in groups]
        found = [len(group["params"]) for group in theirs]
        if mine != found:
            raise OptionError(
                f"{name}: the checkpoint has groups of {found} parameters, and these are {mine}. Groups follow from "
                f"no_decay, groups and frozen parameters; no_decay: [] makes one. {ADVICE}"
            )
        others = {slot for state in state_dict["state"].values() for slot in state} - {"step"}
        own = set(slots or ()) - {"step"}
        options = {option for group in theirs for option in group}
        stateless = slots is not None and not own  # an average of a callback may be there
        differs = bool(options - groups[0].keys() and optimizer.defaults.keys() - options) if stateless else bool(own)
        if differs and others and not own & others:
            raise OptionError(
                f"{name} keeps {', '.join(sorted(own)) or 'no state'}, and the checkpoint is of another optimizer, "
                f"with {', '.join(sorted(others))}. {ADVICE}"
            )
        for group in theirs:
            for option, value in optimizer.defaults.items():
                other = group.get(option)
                if isinstance(value, tuple) and isinstance(other, tuple | list) and len(value) != len(other):
                    raise OptionError(
                        f"{name}: the checkpoint is of another optimizer, with {option}={shown(other)}. {ADVICE}"
                    )
        kept = [{**optimizer.defaults, **group} for group in theirs]
        return {**state_dict, "param_groups": kept}

    optimizer.register_load_state_dict_pre_hook(check)
