"""Which parameters of a module are matrices for an optimizer like Muon: by role, by type of module, and by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from lightning_optim.config.foreign import Kind
from lightning_optim.config.groups import ROLES, Split, heads, matches, named_roles
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.names import owned_parameters
from lightning_optim.distributed.placement import logical_shape
from lightning_optim.errors import OptionError, nearest, shown
from lightning_optim.language.options import check_options
from lightning_optim.language.program import namespace

ADAMW = ("bias", "norm", "embedding", "head")
# What `adamw` of a spec may hold besides `params`, and the options that they are.
SETTINGS = {"betas": "betas", "eps": "adamw_eps", "scale": "adamw_scale"}
RECURRENT: dict[type[nn.Module], int] = {nn.LSTM: 4, nn.GRU: 3}


def read(owner: str, cls: Kind, adamw: Any, options: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The key `adamw` of a spec: whom AdamW serves, and its settings.

    Args:
        owner: The optimizer, for messages.
        cls: Its class.
        adamw: None, a list of roles and name patterns, or a mapping with settings of AdamW and such a list as `params`.
        options: The options beside it.

    Returns:
        Roles and name patterns, and options.

    Raises:
        OptionError: for an optimizer without a rule beside its own, and for anything else.
    """
    if not cls.matrix_options or not isinstance(cls, type):
        if adamw is not None:
            raise OptionError(
                f"{owner} has no key 'adamw': it serves all parameters alike. Only muon has AdamW beside it."
            )
        return (), {}
    given = dict(adamw) if isinstance(adamw, Mapping) else {} if adamw is None else {"params": adamw}
    words = given.pop("params", ADAMW)
    if isinstance(words, str | bytes | Mapping) or not isinstance(words, Iterable):
        raise OptionError(_wrong(owner, adamw))
    words = list(words)
    if not all(isinstance(word, str) for word in words):
        raise OptionError(_wrong(owner, adamw))
    for key in given:
        if key == "lr":
            raise OptionError(
                f"{owner}: adamw has no lr of its own, so that schedules move both; its rate is lr * scale."
            )
        if key not in SETTINGS:
            hint = nearest(str(key), SETTINGS)
            raise OptionError(
                f"{owner}: adamw has no key {key!r}.{hint} Its keys are params, {', '.join(SETTINGS)}; all else is the "
                "same for all parameters, or stands in groups."
            )
        if SETTINGS[key] in options:
            raise OptionError(f"{owner}: {SETTINGS[key]} and adamw.{key} are the same; give one of them.")
    renamed = {SETTINGS[key]: value for key, value in given.items()}
    return tuple(words), check_options(renamed, cls.options, f"{owner}, adamw")


def _wrong(owner: str, adamw: Any) -> str:
    return (
        f"{owner}: adamw={shown(adamw)} must be a list of roles ({', '.join(ROLES[1:])}) and name patterns, whose "
        "parameters AdamW serves, or a mapping of its settings (betas, eps, scale) and such a list as params."
    )


def splits(module: nn.Module, words: Sequence[str]) -> list[Split]:
    """What role and type of module say of the matrices of a module, as splits of its parameter groups."""
    facts: dict[tuple[str, int], list[str]] = {}
    for name, owner, attribute, _ in owned_parameters(module):
        fact = _fact(owner, attribute)
        if fact:
            facts.setdefault(fact, []).append(name)
    found = [Split(words, {"matrix": False}, "adamw")]
    for (option, value), names in facts.items():
        what: dict[str, Any] = {"matrix": False} if option == "depthwise" else {option: value}
        found.append(Split(names, what, "depthwise" if option == "depthwise" else f"{option}={value}"))
    return found


def _fact(owner: nn.Module, attribute: str) -> tuple[str, int] | None:
    """What the type of a module says of a weight: into how many blocks its rows fall, or that it is depthwise."""
    if isinstance(owner, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return "blocks", 3
    if attribute.startswith(("weight_ih", "weight_hh")):
        return next((("blocks", n) for cls, n in RECURRENT.items() if isinstance(owner, cls)), None)
    if isinstance(owner, _ConvNd) and attribute == "weight" and owner.groups > 1:
        return ("depthwise", 1) if owner.groups == owner.in_channels else ("blocks", owner.groups)
    return None


def check(
    owner: str, cls: type[Optimizer], module: nn.Module, groups: Sequence[Mapping[str, Any]], options: Any
) -> None:
    """Refuse tensors that cannot be taken as matrices, and a module without a matrix where there are other rules.

    Args:
        owner: The optimizer, for messages.
        cls: Its class.
        module: The module.
        groups: Its parameter groups, frozen parameters included.
        options: The options of the optimizer.

    Raises:
        OptionError: with the name of the parameter.
    """
    names = {p: name for name, (p, _) in named_roles(module, frozen=True).items()}
    defaults = {name: option.default for name, option in cls.options.items()}
    matrices = lazy = 0
    for group in groups:
        h = namespace({**defaults, **options, **{k: v for k, v in group.items() if k in defaults}})
        for p in group["params"]:
            if is_lazy(p):
                lazy += 1
                continue
            try:
                matrices += cls.matrices(h, logical_shape(p)) is not None
            except OptionError as error:
                raise OptionError(f"{owner}: {names[p]}: {error}") from None
    if cls.matrix_options and not matrices and not lazy:
        raise OptionError(
            f"{owner} has no matrix in {type(module).__name__}: all its parameters are biases, norms, embeddings, the "
            "head, too small, or named in adamw or groups, and AdamW serves these. Use adamw alone, or adamw=[] beside "
            "the name, which takes embeddings and head for matrices."
        )


def reasons(module: nn.Module, words: Sequence[str], overrides: Sequence[Split]) -> dict[Tensor, tuple[str, str]]:
    """The name of each parameter, and why AdamW serves it where a role, a type of module or a name says so."""
    head, split = heads(module), splits(module, words)
    found: dict[Tensor, tuple[str, str]] = {}
    for name, (p, role) in named_roles(module, frozen=True).items():
        kind = "head" if name in head else role
        why = ""
        for part in split:
            if part.options.get("matrix") is False and not why:
                word = next((word for word in part.words if matches(name, kind, [word])), None)
                if word is not None:
                    why = "head" if word == "head" == kind else f"role {kind}" if word in ROLES else f"adamw: {word}"
                    why = "a depthwise convolution" if part.label == "depthwise" else why
        mine = next((part for part in overrides if matches(name, kind, part.words)), None)
        if mine is not None and "matrix" in mine.options:
            why = f"group {mine.label!r}" if mine.options["matrix"] is False else ""
        found[p] = name, why
    return found
