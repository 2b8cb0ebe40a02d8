"""What a spec holds beside the options of its optimizer: lists of words, groups, and keys that belong elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_optim.config.groups import Split
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.core.state_layout import WHOLE
from lightning_optim.errors import OptionError, shown
from lightning_optim.language.options import check_options

# Keys that belong elsewhere, with where.
ELSEWHERE = {
    **dict.fromkeys(
        ("gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches", "max_epochs", "max_steps"),
        "it is an option of the Trainer",
    ),
    "callbacks": "list them in the Trainer",
    **dict.fromkeys(
        ("warmup_steps", "final"), "it belongs to the schedule, such as schedule: {name: linear, warmup_steps: 100}"
    ),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "write it as schedule, such as schedule: cosine"),
}


def refuse_elsewhere(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keys that are no options of an optimizer and belong elsewhere, with where.

    Args:
        owner: The optimizer, for the message.
        given: The keys of a spec.
        known: The options of the optimizer.

    Raises:
        OptionError: for the first such key.
    """
    for word in given:
        if word in ELSEWHERE and word not in known:
            raise OptionError(f"{owner} has no option {word!r}: {ELSEWHERE[word]}.")


def read_words(option: str, words: Any) -> tuple[str, ...]:
    """Read a list of roles and name patterns.

    Raises:
        OptionError: for anything else.

    Example:
        >>> read_words("no_decay", ["bias", "head.*"])
        ('bias', 'head.*')
    """
    listed = list(words) if isinstance(words, Iterable) and not isinstance(words, str | bytes | Mapping) else [None]
    if not all(isinstance(word, str) for word in listed):
        raise OptionError(f"{option}={shown(words)} must be a list of roles (bias, norm, embedding) or name patterns.")
    return tuple(map(str, listed))


def list_groups(groups: Any) -> list[Any]:
    """The groups of a spec as a list.

    Raises:
        OptionError: if they are none.
    """
    if isinstance(groups, str | bytes | Mapping) or not isinstance(groups, Iterable):
        raise OptionError(f"groups={shown(groups)} must be a list of mappings, each with 'params' and options.")
    return list(groups)


def read_group(group: Any, cls: type[Optimizer], complete: Mapping[str, Any]) -> Split:
    """Read a group of the user.

    Args:
        group: A mapping with `params`, options, and optionally `name`.
        cls: The optimizer.
        complete: Its options with all defaults.

    Raises:
        OptionError: for anything else, and for options that do not fit the others of the optimizer.
    """
    params = group.get("params") if isinstance(group, Mapping) else None
    words = [params] if isinstance(params, str) else params
    if not isinstance(words, list | tuple) or not words or not all(isinstance(word, str) for word in words):
        raise OptionError(
            f"groups: {shown(group)} needs 'params', a role or a pattern of names such as 'head.*', or a list of them."
        )
    label = group.get("name", "|".join(words))
    if not isinstance(label, str):
        raise OptionError(f"groups: name={shown(label)} must be a string.")
    owner = f"group {label!r}"
    rest = {key: value for key, value in group.items() if key not in ("params", "name")}
    options = check_options(rest, cls.options, owner)
    if whole := [name for name in WHOLE if name in options]:
        raise OptionError(f"{owner}: {whole[0]} is one for all groups; give it beside the name of the optimizer.")
    for one, other in (("heads", "blocks"), ("blocks", "heads")):
        if one in options and other in cls.matrix_options:
            options.setdefault(other, None)  # what the type of a module says
    cls.check_all({**complete, **options})
    return Split(tuple(words), options, label, of_user=True)
