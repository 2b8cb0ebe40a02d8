"""What a spec holds beside the options of its optimizer: lists of words, groups, and keys that belong elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_optim import engines
from lightning_optim.config.foreign import ForeignClass, Kind
from lightning_optim.config.groups import LayerDecay, Split
from lightning_optim.core.constructor import check_own_constructor
from lightning_optim.core.state_layout import WHOLE
from lightning_optim.errors import OptionError, check, first_line, is_number, nearest, shown
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


def read_options(kind: Kind, given: Mapping[str, Any], owner: str, also: Sequence[str] = ()) -> dict[str, Any]:
    """Check options one by one, and convert them.

    Args:
        kind: The optimizer.
        given: Values by name.
        owner: The optimizer or the group, for messages.
        also: Names of other keys, for messages.

    Raises:
        OptionError: for an unknown name, and for a value of a wrong type or out of range.
    """
    if isinstance(kind, ForeignClass):
        return kind.read_options(given, owner, also)
    return check_options(given, kind.options, owner, also)


def check_together(kind: Kind, options: Mapping[str, Any], owner: str) -> None:
    """Check that options go together.

    Raises:
        OptionError: where they do not.
    """
    if isinstance(kind, ForeignClass):
        kind.check_all(options, owner)
        return
    check_own_constructor(kind, options, owner)
    complete = complete_options(kind, options)
    kind.check_all({**complete})
    engines.check_name(complete["engine"])


def complete_options(kind: Kind, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the defaults of all others."""
    return {name: options.get(name, option.default) for name, option in kind.options.items()}


def read_group(group: Any, kind: Kind, options: Mapping[str, Any]) -> Split:
    """Read a group of the user.

    Args:
        group: A mapping with `params`, options, and optionally `name`.
        kind: The optimizer.
        options: Its options.

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
    rest = {key: value for key, value in group.items() if key not in ("params", "name", "lr_multiplier")}
    mine = read_options(kind, rest, owner, ["lr_multiplier"])
    multiplier = _read_multiplier(group, kind, owner)
    allowed = kind.in_groups(options) if isinstance(kind, ForeignClass) else kind.options.keys() - set(WHOLE)
    if whole := [name for name in mine if name not in allowed]:
        raise OptionError(f"{owner}: {whole[0]} is one for all groups; give it beside the name of the optimizer.")
    for one, other in (("heads", "blocks"), ("blocks", "heads")):
        if one in mine and other in kind.matrix_options:
            mine.setdefault(other, None)  # what the type of a module says
    if isinstance(kind, ForeignClass):
        kind.check_all({**options, **mine}, owner)
        if (error := kind.takes_groups(options)) is not None:
            raise OptionError(f"{owner}: {kind.cls.__name__} takes one parameter group only: {first_line(error)}")
    else:
        kind.check_all({**complete_options(kind, options), **mine})
    return Split(tuple(words), mine, label, True, multiplier)


def _read_multiplier(group: Mapping[str, Any], kind: Kind, owner: str) -> float | None:
    """The factor on the learning rate of a group; None if it has none."""
    factor = group.get("lr_multiplier")
    if "lr_multiplier" not in group:
        return None
    check(owner, "lr_multiplier", factor, is_number(factor) and 0 <= factor < math.inf, "a number of at least 0")
    if "lr" in group:
        raise OptionError(
            f"{owner} has lr={shown(group['lr'])} and lr_multiplier={shown(factor)}. Give one of the two: "
            "lr_multiplier is relative to the lr of the optimizer."
        )
    refuse_without_rate(kind, owner, "lr_multiplier")
    return float(factor)  # type: ignore[arg-type]


def refuse_without_rate(kind: Kind, owner: str, option: str) -> None:
    """Refuse factors on a learning rate that an optimizer does not have.

    Raises:
        OptionError: then.
    """
    if "lr" not in kind.options:
        raise OptionError(f"{owner}: {option} multiplies lr, which the optimizer does not have. Leave it out.")


def read_layer_decay(value: Any, kind: Kind, owner: str) -> LayerDecay | None:
    """Read a number, a mapping with `decay` and `blocks`, or None.

    Raises:
        OptionError: for anything else.

    Example:
        >>> from lightning_optim.core.optimizer import OPTIMIZERS
        >>> read_layer_decay({"decay": 0.75, "blocks": "net.blocks"}, OPTIMIZERS["adamw"], "optimizer 'adamw'")
        LayerDecay(decay=0.75, blocks=('net.blocks',))
    """
    if value is None:
        return None
    refuse_without_rate(kind, owner, "layer_decay")
    given = dict(value) if isinstance(value, Mapping) else {"decay": value}
    for key in given:
        if key not in LayerDecay._fields:
            hint = nearest(shown(key), LayerDecay._fields)
            raise OptionError(f"layer_decay has no option {shown(key)}.{hint} Its options are decay and blocks.")
    decay, blocks = given.get("decay"), given.get("blocks", ())
    number = is_number(decay) and 0 < decay <= 1
    check(owner, "layer_decay", decay, number, "in (0, 1], such as 0.75, or a mapping with decay and blocks")
    words = [blocks] if isinstance(blocks, str) else blocks
    listed = isinstance(words, list | tuple) and all(isinstance(word, str) and word for word in words)
    check(
        "layer_decay", "blocks", blocks, listed, "a name or pattern of blocks such as 'net.blocks.*', or a list of them"
    )
    return LayerDecay(float(decay), tuple(words))  # type: ignore[arg-type]
