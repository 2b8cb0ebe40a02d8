"""Parameter groups by role and by name: what decays, and what keeps its state in 32 bits."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_optim.distributed.names import plain_name
from lightning_optim.errors import OptionError, nearest

ROLES = ("weight", "bias", "norm", "embedding")


def role(owner: nn.Module, name: str) -> str:
    """What a parameter is to its module: "norm", "embedding", "bias" or "weight".

    Decided by the kind of module and the name, never by the number of axes, which depends on how the model is
    sharded.

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

    One that is an embedding anywhere is an embedding: a head may be tied to it and come first.
    """
    found: dict[str, tuple[nn.Parameter, str]] = {}
    names: dict[nn.Parameter, str] = {}
    for prefix, owner in module.named_modules():
        for name, param in owner.named_parameters(recurse=False):
            if not param.requires_grad:
                continue
            first = names.setdefault(param, plain_name(f"{prefix}.{name}" if prefix else name))
            if first not in found or role(owner, name) == "embedding":
                found[first] = (param, role(owner, name))
    return found


def matches(name: str, kind: str, words: Iterable[str]) -> bool:
    """Whether a parameter is meant by one of the words: a role, or a pattern of names such as `head.*`."""
    return any(kind == word if word in ROLES else fnmatch.fnmatchcase(name, word) for word in words)


def make_groups(
    module: nn.Module,
    split: Sequence[tuple[Sequence[str], Mapping[str, Any], str]],
    overrides: Sequence[tuple[str, Mapping[str, Any]]] = (),
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of a module into groups.

    Args:
        module: The model.
        split: For each word list, the options that hold for the parameters that it means, and a name for them.
        overrides: Patterns with options of the user's; of these the first that matches counts, and wins over `split`.

    Returns:
        Groups with `params` and `name` and the options in which each differs.

    Raises:
        OptionError: where nothing is trainable, or an override or a pattern of a word list matches no parameter.
    """
    roles = named_roles(module)
    if not roles:
        raise OptionError(
            f"{type(module).__name__} has no parameter to train: it has none at all, or all are frozen "
            "(requires_grad=False) when the optimizer is made."
        )
    _refuse_strangers(module, split)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    used: set[int] = set()
    for name, (param, kind) in roles.items():
        options: dict[str, Any] = {}
        labels = []
        for words, found, label in split:
            if matches(name, kind, words):
                options.update(found)
                labels.append(label)
        for i, (pattern, found) in enumerate(overrides):
            if matches(name, kind, [pattern]):
                options.update(found)
                labels.append(pattern)
                used.add(i)
                break
        group = groups.setdefault(tuple(labels), {"params": [], "name": "+".join(labels) or "main", **options})
        group["params"].append(param)
    unused = [pattern for i, (pattern, _) in enumerate(overrides) if i not in used]
    if unused:
        some = ", ".join(list(roles)[:4])
        raise OptionError(f"groups: no trainable parameter is meant by {unused[0]!r}; names are like {some}.")
    return list(groups.values())


def _refuse_strangers(module: nn.Module, split: Sequence[tuple[Sequence[str], Mapping[str, Any], str]]) -> None:
    """Refuse a pattern that means nothing, frozen parameters and second names included: a role may be mistyped."""
    names = [plain_name(name) for name, _ in module.named_parameters(remove_duplicate=False)]
    for words, _, label in split:
        for word in words:
            if word not in ROLES and not any(fnmatch.fnmatchcase(name, word) for name in names):
                some = ", ".join(names[:4])
                raise OptionError(
                    f"{label}: no parameter is meant by {word!r}. Roles are {', '.join(ROLES[1:])}; names are like "
                    f"{some}.{nearest(word, ROLES)}"
                )
