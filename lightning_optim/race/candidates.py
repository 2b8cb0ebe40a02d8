"""Candidates of a race from specs of optimizers, with the learning rate around which each is tried."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from lightning_optim.config.command_line import read_value
from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.errors import OptionError, is_number, shown
from lightning_optim.race.candidate import Candidate

ADAMW = 1e-3  # the base where nobody names a learning rate
PARAMETERS = inspect.signature(OptimizerStrategy.__init__).parameters.values()
# Keys of a spec that are no options of an optimizer, such as its schedule.
SHARED = tuple(p.name for p in PARAMETERS if p.kind is p.KEYWORD_ONLY and p.name != "adamw")


def read_candidates(
    given: Sequence[Any], config: OptimizerStrategy | None = None, lr: float | None = None
) -> list[Candidate]:
    """Read candidates, each a word, a mapping, or a mapping as text.

    Names of candidates that differ in their learning rates only have these.

    A candidate takes what it does not say itself from the config where that is no option of an optimizer: its schedule,
    groups and roles. The word that the config has means the optimizer of the config, with all its options.

    Args:
        given: The candidates.
        config: The optimizer of the user's config.
        lr: AdamW's learning rate, on which those of others are based. By default that of the config, converted if its
            optimizer is another; else 1e-3.

    Raises:
        OptionError: for a candidate that is none, or does not take what the config says.

    Example:
        >>> [(c.name, c.lr) for c in read_candidates(["adamw", "{name: lion, weight_decay: 0.1}", "prodigy"], lr=2e-3)]
        [('adamw', 0.002), ('lion weight_decay=0.1', 0.0004), ('prodigy', 1.0)]
    """
    if lr is not None and not (is_number(lr) and 0 < lr < float("inf")):
        raise OptionError(f"lr={shown(lr)} must be a number above 0: AdamW's learning rate, on which others are based.")
    read = [_read(one, config, base_rate(config) if lr is None else float(lr), lr is not None) for one in given]
    names = [candidate.name for candidate in read]
    return [replace(c, name=f"{c.name} lr={c.lr:g}") if names.count(c.name) > 1 else c for c in read]


def base_rate(config: OptimizerStrategy | None) -> float:
    """AdamW's learning rate, as the optimizer of a config implies it.

    Example:
        >>> base_rate(OptimizerStrategy.parse({"name": "lion", "lr": 1e-4}))
        0.0005
    """
    lr = config.config.get("lr") if config is not None else None
    ratio = ratio_of(config) if config is not None else None
    return float(lr) / ratio if lr and ratio else ADAMW


def ratio_of(strategy: OptimizerStrategy) -> float | None:
    """How many times AdamW's learning rate an optimizer takes; None where it has nothing to do with that."""
    cls: type = strategy.optimizer_class
    if not issubclass(cls, Optimizer):  # a page of the same name has the same method
        cls = OPTIMIZERS.get(cls.__name__.lower(), cls)
    return getattr(cls, "lr_from_adamw", None)


def spec_at(candidate: Candidate, lr: float) -> dict[str, Any]:
    """The spec of a candidate at another learning rate; other learning rates in it change by the same factor."""
    spec, factor = {**candidate.spec, "lr": lr}, lr / candidate.lr
    if "lr_1d" in spec:
        spec["lr_1d"] *= factor
    if "groups" in spec:
        spec["groups"] = [_scaled(group, factor) for group in spec["groups"]]
    return spec


def _read(given: Any, config: OptimizerStrategy | None, base: float, asked: bool) -> Candidate:
    spec = _parse(given)
    own = given if isinstance(given, str) else shown(given)
    strategy = _strategy(own, spec)
    notes = []
    if isinstance(spec, str) and config is not None and strategy.name == config.name:
        strategy = config
        if config.config.keys() - {"name", "lr", *SHARED}:
            notes.append("Its options are those of the config.")
    elif config is not None:
        strategy, notes = _beside(own, strategy, config)
    options = {key: value for key, value in strategy.config.items() if key not in ("name", "lr")}
    of_all = {key: value for key, value in (config.config if config else {}).items() if key in SHARED}
    shown_options = [f"{k}={_short(v)}" for k, v in options.items() if of_all.get(k) != v]
    centre = None if asked and strategy is config else strategy.config.get("lr")
    ratio, name = ratio_of(strategy), " ".join([strategy.name, *shown_options])
    if centre is None:
        centre = _default(strategy) if ratio is None else base * ratio
    if not is_number(centre) or centre <= 0:
        raise OptionError(f"candidate {name!r}: lr={shown(centre)} must be a number above 0.")
    cls = strategy.optimizer_class
    if "lr_1d" in getattr(cls, "options", {}) and "lr_1d" not in options:
        options["lr_1d"] = centre / (ratio or 1.0)
    before = config.config.get("lr") if config is not None else None
    if "groups" in of_all and options.get("groups") == of_all["groups"]:
        factor = centre / float(before or (_default(config) if config else 1.0))
        options["groups"] = [_scaled(group, factor) for group in options["groups"]]
    candidate = Candidate(name, float(centre), {"name": strategy.config["name"], **options}, " ".join(notes))
    _strategy(own, spec_at(candidate, candidate.lr))
    return candidate


def _beside(own: str, strategy: OptimizerStrategy, config: OptimizerStrategy) -> tuple[OptimizerStrategy, list[str]]:
    """A candidate with what the config says for all, and what a reader should know."""
    more = {k: v for k, v in config.config.items() if k in SHARED and k not in strategy.config}
    if not more:
        return strategy, []
    try:
        return OptimizerStrategy.parse({**strategy.config, **more}), []
    except OptionError as error:
        rest = {key: value for key, value in more.items() if key != "schedule"}
        if rest != more and getattr(strategy.optimizer_class, "own_average", False):
            return _strategy(own, {**strategy.config, **rest}), ["It averages, and has no schedule."]
        words = ", ".join(more)
        raise OptionError(
            f"candidate {own!r} cannot take {words} from the config: {error} Say it for the candidate, such as "
            f"{{name: {strategy.name}, {next(iter(more))}: ...}}."
        ) from error


def _parse(given: Any) -> Any:
    if not isinstance(given, str) or not given.lstrip().startswith("{"):
        return given.strip() if isinstance(given, str) else given
    try:
        found = yaml.safe_load(given)
    except yaml.YAMLError as error:
        raise OptionError(f"candidate {shown(given)} is no mapping: write it as '{{name: lion, lr: 1e-4}}'.") from error
    return _numbers(found)


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else read_value(value)


def _strategy(own: str, spec: Any) -> OptimizerStrategy:
    try:
        return OptimizerStrategy.parse(spec)
    except OptionError as error:
        raise OptionError(f"candidate {own!r}: {error}") from error


def _default(strategy: OptimizerStrategy) -> float:
    """The default learning rate of an optimizer's class."""
    cls: Any = strategy.optimizer_class
    if issubclass(cls, Optimizer):
        found: Any = strategy.options.get("lr", cls.options["lr"].default)
    else:
        parameter = inspect.signature(cls).parameters.get("lr")
        found = None if parameter is None else parameter.default
    return float(found) if is_number(found) else ADAMW


def _scaled(group: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {key: value * factor if key == "lr" else value for key, value in group.items()}


def _short(value: Any) -> str:
    """A value in a name.

    Example:
        >>> _short([0.9, 0.99]), _short({"name": "cosine"})
        ('[0.9,0.99]', '{name:cosine}')
    """
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_short, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
