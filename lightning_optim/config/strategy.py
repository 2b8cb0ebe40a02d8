"""What `optimizer: adan` in a config becomes: a class, options, parameter groups, a schedule and callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_optim import engines
from lightning_optim.config import schedule as schedules
from lightning_optim.config.groups import make_groups
from lightning_optim.config.recipes import find
from lightning_optim.config.schedule import scheduler_for
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed.communication import read as read_communication
from lightning_optim.distributed.fsdp1 import is_flat_parameter
from lightning_optim.errors import OptionError
from lightning_optim.language.options import check_options

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule


class OptimizerStrategy:
    """An optimizer as a config describes it. All options are checked at construction.

    Args:
        name: A name in `list_optimizers()`: of an optimizer or a recipe.
        no_decay: Roles ("bias", "norm", "embedding") and name patterns ("head.*") of parameters without weight decay.
            Default: biases and the parameters of normalization layers; with `[]` all parameters decay.
        full_precision: Roles and name patterns of parameters whose state has 32 bits, whatever `state_bits` is.
            Default: biases, the parameters of normalization layers and embeddings.
        groups: Options for some parameters: a list of mappings with `params` (a role or name pattern) and options. For
            each parameter the first that matches is used.
        schedule: None, or "constant", "linear", "cosine", "inverse_sqrt" or "flat_linear" over all steps of training,
            or a mapping with `name`, `warmup_steps` and `final` (the last factor on the learning rate).
        communication: None, or what DDP sends: "bf16", "fp16", "powersgd" or "post_local_sgd", or a mapping with
            `kind` and options of the callback `Communication`, which is added to the Trainer.
        options: Options of the optimizer.

    Raises:
        OptionError: for an unknown name or option, or a value of the wrong type or out of range.

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
        self.given = check_options(options, known, f"optimizer {self.name!r}", also=list(_defaults()))
        self.options = {**self.recipe.options, **self.given}
        complete = {n: self.options.get(n, option.default) for n, option in known.items()}
        self.optimizer_class.check(complete)
        engines.check_name(complete["engine"])
        self.no_decay = _patterns("no_decay", no_decay)
        self.full_precision = _patterns("full_precision", full_precision)
        if isinstance(groups, str | Mapping) or not isinstance(groups, Iterable):
            raise OptionError(f"groups={groups!r} must be a list of mappings, each with 'params' and options.")
        self.groups = [self._override(group) for group in groups]
        self.schedule = schedules.read(schedule)
        self.communication = None if communication is None else read_communication(communication)
        extras = {"no_decay": no_decay, "full_precision": full_precision, "groups": groups, "schedule": schedule}
        extras["communication"] = communication
        changed = {k: v for k, v in extras.items() if v != _defaults()[k]}
        self.config: dict[str, Any] = {"name": self.name, **options, **changed}

    @classmethod
    def parse(cls, spec: Any) -> OptimizerStrategy:
        """Read a name, a mapping with `name` and options, or a strategy.

        Raises:
            OptionError: for anything else, and as the constructor.
        """
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
        """The shortest spec of this strategy, of plain values that config files and checkpoints can hold."""
        return self.name if self.config == {"name": self.name} else dict(self.config)

    def __repr__(self) -> str:
        return f"OptimizerStrategy({self.as_config()!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OptimizerStrategy) and self.config == other.config

    def __hash__(self) -> int:
        return hash(repr(self.config))

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """The trainable parameters of a module in parameter groups by role and name pattern.

        Raises:
            OptionError: for a sparse embedding, a pattern without a match, or flat parameters of FSDP1 that cannot be
                split by role.
        """
        for name, child in module.named_modules():
            if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse:
                raise OptionError(
                    f"{name or type(child).__name__} is an embedding with sparse=True, and {self.name} keeps dense "
                    "state: make it sparse=False, or train it with torch.optim.SparseAdam."
                )
        options = self.optimizer_class.options
        plain: dict[str, Any] = {"weight_decay": 0.0} if self._value("weight_decay") else {}
        if "adapt" in options:
            plain["adapt"] = False  # LARS and LAMB adapt the rate of a tensor only if it decays
        precise = {"state_bits": 32} if self._value("state_bits") != 32 else {}
        # Also split if nothing differs, so that the groups of a checkpoint are the same for all options.
        split = [(self.no_decay, plain, "no_decay"), (self.full_precision, precise, "full_precision")]
        if any(is_flat_parameter(p) for p in module.parameters()):
            labels = [label for words, changed, label in split if words and changed]
            if not labels:
                return make_groups(module, (), self.groups)
            raise OptionError(
                f"{self.name}: FSDP1 with use_orig_params=False flattens tensors, so biases and norms cannot be told "
                f"from weights, for {' and '.join(labels)}. Set FSDPStrategy(use_orig_params=True), or "
                f"{' and '.join(f'{label}=[]' for label in labels)}, which treats all alike."
            )
        return make_groups(module, split, self.groups)

    def create(self, model_or_params: nn.Module | Iterable[Any]) -> Optimizer:
        """The optimizer for a module, with parameter groups by role, or for given parameters or groups."""
        if not isinstance(model_or_params, nn.Module):
            return self.optimizer_class(model_or_params, **self.options)
        optimizer = self.optimizer_class(self.param_groups(model_or_params), **self.options)
        positions: dict[Any, int] = {p: i for i, p in enumerate(model_or_params.parameters())}
        optimizer.model_order = [positions[p] for _, p in optimizer.every_parameter()]
        return optimizer

    def callbacks(self) -> list[Callback]:
        """Create the callbacks that the optimizer needs.

        Returns:
            The callbacks of the recipe, `LossInput` if the update reads the loss, and `Communication` if that option is
            set.
        """
        from lightning_optim.callbacks import Communication, LossInput

        companions = [make() for make in self.recipe.callbacks]
        if self.optimizer_class.inputs:
            companions.append(LossInput())
        if self.communication is not None:
            kind, options = self.communication
            companions.append(Communication(kind, **options))  # type: ignore[arg-type]
        return companions

    def configure(self, module: LightningModule) -> Any:
        """The return value of `configure_optimizers`: the optimizer, with a scheduler if there is a schedule."""
        optimizer = self.create(module)
        if self.schedule is None:
            return optimizer
        scheduler = scheduler_for(optimizer, self.schedule, module.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _value(self, name: str) -> Any:
        options = self.optimizer_class.options
        return self.options.get(name, options[name].default) if name in options else None

    def _override(self, group: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), str):
            raise OptionError(f"groups: {group!r} needs 'params', a role or a pattern of names such as 'head.*'.")
        rest = {key: value for key, value in group.items() if key != "params"}
        return group["params"], check_options(rest, self.optimizer_class.options, f"group {group['params']!r}")


def _defaults() -> dict[str, Any]:
    """The options of a strategy that are not the optimizer's, with their defaults."""
    parameters = inspect.signature(OptimizerStrategy.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def create_optimizer(spec: Any, model_or_params: nn.Module | Iterable[Any]) -> Optimizer:
    """An optimizer from its name or a mapping, for a module or for parameters.

    For a module, biases and the parameters of normalization layers have no weight decay (see `no_decay` of
    `OptimizerStrategy`). The callbacks of a recipe are not created; `ConfiguredOptimizer` adds them to a Trainer.

    Args:
        spec: `"adan"`, `{"name": "adan", "lr": 2e-3}` or an `OptimizerStrategy`.
        model_or_params: A module, or parameters or parameter groups as for `torch.optim`.

    Raises:
        OptionError: for an unknown name or option, or a value of the wrong type or out of range.

    Example:
        >>> optimizer = create_optimizer({"name": "adamw", "lr": 1e-3}, nn.Linear(2, 2))
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.01, 0.0]
    """
    return OptimizerStrategy.parse(spec).create(model_or_params)


def _patterns(option: str, words: Any) -> tuple[str, ...]:
    listed = isinstance(words, Iterable) and not isinstance(words, str | Mapping)
    if not listed or not all(isinstance(word, str) for word in words):
        raise OptionError(f"{option}={words!r} must be a list of roles (bias, norm, embedding) or name patterns.")
    return tuple(words)


def _register_with_jsonargparse() -> None:
    """Let jsonargparse read a name or a mapping wherever a signature has the type OptimizerStrategy."""
    try:
        from jsonargparse.typing import register_type
    except ImportError:  # it is only needed for config files
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
    OptimizerSpec = OptimizerStrategy  # jsonargparse reads the registered type only
