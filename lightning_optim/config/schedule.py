"""The schedule of a config: how it is written."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_optim.config.groups import Split
from lightning_optim.errors import OptionError, is_number, is_whole, nearest, shown
from lightning_optim.training.lengths import ALLOWED, Length, read_length
from lightning_optim.training.shapes import SHAPES, Shape, options_of

# What other libraries call an option of ours.
ELSEWHERE = {
    **dict.fromkeys(("step_size", "decay_every"), "every"),
    **dict.fromkeys(("T_0", "t_initial", "cycle_length"), "cycle"),
    **dict.fromkeys(("T_mult", "cycle_mult"), "multiplier"),
    **dict.fromkeys(("eta_min", "min_lr", "lr_min", "final_div_factor"), "final, a factor on the learning rate"),
    **dict.fromkeys(("pct_start", "warmup_ratio", "warmup_fraction"), "warmup, a fraction such as 0.05"),
    **dict.fromkeys(("num_warmup_steps", "warmup_t"), "warmup_steps"),
    **dict.fromkeys(("warmup_epochs", "epochs"), "warmup, such as '5 epochs'"),
    **dict.fromkeys(("max_lr", "base_lr", "lr"), "lr of the optimizer"),
    "div_factor": "start, a factor on the learning rate",
    "anneal_strategy": "anneal",
    **dict.fromkeys(("cycle_momentum", "base_momentum", "max_momentum"), "momentum, such as [0.85, 0.95]"),
    **dict.fromkeys(
        ("total_steps", "T_max", "num_training_steps", "num_cycles"), "max_epochs or max_steps of the Trainer"
    ),
}


def read(spec: Any) -> Shape | None:
    """Read a word, a mapping with `name` and options, or None.

    Raises:
        OptionError: for an unknown schedule or option, or a value out of range.

    Example:
        >>> read({"name": "cosine", "warmup_steps": 100}).warmup
        Length(amount=100.0, unit='steps')
        >>> read("cosin")
        Traceback (most recent call last):
        ...
        lightning_optim.errors.OptionError: schedule 'cosin' is not one of ... Did you mean cosine...
    """
    if spec is None:
        return None
    if not isinstance(spec, str | Mapping):
        raise OptionError(
            f"schedule={shown(spec)} must be one of {', '.join(SHAPES)}, or a mapping with name and options, such as "
            "{name: cosine, warmup: 0.05}."
        )
    given: dict[Any, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "name" not in given:
        raise OptionError(f"schedule={shown(spec)} has no 'name': one of {', '.join(SHAPES)}.")
    name = given.pop("name")
    if not isinstance(name, str) or name not in SHAPES:
        hint = nearest(shown(name), SHAPES)
        raise OptionError(f"schedule {shown(name)} is not one of {', '.join(SHAPES)}.{hint}")
    cls = SHAPES[str(name)]
    shape = cls(**_options(cls, given))
    if wrong := shape.check():
        raise OptionError(f"schedule {cls.name!r}: {wrong}")
    return shape


def _options(cls: type[Shape], given: Mapping[Any, Any]) -> dict[str, Any]:
    """The options of a schedule, each as its class holds it."""
    fields, found = options_of(cls), dict[str, Any]()
    known = ["warmup_steps", *fields]
    for key, value in given.items():
        if key not in known:
            raise OptionError(
                f"schedule {cls.name!r} has no option {shown(key)}.{_hint(cls, key, known)} Its options are "
                f"{', '.join(known)}."
            )
        if key == "warmup_steps":
            if not is_whole(value, least=0):
                raise OptionError(f"schedule: warmup_steps={shown(value)} must be an integer of at least 0.")
            found["warmup"] = Length(float(value))
        else:
            read_kind, allowed = KINDS[fields[key].metadata["kind"]]
            found[key] = read_kind(value)
            if found[key] is WRONG:
                raise OptionError(f"schedule: {key}={shown(value)} must be {allowed}.")
    if "warmup" in given and "warmup_steps" in given:
        raise OptionError(
            f"schedule {cls.name!r}: warmup={shown(given['warmup'])} and warmup_steps={shown(given['warmup_steps'])} "
            "are the same warm-up. Give one of the two."
        )
    if "monitor" in fields and "monitor" not in found:
        raise OptionError(
            f"schedule {cls.name!r} needs 'monitor', the name of a metric that the module logs, such as "
            "{name: plateau, monitor: val/loss}."
        )
    return found


def _hint(cls: type[Shape], key: Any, known: Sequence[str]) -> str:
    others = [name for name, other in SHAPES.items() if key in options_of(other)]
    if (
        isinstance(key, str)
        and key in ELSEWHERE
        and (ELSEWHERE[key].split(",")[0] in known or " of " in ELSEWHERE[key])
    ):
        return f" Write {ELSEWHERE[key]}."
    return nearest(shown(key), known) or (f" It is an option of {' and '.join(others)}." if others else "")


WRONG = object()


def _number(value: Any, holds: Callable[[float], bool]) -> Any:
    return float(value) if is_number(value) and holds(value) else WRONG


def _factor(value: Any) -> Any:
    return _number(value, lambda x: 0 <= x <= sys.float_info.max)


def _gamma(value: Any) -> Any:
    return _number(value, lambda x: 0 < x <= sys.float_info.max)


def _length(value: Any) -> Any:
    return WRONG if (length := read_length(value)) is None else length


def _duration(value: Any) -> Any:
    length = _length(value)
    return length if length is WRONG or length.amount > 0 else WRONG


def _milestones(value: Any) -> Any:
    lengths = [_duration(item) for item in value] if isinstance(value, list | tuple) else [WRONG]
    return tuple(lengths) if lengths and WRONG not in lengths else WRONG


def _momentum(value: Any) -> Any:
    pair = [_number(x, lambda x: 0 <= x < 1) for x in value] if isinstance(value, list | tuple) else []
    return (
        None if value is None else tuple(pair) if len(pair) == 2 and WRONG not in pair and pair[0] <= pair[1] else WRONG
    )


def _or_none(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else kind(value)


def _choice(*words: str) -> Callable[[Any], Any]:
    return lambda value: str(value) if isinstance(value, str) and value in words else WRONG


def _whole(least: int) -> Callable[[Any], Any]:
    return lambda value: int(value) if is_whole(value, least=least) else WRONG


# How an option of a kind is read, and what is allowed, as it completes "must be".
KINDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "length": (_length, ALLOWED),
    "duration": (_duration, f"above 0: {ALLOWED}"),
    "duration or null": (_or_none(_duration), f"above 0: {ALLOWED}, or null"),
    "milestones": (_milestones, f"a list of moments above 0, each {ALLOWED}"),
    "factor": (_factor, "a number of at least 0"),
    "factor or null": (_or_none(_factor), "a number of at least 0, or null"),
    "gamma": (_gamma, "a number above 0"),
    "gamma or null": (_or_none(_gamma), "a number above 0, or null"),
    "fraction": (lambda value: _number(value, lambda x: 0 < x <= 1), "in (0, 1]"),
    "reduction": (lambda value: _number(value, lambda x: 0 < x < 1), "in (0, 1)"),
    "multiplier": (lambda value: _number(value, lambda x: 1 <= x < math.inf), "a number of at least 1"),
    "momentum": (_momentum, "null, or the least and the largest momentum, such as [0.85, 0.95]"),
    "metric": (lambda value: str(value) if isinstance(value, str) and value else WRONG, "the name of a logged metric"),
    "count": (_whole(0), "an integer of at least 0"),
    "frequency": (_whole(1), "an integer of at least 1"),
    "flag": (lambda value: value if isinstance(value, bool) else WRONG, "true or false"),
    "cos/linear": (_choice("cos", "linear"), "'cos' or 'linear'"),
    "min/max": (_choice("min", "max"), "'min' or 'max'"),
    "rel/abs": (_choice("rel", "abs"), "'rel' or 'abs'"),
    "epoch/step": (_choice("epoch", "step"), "'epoch' or 'step'"),
}


def refuse_beside_average(
    owner: str, schedule: Shape | None, options: Mapping[str, Any], groups: Sequence[Split]
) -> None:
    """Refuse a schedule that falls, or a second warm-up, beside an optimizer that averages its iterates instead.

    Args:
        owner: The optimizer, for the message.
        schedule: The schedule, if there is one.
        options: The options of the optimizer.
        groups: The parameter groups of the user.

    Raises:
        OptionError: for such a schedule.
    """
    if schedule is not None and schedule.name != "constant":
        raise OptionError(
            f"{owner} averages its iterates instead of a schedule, and schedule {schedule.name!r} would undo that. "
            "Leave schedule out, or write {name: constant, warmup_steps: ...} for a warm-up."
        )
    of_groups = [(group.options.get("warmup_steps", 0), f" of group {group.label!r}") for group in groups]
    for steps, where in [(options.get("warmup_steps", 0), ""), *of_groups]:
        if steps and schedule is not None and schedule.warmup.amount:
            written = "warmup_steps" if schedule.warmup.unit == "steps" else "warmup"
            raise OptionError(
                f"{owner}: warmup_steps={int(steps)}{where} and {written}={schedule.warmup} of the schedule "
                "would multiply. Keep one of the two."
            )
