"""What `optimizer: adan` in a config becomes: class, options, parameter groups, schedule, companion callbacks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_optim import engines
from lightning_optim.config.groups import make_groups
from lightning_optim.config.recipes import RECIPES, Recipe
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed.communication import read as read_communication
from lightning_optim.distributed.fsdp1 import is_flat_parameter
from lightning_optim.errors import OptionError, nearest
from lightning_optim.language.options import check_options
from lightning_optim.training.schedules import SCHEDULES, factor, total_steps

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule

KEYS = ("name", "no_decay", "full_precision", "groups", "schedule", "communication")
SCHEDULE_KEYS = ("name", "warmup_steps", "final")


class OptimizerStrategy:
    """An optimizer as a config describes it, checked when it is read.

    Args:
        name: A word of `list_optimizers()`: an optimizer or a recipe.
        no_decay: Roles ("bias", "norm", "embedding") and name patterns ("head.*") of parameters that do not decay.
            By default biases and the parameters of normalisation layers; `[]` lets everything decay.
        full_precision: The same for parameters whose state stays in 32 bits when `state_bits` says less; by default
            biases, normalisation layers and embeddings.
        groups: Options for some parameters: a list of mappings with `params` (a role or name pattern) and options.
            The first that matches a parameter counts.
        schedule: None, or "constant", "linear", "cosine", "inverse_sqrt" or "flat_linear" over all steps of the
            training; or a mapping with `name`, `warmup_steps` and `final` (the last factor on the learning rate).
        communication: None, or what the ranks of DDP send each other: "bf16", "fp16", "powersgd" or "post_local_sgd",
            or a mapping with `kind` and options of the callback `Communication`, which it brings.
        options: Options of the optimizer.

    Raises:
        OptionError: for an unknown name or option, or one that is ill-typed or out of range.

    Example:
        >>> OptimizerStrategy.parse({"name": "adan", "lr": 2e-3})
        OptimizerStrategy({'name': 'adan', 'lr': 0.002})
        >>> OptimizerStrategy.parse("adam2")
        Traceback (most recent call last):
        ...
        lightning_optim.errors.OptionError: There is no optimizer named 'adam2'. Did you mean adam...
    """

    def __init__(
        self,
        name: str,
        *,
        no_decay: Sequence[str] = ("bias", "norm"),
        full_precision: Sequence[str] = ("bias", "norm", "embedding"),
        groups: Sequence[Mapping[str, Any]] = (),
        schedule: str | Mapping[str, Any] | None = None,
        communication: str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.recipe = find(name)
        self.name = self.recipe.name
        self.optimizer_class: type[Optimizer] = OPTIMIZERS[self.recipe.base]
        known = self.optimizer_class.options
        self.given = check_options(options, known, f"optimizer {self.name!r}", also=KEYS[1:])
        self.options = {**self.recipe.options, **self.given}
        complete = {n: self.options.get(n, option.default) for n, option in known.items()}
        self.optimizer_class.check(complete)
        engines.known(complete["engine"])
        self.no_decay = _words("no_decay", no_decay)
        self.full_precision = _words("full_precision", full_precision)
        if isinstance(groups, str | Mapping) or not isinstance(groups, Iterable):
            raise OptionError(f"groups={groups!r} must be a list of mappings, each with 'params' and options.")
        self.groups = [self._override(group) for group in groups]
        self.schedule = _schedule(schedule)
        self.communication = None if communication is None else read_communication(communication)
        extras = {"no_decay": no_decay, "full_precision": full_precision, "groups": groups, "schedule": schedule}
        defaults = {"no_decay": ("bias", "norm"), "full_precision": ("bias", "norm", "embedding"), "groups": ()}
        extras["communication"] = communication
        changed = {k: v for k, v in extras.items() if v != defaults.get(k)}
        self.config: dict[str, Any] = {"name": self.name, **options, **changed}

    @classmethod
    def parse(cls, spec: Any) -> OptimizerStrategy:
        """Read a word, a mapping with `name` and options, or a strategy itself."""
        if isinstance(spec, OptimizerStrategy):
            return spec
        if isinstance(spec, str):
            return cls(spec)
        if isinstance(spec, Mapping):
            if "name" not in spec:
                raise OptionError(
                    f"optimizer={dict(spec)!r} has no 'name'. Write a word, such as adan, or a mapping with name and "
                    "options, such as {name: adan, lr: 0.002}."
                )
            return cls(**{str(key): value for key, value in spec.items()})
        raise OptionError(
            f"optimizer={spec!r} must be a word, such as adan, or a mapping, such as {{name: adan, lr: 0.002}}."
        )

    def as_config(self) -> str | dict[str, Any]:
        """The shortest spec that parses to this strategy: plain values, fit for a config file or a checkpoint."""
        return self.name if self.config == {"name": self.name} else dict(self.config)

    def __repr__(self) -> str:
        return f"OptimizerStrategy({self.as_config()!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OptimizerStrategy) and self.config == other.config

    def __hash__(self) -> int:
        return hash(repr(self.config))

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """The trainable parameters of a module, sorted into groups by role and name pattern."""
        for name, part in module.named_modules():
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
                raise OptionError(
                    f"{name or type(part).__name__} is an embedding with sparse=True, and {self.name} keeps dense "
                    "state: make it sparse=False, or train it with torch.optim.SparseAdam."
                )
        options = self.optimizer_class.options
        plain: dict[str, Any] = {"weight_decay": 0.0} if self._value("weight_decay") else {}
        if "adapt" in options:
            plain["adapt"] = False  # layer-wise rates are not for vectors that do not decay either
        precise = {"state_bits": 32} if self._value("state_bits") != 32 else {}
        # Also where a split changes nothing: the groups of a checkpoint are the same for all options.
        split = [(self.no_decay, plain, "no_decay"), (self.full_precision, precise, "full_precision")]
        if any(is_flat_parameter(p) for p in module.parameters()):
            labels = [label for words, changed, label in split if words and changed]
            if not labels:
                return make_groups(module, (), self.groups)
            raise OptionError(
                f"{self.name}: FSDP1 with use_orig_params=False fuses tensors, so biases and norms cannot be told from "
                f"weights, for {' and '.join(labels)}. Set FSDPStrategy(use_orig_params=True), or "
                f"{' and '.join(f'{label}=[]' for label in labels)}, which treats all alike."
            )
        return make_groups(module, split, self.groups)

    def create(self, model_or_params: nn.Module | Iterable[Any]) -> Optimizer:
        """The optimizer for a module, with groups by role, or for parameters as they are given."""
        if not isinstance(model_or_params, nn.Module):
            return self.optimizer_class(model_or_params, **self.options)
        optimizer = self.optimizer_class(self.param_groups(model_or_params), **self.options)
        places: dict[Any, int] = {p: place for place, p in enumerate(model_or_params.parameters())}
        optimizer.model_order = [places[p] for _, p in optimizer.every_parameter()]
        return optimizer

    def callbacks(self) -> list[Callback]:
        """Fresh companion callbacks: those of the recipe, and what supplies the loss where the update reads it."""
        found = [make() for make in self.recipe.callbacks]
        if self.optimizer_class.inputs:
            from lightning_optim.callbacks import LossInput

            found.append(LossInput())
        if self.communication is not None:
            from lightning_optim.callbacks import Communication

            kind, options = self.communication
            found.append(Communication(kind, **options))  # type: ignore[arg-type]
        return found

    def configure(self, module: LightningModule) -> Any:
        """What `configure_optimizers` returns: the optimizer, with its schedule where there is one."""
        optimizer = self.create(module)
        if self.schedule is None:
            return optimizer
        shape, warmup, final = (self.schedule[key] for key in SCHEDULE_KEYS)
        trainer = module.trainer
        endless = shape != "constant" and trainer.max_epochs == -1 and trainer.max_steps == -1

        @functools.cache
        def total() -> float:
            steps = math.inf if endless else total_steps(trainer)
            if not math.isfinite(steps):
                raise OptionError(
                    f"schedule {shape!r} needs to know how long training is: the trainer has neither max_epochs nor "
                    "max_steps, or an epoch has no length. Set max_steps."
                )
            return steps

        def now(step: int) -> float:
            # Asked late: to know the number of steps the Trainer sets up the loader, and while it is still to load a
            # checkpoint, that loader would begin an epoch which the run is in the middle of.
            steps = total() if step > warmup and shape != "constant" else math.inf
            return factor(SCHEDULES[shape], step, steps, warmup, final)

        if endless:
            total()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, now)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _value(self, name: str) -> Any:
        options = self.optimizer_class.options
        return self.options.get(name, options[name].default) if name in options else None

    def _override(self, group: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), str):
            raise OptionError(f"groups: {group!r} needs 'params', a role or a pattern of names such as 'head.*'.")
        rest = {key: value for key, value in group.items() if key != "params"}
        return group["params"], check_options(rest, self.optimizer_class.options, f"group {group['params']!r}")


def find(name: str) -> Recipe:
    """The recipe of a name; an optimizer by itself is a recipe without extras."""
    word = str(name)
    if word in RECIPES:
        return RECIPES[word]
    if word in OPTIMIZERS:
        return Recipe(name=word, base=word)
    by_class = {cls.__name__: known for known, cls in OPTIMIZERS.items()}
    hint = f" Did you mean {by_class[word]}?" if word in by_class else nearest(word, list_optimizers())
    raise OptionError(f"There is no optimizer named {name!r}.{hint} There are {', '.join(list_optimizers())}.")


def list_optimizers(pattern: str | None = None) -> list[str]:
    """The words that a config may use, sorted; with a pattern, those that match it.

    Example:
        >>> list_optimizers("adam*")
        ['adam', 'adamax', 'adamw']
    """
    import fnmatch

    names = sorted({*OPTIMIZERS, *RECIPES})
    return names if pattern is None else fnmatch.filter(names, pattern)


def create_optimizer(spec: Any, model_or_params: nn.Module | Iterable[Any]) -> Optimizer:
    """An optimizer from a word or a mapping, for a module or for parameters.

    Given a module, biases and the parameters of normalisation layers do not decay (`no_decay` changes that). The
    callbacks of a recipe come with `OptimizerStrategy` in a Trainer only.

    Args:
        spec: `"adan"`, `{"name": "adan", "lr": 2e-3}` or an `OptimizerStrategy`.
        model_or_params: A module, or what `torch.optim` takes as parameters.

    Raises:
        OptionError: for an unknown name or option, or one that is ill-typed or out of range.

    Example:
        >>> optimizer = create_optimizer({"name": "adamw", "lr": 1e-3}, nn.Linear(2, 2))
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.01, 0.0]
    """
    return OptimizerStrategy.parse(spec).create(model_or_params)


def _words(what: str, words: Any) -> tuple[str, ...]:
    listed = isinstance(words, Iterable) and not isinstance(words, str | Mapping)
    if not listed or not all(isinstance(word, str) for word in words):
        raise OptionError(f"{what}={words!r} must be a list of roles (bias, norm, embedding) or name patterns.")
    return tuple(words)


def _schedule(given: Any) -> dict[str, Any] | None:
    if given is None:
        return None
    if not isinstance(given, str | Mapping):
        raise OptionError(
            f"schedule={given!r} must be one of {', '.join(SCHEDULES)}, or a mapping with {', '.join(SCHEDULE_KEYS)}."
        )
    given = {"name": given} if isinstance(given, str) else dict(given)
    for key in given:
        if key not in SCHEDULE_KEYS:
            hint = nearest(key, SCHEDULE_KEYS)
            raise OptionError(f"schedule has no option {key!r}.{hint} Its options are {', '.join(SCHEDULE_KEYS)}.")
    if given.get("name") not in SCHEDULES:
        hint = nearest(str(given.get("name")), SCHEDULES)
        raise OptionError(f"schedule {given.get('name')!r} is not one of {', '.join(SCHEDULES)}.{hint}")
    warmup, final = given.get("warmup_steps", 0), given.get("final", 0.0)
    if type(warmup) is not int or warmup < 0:
        raise OptionError(f"schedule: warmup_steps={warmup!r} must be an integer of at least 0.")
    if type(final) not in (int, float) or not 0 <= final < math.inf:
        raise OptionError(f"schedule: final={final!r} must be a number of at least 0.")
    return {"name": given["name"], "warmup_steps": warmup, "final": float(final)}


def _register_with_jsonargparse() -> None:
    """Let parsers of configs take a word or a mapping wherever a signature says OptimizerStrategy."""
    try:
        from jsonargparse.typing import register_type
    except ImportError:  # the package is of use without a parser of configs
        return
    register_type(
        OptimizerStrategy,
        serializer=OptimizerStrategy.as_config,
        deserializer=OptimizerStrategy.parse,
        deserializer_exceptions=(OptionError,),
        type_check=lambda value, hint: isinstance(value, hint),
    )


_register_with_jsonargparse()

if TYPE_CHECKING:
    OptimizerSpec = OptimizerStrategy | str | Mapping[str, Any]
else:
    OptimizerSpec = OptimizerStrategy  # parsers need the one type that they know how to read
