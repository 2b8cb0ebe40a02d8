"""Parameter groups by role and by name: for weight decay, full-precision state and options of the user."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_optim.distributed.names import plain_name
from lightning_optim.errors import OptionError, nearest

ROLES = ("weight", "bias", "norm", "embedding")


def role(owner: nn.Module, name: str) -> str:
    """The role of a parameter in its module: "norm", "embedding", "bias" or "weight".

    It depends on the class of the module and the name only. The number of axes is not used, since it depends on how
    the model is sharded.

    Args:
        owner: The module that has the parameter as an attribute.
        name: The name of that attribute.

    Example:
        >>> role(nn.Linear(2, 2), "bias"), role(nn.LayerNorm(2), "weight"), role(nn.Linear(2, 2), "weight")
        ('bias', 'norm', 'weight')
    """
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or "embedding" in type(owner).__name__.lower():
        return "embedding"
    return "bias" if "bias" in name.split("_") else "weight"  # in_proj_bias, bias_k, bias_ih_l0


def named_roles(module: nn.Module) -> dict[str, tuple[nn.Parameter, str]]:
    """Every trainable parameter of a module once, by its first name, with its role.

    A shared parameter that is an embedding in any module is an embedding: a tied head may come first.
    """
    roles: dict[str, tuple[nn.Parameter, str]] = {}
    names: dict[nn.Parameter, str] = {}
    for prefix, owner in module.named_modules():
        for name, param in owner.named_parameters(recurse=False):
            if not param.requires_grad:
                continue
            first = names.setdefault(param, plain_name(f"{prefix}.{name}" if prefix else name))
            if first not in roles or role(owner, name) == "embedding":
                roles[first] = (param, role(owner, name))
    return roles


def matches(name: str, kind: str, words: Iterable[str]) -> bool:
    """Whether a parameter matches one of the words: a role, or a name pattern such as `head.*`."""
    return any(kind == word if word in ROLES else fnmatch.fnmatchcase(name, word) for word in words)


def make_groups(
    module: nn.Module,
    split: Sequence[tuple[Sequence[str], Mapping[str, Any], str]],
    overrides: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a module into parameter groups.

    Args:
        module: The model.
        split: Triples of a list of roles and patterns, the options of the parameters that match, and a name.
        overrides: Pairs of a pattern and options of the user. For each parameter the first that matches is used, and
            overrides `split`.

    Returns:
        Parameter groups with `params`, `name` and the options that differ from the optimizer's.

    Raises:
        OptionError: if no parameter is trainable, or a pattern matches no parameter.
    """
    roles = named_roles(module)
    if not roles:
        raise OptionError(
            f"{type(module).__name__} has no parameter to train: it has none at all, or all are frozen "
            "(requires_grad=False) when the optimizer is made."
        )
    _check_patterns(module, split)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    used: set[int] = set()
    for name, (param, kind) in roles.items():
        options: dict[str, Any] = {}
        labels = []
        for words, changed, label in split:
            if matches(name, kind, words):
                options.update(changed)
                labels.append(label)
        for i, (pattern, changed) in enumerate(overrides):
            if matches(name, kind, [pattern]):
                options.update(changed)
                labels.append(pattern)
                used.add(i)
                break
        group = groups.setdefault(tuple(labels), {"params": [], "name": "+".join(labels) or "main", **options})
        group["params"].append(param)
    unused = [pattern for i, (pattern, _) in enumerate(overrides) if i not in used]
    if unused:
        some = ", ".join(list(roles)[:4])
        raise OptionError(f"groups: no trainable parameter matches {unused[0]!r}; names are like {some}.")
    return list(groups.values())


def _check_patterns(module: nn.Module, split: Sequence[tuple[Sequence[str], Mapping[str, Any], str]]) -> None:
    """Refuse a pattern, or a mistyped role, that matches no name, not even of a frozen or shared parameter."""
    names = [plain_name(name) for name, _ in module.named_parameters(remove_duplicate=False)]
    for words, _, label in split:
        for word in words:
            if word not in ROLES and not any(fnmatch.fnmatchcase(name, word) for name in names):
                some = ", ".join(names[:4])
                raise OptionError(
                    f"{label}: no parameter matches {word!r}. Roles are {', '.join(ROLES[1:])}; names are like "
                    f"{some}.{nearest(word, ROLES)}"
                )
