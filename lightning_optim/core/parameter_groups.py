"""Reads parameter groups as a user gives them: what `torch.optim` takes is taken, anything else refused in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.core.state_layout import WHOLE
from lightning_optim.errors import OptionError, nearest, shown
from lightning_optim.language.options import ELSEWHERE, Option, check_options, is_near_miss

# Keys for how torch.optim runs a step. They have no meaning here.
TORCH_FLAGS = ("foreach", "fused", "capturable", "differentiable")
# Keys of torch, Lightning and learning-rate schedulers that resemble options.
KNOWN_KEYS = ("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")


def read_params(owner: str, params: Any) -> list[dict[str, Any]]:
    """The parameter groups of a constructor's argument. The given groups themselves are not changed later.

    Args:
        owner: The optimizer, for messages.
        params: Parameters, named parameters or parameter groups.

    Raises:
        OptionError: where it is none of these, or empty.
    """
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        raise OptionError(f"{owner} got a module; give it module.parameters(), or use create_optimizer.")
    if isinstance(params, Tensor):
        raise OptionError(f"{owner} got a bare tensor; give it a list: {owner}([tensor]).")
    if isinstance(params, Mapping):
        do = "a list of groups: [{...}]" if "params" in params else "named parameters: params.items()"
        raise OptionError(f"{owner} got a mapping instead of parameters; give it {do}.")
    found = _listed(owner, params)
    if not found:
        raise OptionError(
            f"{owner} got an empty parameter list. Does the model have parameters, and is the list a generator "
            "that was used up before?"
        )
    return [dict(group) for group in found] if all(isinstance(g, dict) for g in found) else _one_group(owner, found)


def _one_group(owner: str, found: list[Any]) -> list[dict[str, Any]]:
    if any(isinstance(item, Mapping) for item in found):
        raise OptionError(f"{owner} got parameters and parameter groups in one list, or groups that are no dict.")
    return [{"params": found}]


def read_group(owner: str, group: Any, options: Mapping[str, Option], capturable: bool = False) -> dict[str, Any]:
    """A copy of a parameter group, with a list of tensors, names where they were given, and checked options.

    Keys that are no options are kept, as torch keeps them, unless they are probably a mistyped option.

    Args:
        owner: The optimizer, for messages.
        group: What the user gave.
        options: The options of the optimizer.
        capturable: Whether the optimizer is capturable.

    Raises:
        OptionError: for parameters that torch refuses too, for a wrong option, and for an option of the whole
            optimizer.
    """
    if not isinstance(group, dict):
        raise OptionError(f"{owner}: a parameter group is a dict with 'params', not {shown(group)}.")
    if "params" not in group:
        raise OptionError(f"{owner}: a parameter group has no 'params'; its keys are {', '.join(map(str, group))}.")
    params = group["params"]
    named = _pairs(owner, [params] if isinstance(params, Tensor) else _listed(owner, params))
    tensors = [p for _, p in named]
    for p in tensors:
        if not (p.is_leaf or p.retains_grad):
            raise OptionError(
                f"{owner} got a tensor of shape {tuple(p.shape)} that is computed from others (a non-leaf tensor); "
                "give it the parameters themselves."
            )
    rest = {key: value for key, value in group.items() if key != "params"}
    for flag in TORCH_FLAGS:
        if rest.get(flag, True) in (None, False) and not (flag == "capturable" and capturable):
            del rest[flag]
    _refuse_keys(owner, rest, options)
    names = {"param_names": [name for name, _ in named]} if tensors and named[0][0] is not None else {}
    given = {key: value for key, value in rest.items() if key in options}
    return {**rest, "params": tensors, **names, **check_options(given, options, owner)}


def _refuse_keys(owner: str, group: Mapping[Any, Any], options: Mapping[str, Option]) -> None:
    """Refuse options of the whole optimizer, and keys that are probably mistyped options."""
    for key in group:
        if key in WHOLE:
            raise OptionError(
                f"{owner}: {key} is one for all groups; give it to {owner}(...), and not to a group of it."
            )
        known = key in options or key in KNOWN_KEYS or not isinstance(key, str)
        if not known and (key in ELSEWHERE or is_near_miss(key, options)):
            hint = f" ({ELSEWHERE[key]})." if key in ELSEWHERE else "." + nearest(key, options)
            raise OptionError(
                f"{owner} has no option {key!r}{hint} Its options are {', '.join(options)}. A key of a parameter "
                "group that is no option is kept, but should not resemble one."
            )


def _listed(owner: str, params: Any) -> list[Any]:
    """The items of a collection or a generator of parameters."""
    if isinstance(params, set | frozenset):
        raise OptionError(
            f"{owner} got a set of parameters, whose order differs from run to run; give it a list, so that a "
            "checkpoint finds its parameters again."
        )
    if isinstance(params, str | bytes | Mapping) or not isinstance(params, Iterable):
        raise OptionError(f"{owner} optimizes tensors; {shown(params)} is no list of them.")
    return list(params)


def _pairs(owner: str, items: list[Any]) -> list[tuple[str | None, Tensor]]:
    """The tensors with their names, or with None where none has a name."""
    pairs: list[tuple[str | None, Tensor]] = []
    for item in items:
        name, tensor = item if isinstance(item, tuple) and len(item) == 2 else (None, item)
        if not isinstance(tensor, Tensor) or not (name is None or isinstance(name, str)):
            raise OptionError(f"{owner} optimizes tensors, and got {torch.typename(item)}: {shown(item)}.")
        pairs.append((name, tensor))
    if len({name is None for name, _ in pairs}) > 1:
        raise OptionError(f"{owner} got parameters with and without names in one group; name all of them or none.")
    return pairs


def refuse_mixed_names(owner: str, group: Mapping[str, Any], others: list[dict[str, Any]]) -> None:
    """Refuse a group with names beside groups without, and the reverse, as torch does.

    Raises:
        OptionError: for such a group.
    """
    if any(("param_names" in group) != ("param_names" in other) for other in others):
        raise OptionError(
            f"{owner} got parameter groups with and without names of parameters; give named parameters in all of "
            "them or in none."
        )
