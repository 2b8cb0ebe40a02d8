"""Parameter groups by role and by name: for weight decay, full-precision state and options of the user."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.names import owned_parameters, plain_name
from lightning_optim.distributed.placement import logical_shape
from lightning_optim.errors import OptionError, nearest, shown

ROLES = ("weight", "bias", "norm", "embedding", "head")


class Split(NamedTuple):
    """Parameters that get other options than the rest.

    Attributes:
        words: Roles and name patterns of these parameters.
        options: Their options; empty where these parameters are a group of their own, and nothing differs.
        label: Its name, in that of a parameter group and in messages.
        of_user: Whether the user asked for this group, so that its name is always seen.
        multiplier: A factor on the learning rate of the optimizer.
    """

    words: Sequence[str]
    options: Mapping[str, Any]
    label: str
    of_user: bool = False
    multiplier: float | None = None


class LayerDecay(NamedTuple):
    """Learning rates that fall from the head towards the input.

    Attributes:
        decay: The factor from one layer to the one below.
        blocks: Names, patterns of names or classes of the blocks that are layers; empty where they are found.
    """

    decay: float
    blocks: tuple[str, ...] = ()


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


def named_roles(module: nn.Module, frozen: bool = False) -> dict[str, tuple[nn.Parameter, str]]:
    """Every trainable parameter of a module once, by its first name, with its role; on demand frozen ones after them.

    A shared parameter that is an embedding in any module is an embedding: a tied head may come first.
    """
    roles: dict[str, tuple[nn.Parameter, str]] = {}
    names: dict[nn.Parameter, str] = {}
    for name, owner, attribute, param in owned_parameters(module):
        if param.requires_grad or frozen:
            first = names.setdefault(param, name)
            if first not in roles or role(owner, attribute) == "embedding":
                roles[first] = (param, role(owner, attribute))
    return dict(sorted(roles.items(), key=lambda item: not item[1][0].requires_grad))


def heads(module: nn.Module) -> set[str]:
    """The names of the weights of the head: the last module, in the order of registration, with a weight of two axes.

    Where that is tied to an embedding there is none, for it is an embedding; recurrent layers are no heads.

    Example:
        >>> heads(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.LayerNorm(2)))
        {'1.weight'}
    """
    last: nn.Module | None = None
    found: dict[str, nn.Parameter] = {}
    for name, owner, attribute, p in owned_parameters(module):
        weighs = role(owner, attribute) == "weight" and not isinstance(owner, nn.RNNBase)
        if weighs and (is_lazy(p) or len(logical_shape(p)) > 1):
            found = {**(found if owner is last else {}), name: p}
            last = owner
    kinds = {p: (name, kind) for name, (p, kind) in named_roles(module, frozen=True).items()}
    return {kinds[p][0] for p in found.values() if kinds[p][1] == "weight"}


def matches(name: str, kind: str, words: Iterable[str]) -> bool:
    """Whether a parameter matches one of the words: a role, or a name pattern such as `head.*`."""
    kinds = (kind, "weight") if kind == "head" else (kind,)
    return any(word in kinds if word in ROLES else matches_name(name, word) for word in words)


def matches_name(name: str, pattern: str) -> bool:
    """Whether a plain name matches a pattern, which may be written with the names of wrappers too.

    Example:
        >>> matches_name("net.0.weight", "net.*"), matches_name("net.0.weight", "net._orig_mod.0.*")
        (True, True)
        >>> matches_name("net.weight.original0", "net.weight")  # weight_norm keeps a weight in two parameters
        True
    """
    names = (name, re.sub(r"\.original\d+$", "", name))
    return any(fnmatch.fnmatchcase(one, plain_name(pattern)) for one in names)


@dataclass
class _Group:
    """Parameters that the same splits apply to."""

    splits: tuple[Split, ...]
    params: list[nn.Parameter] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)

    def options(self, lr: Any = None) -> dict[str, Any]:
        """Its options, with its learning rate where factors multiply that of the optimizer."""
        options = {name: value for part in self.splits for name, value in part.options.items()}
        factors = [part.multiplier for part in self.splits if part.multiplier is not None]
        return {"lr": lr * math.prod(factors), **options} if factors and lr is not None else options

    def names(self) -> Iterator[str]:
        """Names for it, from the shortest to the longest: by what differs, by roles too, by all splits."""
        options = self.options()
        differing = [
            part.label
            for part in self.splits
            if part.of_user or any(options[key] is value for key, value in part.options.items())
        ]
        yield "+".join(differing) or "main"
        yield "+".join([*differing, *(kind for kind in ROLES if kind in self.kinds)])
        yield "+".join(part.label for part in self.splits)


def make_groups(
    module: nn.Module,
    split: Sequence[Split],
    overrides: Sequence[Split] = (),
    layers: Callable[[Mapping[str, str]], Mapping[str, Split]] = lambda roles: {},
    lr: Any = None,
) -> list[dict[str, Any]]:
    """Sort the parameters of a module into parameter groups, frozen ones after those that are trained.

    Args:
        module: The model.
        split: Splits by role. All that match a parameter apply to it.
        overrides: Splits of the user. For each parameter the first that matches is used, and overrides `split`.
        layers: From the roles of parameters to one more split for each of them, both by name.
        lr: The learning rate of the optimizer, which factors multiply.

    Returns:
        Parameter groups with `params`, `name` and the options that differ from the optimizer's.

    Raises:
        OptionError: if no parameter is trainable, or a pattern matches no parameter.
    """
    roles = named_roles(module, frozen=True)
    if not any(param.requires_grad for param, _ in roles.values()):
        raise OptionError(
            f"{type(module).__name__} has no parameter to train: it has none at all, or all are frozen "
            "(requires_grad=False) when the optimizer is made."
        )
    _check_patterns(module, split)
    head = heads(module)
    kinds = {name: "head" if name in head else kind for name, (_, kind) in roles.items()}
    _check_overrides(kinds, overrides)
    of_layer = layers(kinds)
    groups: dict[tuple[int, ...], _Group] = {}
    for name, (param, kind) in roles.items():
        found = [part for part in split if matches(name, kinds[name], part.words)]
        found += [of_layer[name]] if name in of_layer else []
        found += [part for part in overrides if matches(name, kinds[name], part.words)][:1]
        group = groups.setdefault(tuple(map(id, found)), _Group(tuple(found)))
        group.params.append(param)
        group.kinds.add(kind)
    trained = [group for group in groups.values() if group.params[0].requires_grad]
    names = _short_names([*trained, *(group for group in groups.values() if group not in trained)], len(trained))
    return [{"params": group.params, "name": names[id(group)], **group.options(lr)} for group in groups.values()]


def _short_names(groups: Sequence[_Group], first: int) -> dict[int, str]:
    """The names of parameter groups, by id: short, and different.

    The `first` groups take their names before the others. Groups stay apart even if their options do not differ, so
    that a checkpoint has the same groups for all options.
    """
    found: dict[int, str] = {}
    by_length = [sorted(part, key=lambda group: len(group.splits)) for part in (groups[:first], groups[first:])]
    for group in (group for part in by_length for group in part):
        free = (name for name in group.names() if name not in found.values())
        found[id(group)] = next(free, f"group {len(found)}")
    return found


def hint(word: str, names: Iterable[str]) -> str:
    """What to write instead of a word that matches no parameter; empty if nothing comes near.

    Example:
        >>> hint("body", ["body.weight", "body.bias"]), hint("biass", ["body.weight"])
        (" Write 'body.*' for all parameters in it.", ' Did you mean bias?')
    """
    if any(matches_name(name, f"{word}.*") for name in names):
        return f" Write {word + '.*'!r} for all parameters in it."
    return nearest(word, [role for role in ROLES if role != word])


def _check_patterns(module: nn.Module, split: Sequence[Split]) -> None:
    """Refuse a pattern, or a mistyped role, that matches no name, not even of a frozen or shared parameter."""
    names = [name for name, *_ in owned_parameters(module)]
    for words, _, label, *_ in split:
        for word in words:
            if word not in ROLES and not any(matches_name(name, word) for name in names):
                some, roles = ", ".join(names[:4]), ROLES[1:] if label == "adamw" else ROLES[1:-1]
                raise OptionError(
                    f"{label}: no parameter matches {shown(word)}. Roles are {', '.join(roles)}; names are like "
                    f"{some}.{hint(word, names)}"
                )


def _check_overrides(roles: Mapping[str, str], overrides: Sequence[Split]) -> None:
    """Refuse a pattern of the user that no parameter matches, or that earlier groups leave nothing to."""
    left = dict(roles)
    for words, _, label, *_ in overrides:
        for word in words:
            if not any(matches(name, kind, [word]) for name, kind in roles.items()):
                some = f"{', '.join(list(roles)[:4])}.{hint(word, roles)}"
                raise OptionError(f"groups: no parameter matches {shown(word)}; names are like {some}")
        mine = [name for name, kind in left.items() if matches(name, kind, words)]
        if not mine:
            raise OptionError(
                f"groups: all parameters that {label} matches are in groups before it, and the first that matches "
                "counts. Put it before them, or leave it out."
            )
        for name in mine:
            del left[name]
