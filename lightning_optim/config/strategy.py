"""What `optimizer: adan` in a config becomes: a class, options, parameter groups, a schedule and callbacks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_optim.config import declared, freezing, routing
from lightning_optim.config import schedule as schedules
from lightning_optim.config.by_role import Roles, role_groups
from lightning_optim.config.configure import configure
from lightning_optim.config.foreign import ForeignClass, kind_of
from lightning_optim.config.reading import (
    check_together,
    complete_options,
    list_groups,
    read_group,
    read_layer_decay,
    read_options,
    read_words,
    refuse_elsewhere,
)
from lightning_optim.config.recipes import find
from lightning_optim.config.scheduler import schedulers_for
from lightning_optim.core import routing as routes
from lightning_optim.core.frozen import Waiting
from lightning_optim.distributed.communication import read as read_communication
from lightning_optim.distributed.placement import is_sharded
from lightning_optim.errors import OptionError, check, shown
from lightning_optim.language.options import plain

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


class OptimizerStrategy:
    """An optimizer as a config describes it. All options are checked at construction.

    Args:
        name: A name in `list_optimizers()`, of an optimizer or a recipe; or the path of any class of optimizers, such
            as "torch.optim.SGD", or the class.
        no_decay: Roles ("bias", "norm", "embedding") and name patterns ("head.*") of parameters without weight decay.
            Default: biases and the parameters of normalization layers; with `[]` all parameters decay.
        full_precision: Roles and name patterns of parameters whose state has 32 bits, whatever `state_bits` is.
            Default: biases, the parameters of normalization layers and embeddings.
        groups: Options for some parameters: a list of mappings with `params` (a role, a name pattern, or a list of
            them), options, and optionally a `name` for logs. For each parameter the first that matches is used.
            `lr_multiplier` is a factor on the learning rate of the optimizer.
        layer_decay: None, or the factor in (0, 1] from the learning rate of one layer to the one below; or a mapping
            with `decay` and `blocks`, names or patterns of the blocks that are layers.
        no_weight_decay: Whether parameters that `no_weight_decay()` of a module names have no weight decay.
        freeze: Roles and name patterns of parameters that do not train: `requires_grad` is set to False.
        schedule: None, or "constant", "linear", "cosine", "inverse_sqrt", "flat_linear", "step", "multi_step",
            "exponential", "one_cycle" or "cosine_restarts" over all steps of training, or a mapping with `name`,
            `warmup` (a fraction of training, a number of steps or "5 epochs") and options of the schedule, such as
            `final`, the last factor on the learning rate; "plateau" needs `monitor`. docs/schedules.md has all options.
        communication: None, or what DDP sends: "bf16", "fp16", "powersgd" or "post_local_sgd", or a mapping with
            `kind` and options of the callback `Communication`, which is added to the Trainer.
        adamw: For muon: roles ("bias", "norm", "embedding", "head") and name patterns of parameters that AdamW serves,
            which are these four by default; or a mapping with its settings `betas`, `eps` and `scale` (of `lr`), and
            such a list as `params`.
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
        /,  # so that a spec may have any key
        name: str | type[torch.optim.Optimizer],
        *,
        no_decay: Sequence[str] = ("bias", "norm"),
        full_precision: Sequence[str] = ("bias", "norm", "embedding"),
        groups: Sequence[Mapping[str, Any]] = (),
        layer_decay: float | Mapping[str, Any] | None = None,
        no_weight_decay: bool = True,
        freeze: Sequence[str] = (),
        schedule: str | Mapping[str, Any] | None = None,
        communication: str | Mapping[str, Any] | None = None,
        adamw: Sequence[str] | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.recipe = find(name)
        self.name = self.recipe.name
        self.optimizer_class: Any = self.recipe.optimizer_class
        self.kind = kind_of(self.optimizer_class)
        owner = f"optimizer {self.name!r}"
        refuse_elsewhere(owner, options, self.kind.options)
        others = ("adamw", "full_precision") if isinstance(self.kind, ForeignClass) else ("adamw",)
        also = [key for key in _defaults() if key not in others or self.kind.matrix_options]
        self.given = read_options(self.kind, options, owner, also)
        self.adamw, settings = routing.read(owner, self.kind, adamw, self.given)
        self.options = {**self.recipe.options, **self.given, **settings}
        check_together(self.kind, self.options, owner)
        self.no_decay = read_words("no_decay", no_decay)
        self.full_precision = read_words("full_precision", full_precision)
        groups = list_groups(groups)
        self.groups = [read_group(group, self.kind, self.options) for group in groups]
        self.layer_decay = read_layer_decay(layer_decay, self.kind, owner)
        check(owner, "no_weight_decay", no_weight_decay, isinstance(no_weight_decay, bool), "true or false")
        self.no_weight_decay = no_weight_decay
        self.freeze = read_words("freeze", freeze)
        self.schedule = schedules.read(schedule)
        if self.kind.own_average:
            schedules.refuse_beside_average(
                owner, self.schedule, complete_options(self.kind, self.options), self.groups
            )
        self.communication = None if communication is None else read_communication(communication)
        extras: dict[str, Any] = {"no_decay": self.no_decay, "full_precision": self.full_precision}
        extras |= {"groups": tuple(groups), "schedule": schedule, "communication": communication}
        extras |= {"adamw": adamw, "layer_decay": layer_decay, "no_weight_decay": no_weight_decay}
        extras |= {"freeze": self.freeze}
        changed = {key: value for key, value in extras.items() if value != _defaults()[key]}
        if isinstance(self.kind, ForeignClass):
            self.kind.refuse_roles(changed, self.options, owner)
        self.config: dict[str, Any] = {"name": self.name, **plain_spec({**self.given, **changed})}

    @classmethod
    def parse(cls, spec: Any, /, **changes: Any) -> OptimizerStrategy:
        """Read a name, a mapping with `name` and options, or a strategy.

        Args:
            spec: What to read.
            changes: Options that replace those of `spec`.

        Raises:
            OptionError: for anything else, and as the constructor.

        Example:
            >>> OptimizerStrategy.parse({"name": "adan", "lr": 2e-3}, lr=1e-3)
            OptimizerStrategy({'name': 'adan', 'lr': 0.001})
        """
        if isinstance(spec, OptimizerStrategy):
            if not changes:
                return spec
            spec = {**spec.config, **spec.given, "name": spec.recipe.cls or spec.name}
        if isinstance(spec, str | type):
            spec = {"name": spec}
        if isinstance(spec, Mapping) and "class_path" in spec and "name" not in spec:  # as jsonargparse writes classes
            spec = _options_of_class(spec)
        if not isinstance(spec, Mapping):
            raise OptionError(
                f"optimizer={shown(spec)} must be a word, such as adan, or a mapping, such as "
                "{name: adan, lr: 0.002}."
            )
        if "name" not in spec:
            raise OptionError(
                f"optimizer={shown(dict(spec))} has no 'name'. Write a word, such as adan, or a mapping with name and "
                "options, such as {name: adan, lr: 0.002}."
            )
        return cls(**{k if isinstance(k, str) else shown(k): value for k, value in {**spec, **changes}.items()})

    def as_config(self) -> str | dict[str, Any]:
        """The shortest spec of this strategy, of plain values that config files and checkpoints can hold."""
        return self.name if self.config == {"name": self.name} else copy.deepcopy(self.config)

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
        return [group for group in _trained(self._groups(module)) if group["params"]]

    def _groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """The same with frozen parameters, each at its place."""
        roles = Roles(self.no_decay, self.full_precision, self.adamw, self.no_weight_decay, self.layer_decay)
        return role_groups(module, self.name, self.kind, self.options, roles, self.groups)

    def create(self, model_or_params: nn.Module | Iterable[Any]) -> Any:
        """The optimizer for a module, with parameter groups by role, or for given parameters or groups.

        Parameters of the module that the spec freezes need no gradient from then on.
        """
        if isinstance(model_or_params, nn.Module):
            freezing.freeze(model_or_params, self.freeze)
        if isinstance(self.kind, ForeignClass):
            params: Any = model_or_params
            groups = self.param_groups(params) if isinstance(params, nn.Module) else params
            return self.kind.create(groups, self.options, f"optimizer {self.name!r}")
        if not isinstance(model_or_params, nn.Module):
            return self.kind(model_or_params, **self.options)
        groups = self._groups(model_or_params)
        trained = _trained(groups)
        if any(is_sharded(p) for p in model_or_params.parameters()):  # FSDP matches no empty group of a file
            trained = [group for group in trained if group["params"]]
        with routes.by_role():
            optimizer = self.kind(trained, **self.options)
        if self.kind.matrix_options:
            optimizer.reasons = routing.reasons(model_or_params, self.adamw, self.groups)
        optimizer.positions = {p: i for i, p in enumerate(model_or_params.parameters())}
        optimizer.model_order = [optimizer.positions[p] for _, p in optimizer.every_parameter()]
        for group in groups:
            options = {key: value for key, value in group.items() if key != "params"}
            optimizer.waiting += [Waiting(p, options) for p in group["params"] if not p.requires_grad]
        return optimizer

    def callbacks(self) -> list[Callback]:
        """Create the callbacks that the optimizer needs.

        Returns:
            The callbacks of the recipe, `LossInput` if the update reads the loss, `EvaluationWeights` if other weights
            are evaluated than those of training, and `Communication` if that option is set.
        """
        from lightning_optim import callbacks

        companions: list[Callback] = [getattr(callbacks, name)() for name in self.recipe.callbacks]
        if self.kind.inputs:
            companions.append(callbacks.LossInput())
        if self.kind.evaluates():
            companions.append(callbacks.EvaluationWeights())
        if self.communication is not None:
            kind, options = self.communication
            companions.append(callbacks.Communication(kind, **options))  # type: ignore[arg-type]
        return companions

    def configure(self, module: LightningModule) -> Any:
        """The return value of `configure_optimizers`: the optimizer, with a scheduler if there is a schedule.

        It warns where a callback of `callbacks` is missing in the Trainer.
        """
        freezing.refuse_if_wrapped(module, self.freeze)
        optimizer = self.create(module)
        declared.tell(module, optimizer, self.no_weight_decay)
        freezing.tell(module, self.freeze)
        return configure(module, optimizer, self.name, self.callbacks(), self.schedule)

    def schedulers(self, optimizer: torch.optim.Optimizer, trainer: Trainer) -> list[dict[str, Any]]:
        """The schedulers of an optimizer, for a `configure_optimizers` of one's own, such as one of several optimizers.

        Args:
            optimizer: An optimizer, also one of torch.
            trainer: The Trainer, which knows how long training is.

        Returns:
            Configurations as Lightning takes them: none without a schedule, two for a plateau with a warm-up.
        """
        return [] if self.schedule is None else schedulers_for(optimizer, self.schedule, trainer)


def _trained(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups without their frozen parameters.

    Those that have no others stay, empty, since schedulers take no group that comes later.
    """
    return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]


def _defaults() -> dict[str, Any]:
    """The options of a strategy that are not the optimizer's, with their defaults."""
    parameters = inspect.signature(OptimizerStrategy.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _options_of_class(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A spec from the way in which LightningCLI writes a class: `class_path` and `init_args`."""
    other = [key for key in spec if key not in ("class_path", "init_args")]
    given = spec.get("init_args", {})
    if other or not isinstance(given, Mapping):
        raise OptionError(
            f"optimizer={shown(dict(spec))} must be class_path and init_args, or a mapping with name and options, such "
            "as {name: torch.optim.SGD, lr: 0.1}."
        )
    return {"name": spec["class_path"], **given}


def plain_spec(value: Any) -> Any:
    """A spec that was checked, or a part of one, as config files and checkpoints hold it."""
    if isinstance(value, OptimizerStrategy):
        return value.as_config()
    if isinstance(value, Mapping):
        return {str(key): plain_spec(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_spec(item) for item in value]
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
        return find(value).name
    return value.item() if isinstance(value, torch.Tensor) else plain(value)


if TYPE_CHECKING:
    OptimizerSpec = OptimizerStrategy | str | Mapping[str, Any] | type[torch.optim.Optimizer]
else:
    OptimizerSpec = OptimizerStrategy  # jsonargparse reads the registered type only
