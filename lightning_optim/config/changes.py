"""Changes of a spec that was read before: one option, a place in a list, an option of a group, another name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_optim.config import schedule as schedules
from lightning_optim.config.foreign import Kind, kind_of
from lightning_optim.config.reading import read_options
from lightning_optim.config.recipes import find
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.distributed.communication import read as read_communication
from lightning_optim.errors import OptionError, nearest, shown

# Keys whose value is a word, or a mapping with the word under this name.
WORDS = {"schedule": "name", "communication": "kind", "layer_decay": "decay"}
LISTS = ("no_decay", "full_precision", "freeze")  # lists of roles and patterns
WARMUPS = {"warmup", "warmup_steps"}  # two ways to write the same
READERS: dict[str, Callable[[Any], Any]] = {"schedule": schedules.read, "communication": read_communication}


def changed(previous: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A spec with other options; `schedule: {final: 0.1}` changes one option of the schedule, `groups+` appends.

    Args:
        previous: The spec before.
        changes: Options, as in a config.

    Example:
        >>> changed({"name": "adan", "schedule": "cosine"}, {"lr": 1e-3, "schedule": {"final": 0.1}})
        {'name': 'adan', 'schedule': {'name': 'cosine', 'final': 0.1}, 'lr': 0.001}
    """
    strategy = OptimizerStrategy.parse(previous)
    before = strategy.config
    merged: dict[str, Any] = {**before}
    for key, value in changes.items():
        if key in ("groups+", *(f"{name}+" for name in LISTS)):
            key = key.removesuffix("+")
            value = [*merged.get(key, getattr(strategy, key)), *(value if isinstance(value, list) else [value])]
        if key == "adamw+":
            key, value = "adamw", {"params": [*strategy.adamw, *(value if isinstance(value, list) else [value])]}
        if key == "adamw" and isinstance(value, Mapping):
            old = before.get(key) or {}
            value = {**(old if isinstance(old, Mapping) else {"params": old}), **value}
        word, old = WORDS.get(key, ""), before.get(key)
        whole = isinstance(value, Mapping) and word in value and key in READERS  # another schedule, not an option
        if word and isinstance(value, Mapping) and not whole and old is not None:
            same = WARMUPS if WARMUPS & value.keys() else set()
            kept = (
                {word: old} if not isinstance(old, Mapping) else {name: old[name] for name in old if name not in same}
            )
            value = {**kept, **value}
        merged[key] = value
    return merged


def changed_at(previous: Any, path: Sequence[str], value: Any) -> dict[str, Any]:
    """A spec with another value at one place.

    Args:
        previous: The spec before.
        path: Where: `["lr"]`, `["betas", "0"]`, `["schedule", "final"]`, or `["groups", "head", "lr"]` with the index
            or the name of a group. At `["name"]`, and at the word of a schedule or of communication, the options stay
            that the new one takes; of others it is said that they are left out.
        value: The value.

    Raises:
        OptionError: for a place that does not exist.

    Example:
        >>> changed_at({"name": "adamw", "betas": [0.9, 0.99]}, ["betas", "1"], 0.95)
        {'name': 'adamw', 'betas': [0.9, 0.95]}
    """
    strategy = OptimizerStrategy.parse(previous)
    key, *rest = path
    if not rest:
        return _renamed(strategy, value) if key == "name" else changed(strategy, {key: value})
    if key == "groups":
        return changed(strategy, {key: _in_groups(strategy, rest, value)})
    if key in READERS and rest == [WORDS[key]]:
        return changed(strategy, {key: _reworded(key, strategy.config.get(key), value)})
    if key in LISTS and len(rest) == 1:
        return changed(strategy, {key: _at_index(key, getattr(strategy, key), rest[0], value)})
    if isinstance(old := _value_of(strategy, key), list | tuple) and len(rest) == 1:
        return changed(strategy, {key: _at_index(key, old, rest[0], value)})
    if key == "schedule" and strategy.schedule is not None:
        rest, value = _in_schedule(strategy, rest, value)
    for part in reversed(rest):
        value = {part: value}
    return changed(strategy, {key: value})


def _renamed(strategy: OptimizerStrategy, name: Any) -> dict[str, Any]:
    """The spec of another optimizer with those options of this one that it takes."""
    recipe = find(name)
    kind = kind_of(recipe.optimizer_class)
    kept = {key: value for key, value in strategy.config.items() if key != "name"}
    dropped = [key for key in strategy.given if not _takes(kind, key, strategy.given[key])]
    dropped += ["full_precision"] if "full_precision" in kept and "state_bits" not in kind.options else []
    dropped += ["adamw"] if "adamw" in kept and not kind.matrix_options else []
    groups = []
    for group, split in zip(kept.get("groups", ()), strategy.groups, strict=True):
        wrong = [key for key in group if key in split.options and not _takes(kind, key, split.options[key])]
        groups.append({key: value for key, value in group.items() if key not in wrong})
        dropped += [f"{key} of group {split.label!r}" for key in wrong]
    if groups:
        kept["groups"] = groups
    if dropped:
        _say(f"optimizer {recipe.name!r} does not take {', '.join(dropped)}, set for {strategy.name!r} before", dropped)
    return {"name": recipe.name, **{key: value for key, value in kept.items() if key not in dropped}}


def _takes(kind: Kind, key: str, value: Any) -> bool:
    return not _fails(lambda options: read_options(kind, options, ""), {key: value})


def _reworded(key: str, old: Any, word: Any) -> Any:
    """Another schedule, or another way of communication, with those options that it takes."""
    name, read = WORDS[key], READERS[key]
    options = {option: value for option, value in old.items() if option != name} if isinstance(old, Mapping) else {}
    least = {name: word, **{option: options[option] for option in options if option == "monitor" and word == "plateau"}}
    read(least)  # which says what is wrong with the word itself
    dropped = [option for option, value in options.items() if _fails(read, {**least, option: value})]
    if dropped:
        _say(f"{key} {word!r} does not take {', '.join(dropped)}, set before", dropped)
    return {name: word, **{option: value for option, value in options.items() if option not in dropped}}


def _fails(read: Callable[[Any], Any], spec: Any) -> bool:
    try:
        read(spec)
    except OptionError:
        return True
    return False


def _say(what: str, dropped: Sequence[str]) -> None:
    from lightning.pytorch.utilities import rank_zero_warn  # importing Lightning takes seconds

    rank_zero_warn(f"{what}: {'it is' if len(dropped) == 1 else 'they are'} left out.")


def _in_groups(strategy: OptimizerStrategy, path: Sequence[str], value: Any) -> list[Any]:
    """The groups with another option in one of them: `["0", "lr"]`, `["head", "lr"]` or `["net", "*", "lr"]`."""
    groups = list(strategy.config.get("groups", ()))
    labels = [split.label for split in strategy.groups]
    # A label may have dots, and so may an option: `groups.net.0.*.betas.1`.
    ends = [n for n in range(len(path) - 1, 0, -1) if ".".join(path[:n]) in labels or (n == 1 and path[0].isdecimal())]
    at = ends[0] if ends else max(len(path) - 1, 1)
    word, (option, *inside) = ".".join(path[:at]), path[at:] or [""]
    if not groups:
        raise OptionError(
            f"groups.{'.'.join(path)}: {strategy.name} has no groups here. Append one, as in "
            "groups+='{params: head.*, lr: 1e-4}'."
        )
    index = labels.index(word) if word in labels else int(word) if word.isdecimal() else -1
    if not option or len(inside) > 1 or not 0 <= index < len(groups):
        there = ", ".join(f"{i} ({label})" for i, label in enumerate(labels))
        raise OptionError(
            f"groups.{'.'.join(path)}: write groups.GROUP.OPTION, with the index or the name of a group: {there}."
            f"{'' if word.isdecimal() else nearest(word, labels)}"
        )
    name = option.removesuffix("+")
    old = groups[index].get(name, _value_of(strategy, name))
    old = [old] if name == "params" and isinstance(old, str) else old
    if name != option and isinstance(old, list | tuple):
        option, value = name, [*old, *(value if isinstance(value, list) else [value])]
    elif inside:
        value = _at_index(f"groups.{word}.{option}", old, inside[0], value)
    groups[index] = {**groups[index], option: value}
    return groups


def _in_schedule(strategy: OptimizerStrategy, path: Sequence[str], value: Any) -> tuple[list[str], Any]:
    """The option of a schedule, and its value, for a place in a list: `["milestones", "0"]` or `["milestones+"]`."""
    (option, *inside), given = path, strategy.config["schedule"]
    name = option.removesuffix("+")
    old = given.get(name) if isinstance(given, Mapping) else None
    default = getattr(strategy.schedule, name, None)
    if old is None and isinstance(default, tuple):  # of moments, which are fractions
        old = [moment.amount for moment in default]
    if name != option and isinstance(old, list | tuple):
        return [name], [*old, *(value if isinstance(value, list) else [value])]
    if len(inside) == 1:
        return [name], _at_index(f"schedule.{name}", old, inside[0], value)
    return [*path], value


def _value_of(strategy: OptimizerStrategy, key: str) -> Any:
    """The value of an option of the optimizer, given or by default; None for another key."""
    option = strategy.kind.options.get(key)
    return strategy.options.get(key, option.default if option is not None else None)


def _at_index(key: str, old: Any, index: str, value: Any) -> list[Any]:
    if not isinstance(old, list | tuple):
        raise OptionError(f"{key}.{index}: {key}={shown(old)} is no list. Write {key} without an index.")
    if not index.isdecimal() or int(index) >= len(old):
        raise OptionError(
            f"{key}.{index}: {key}={shown(list(old))} has {len(old)} values, {key}.0 to {key}.{len(old) - 1}."
        )
    return [value if i == int(index) else item for i, item in enumerate(old)]
