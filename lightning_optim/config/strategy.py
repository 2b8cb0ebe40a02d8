"""What `optimizer: adan` in a config becomes: a class, options, parameter groups, a schedule and callbacks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_optim import engines
from lightning_optim.config import routing
from lightning_optim.config import schedule as schedules
from lightning_optim.config.configure import configure
from lightning_optim.config.groups import Split, make_groups
from lightning_optim.config.reading import list_groups, read_group, read_words, refuse_elsewhere
from lightning_optim.config.recipes import find
from lightning_optim.core import routing as routes
from lightning_optim.core.constructor import check_own_constructor
from lightning_optim.core.frozen import Waiting
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed.communication import read as read_communication
from lightning_optim.distributed.fsdp1 import is_flat_parameter
from lightning_optim.distributed.placement import is_sharded
from lightning_optim.errors import OptionError, shown
from lightning_optim.language.options import check_options, plain

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
        groups: Options for some parameters: a list of mappings with `params` (a role, a name pattern, or a list of
            them), options, and optionally a `name` for logs. For each parameter the first that matches is used.
        schedule: None, or "constant", "linear", "cosine", "inverse_sqrt" or "flat_linear" over all steps of training,
            or a mapping with `name`, `warmup_steps` and `final` (the last factor on the learning rate).
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
        name: str,
        *,
        no_decay: Sequence[str] = ("bias", "norm"),
        full_precision: Sequence[str] = ("bias", "norm", "embedding"),
        groups: Sequence[Mapping[str, Any]] = (),
        schedule: str | Mapping[str, Any] | None = None,
        communication: str | Mapping[str, Any] | None = None,
        adamw: Sequence[str] | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.recipe = find(name)
        self.name = self.recipe.name
        self.optimizer_class: type[Optimizer] = OPTIMIZERS[self.recipe.base]
        known = self.optimizer_class.options
        owner = f"optimizer {self.name!r}"
        refuse_elsewhere(owner, options, known)
        also = [key for key in _defaults() if key != "adamw" or self.optimizer_class.matrix_options]
        self.given = check_options(options, known, owner, also)
        self.adamw, settings = routing.read(owner, self.optimizer_class, adamw, self.given)
        self.options = {**self.recipe.options, **self.given, **settings}
        check_own_constructor(self.optimizer_class, self.options, owner)
        complete = {n: self.options.get(n, option.default) for n, option in known.items()}
        self.optimizer_class.check_all({**complete})
        engines.check_name(complete["engine"])
        self.no_decay = read_words("no_decay", no_decay)
        self.full_precision = read_words("full_precision", full_precision)
        groups = list_groups(groups)
        self.groups = [read_group(group, self.optimizer_class, complete) for group in groups]
        self.schedule = schedules.read(schedule)
        if self.optimizer_class.own_average:
            schedules.refuse_beside_average(owner, self.schedule, complete, self.groups)
        self.communication = None if communication is None else read_communication(communication)
        extras: dict[str, Any] = {"no_decay": self.no_decay, "full_precision": self.full_precision}
        extras |= {"groups": tuple(groups), "schedule": schedule, "communication": communication}
        extras |= {"adamw": adamw}
        changed = {key: value for key, value in extras.items() if value != _defaults()[key]}
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
            spec = {**spec.config, **spec.given}
        if isinstance(spec, str):
            spec = {"name": spec}
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
        for name, child in module.named_modules():
            if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse:
                raise OptionError(
                    f"{name or type(child).__name__} is an embedding with sparse=True, and {self.name} keeps dense "
                    "state: make it sparse=False, or train it with torch.optim.SparseAdam."
                )
        options = self.optimizer_class.options
        plain: dict[str, Any] = {"weight_decay": 0.0} if "weight_decay" in options else {}
        if "adapt" in options:
            plain["adapt"] = False  # LARS and LAMB adapt the rate of a tensor only if it decays
        precise = {"state_bits": 32} if self._value("state_bits") != 32 else {}
        # Also split if nothing differs, so that the groups of a checkpoint are the same for all options.
        split = [Split(self.no_decay, plain, "no_decay"), Split(self.full_precision, precise, "full_precision")]
        if self.optimizer_class.matrix_options:
            split += routing.splits(module, self.adamw)
        if any(is_flat_parameter(p) for p in module.parameters()):
            if self.optimizer_class.matrix_options:
                raise OptionError(
                    f"{self.name}: FSDP1 with use_orig_params=False flattens tensors, so there are no matrices. Set "
                    "FSDPStrategy(use_orig_params=True)."
                )
            differs = [any(self._value(key) != value for key, value in part.options.items()) for part in split]
            labels = [part.label for part, other in zip(split, differs, strict=True) if part.words and other]
            if not labels:
                return make_groups(module, (), self.groups)
            raise OptionError(
                f"{self.name}: FSDP1 with use_orig_params=False flattens tensors, so biases and norms cannot be told "
                f"from weights, for {' and '.join(labels)}. Set FSDPStrategy(use_orig_params=True), or "
                f"{' and '.join(f'{label}=[]' for label in labels)}, which treats all alike."
            )
        groups = make_groups(module, split, self.groups)
        if self.optimizer_class.has_matrices():
            routing.check(self.name, self.optimizer_class, module, groups, self.options)
        return groups

    def create(self, model_or_params: nn.Module | Iterable[Any]) -> Optimizer:
        """The optimizer for a module, with parameter groups by role, or for given parameters or groups."""
        if not isinstance(model_or_params, nn.Module):
            return self.optimizer_class(model_or_params, **self.options)
        groups = self._groups(model_or_params)
        trained = _trained(groups)
        if any(is_sharded(p) for p in model_or_params.parameters()):  # FSDP matches no empty group of a file
            trained = [group for group in trained if group["params"]]
        with routes.by_role():
            optimizer = self.optimizer_class(trained, **self.options)
        if self.optimizer_class.matrix_options:
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
        if self.optimizer_class.inputs:
            companions.append(callbacks.LossInput())
        if self.optimizer_class.evaluates():
            companions.append(callbacks.EvaluationWeights())
        if self.communication is not None:
            kind, options = self.communication
            companions.append(callbacks.Communication(kind, **options))  # type: ignore[arg-type]
        return companions

    def configure(self, module: LightningModule) -> Any:
        """The return value of `configure_optimizers`: the optimizer, with a scheduler if there is a schedule.

        It warns where a callback of `callbacks` is missing in the Trainer.
        """
        return configure(module, self.create(module), self.name, self.callbacks(), self.schedule)

    def _value(self, name: str) -> Any:
        options = self.optimizer_class.options
        return self.options.get(name, options[name].default) if name in options else None


def _trained(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups without their frozen parameters.

    Those that have no others stay, empty, since schedulers take no group that comes later.
    """
    return [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]


def _defaults() -> dict[str, Any]:
    """The options of a strategy that are not the optimizer's, with their defaults."""
    parameters = inspect.signature(OptimizerStrategy.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def plain_spec(value: Any) -> Any:
    """A spec that was checked, or a part of one, as config files and checkpoints hold it."""
    if isinstance(value, OptimizerStrategy):
        return value.as_config()
    if isinstance(value, Mapping):
        return {str(key): plain_spec(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_spec(item) for item in value]
    return value.item() if isinstance(value, torch.Tensor) else plain(value)


if TYPE_CHECKING:
    OptimizerSpec = OptimizerStrategy | str | Mapping[str, Any]
else:
    OptimizerSpec = OptimizerStrategy  # jsonargparse reads the registered type only
