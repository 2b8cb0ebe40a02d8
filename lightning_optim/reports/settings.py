"""What a run was set to, flat and in plain words: the optimizer with its options, the schedule, and the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_optim.training.learning_rates import RATES

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer

SHOWN = ("lr", "weight_decay", "state_bits")  # of the optimizer's options, also where the config leaves them out
INTERNAL = ("_class_path", "_instantiator")  # what LightningCLI puts among the hyper-parameters


def settings(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The hyper-parameters of a fit that has begun, as a flat dict of numbers, strings and bools.

    `optimizer` is the word of the config, or the name of the class. It is followed by `lr`, `weight_decay`,
    `state_bits`, `schedule` and the options that the config sets, and by the hyper-parameters of the module and of its
    data. Those of a second optimizer begin with `1/`.
    """
    spec, found = _spec(module), dict[str, Any]()
    for i, optimizer in enumerate(trainer.optimizers):
        prefix = "" if i == 0 else f"{i}/"
        options = {name: optimizer.defaults[name] for name in SHOWN if name in optimizer.defaults}
        own = {"optimizer": spec.get("name", type(optimizer).__name__), **options}
        own |= {"schedule": schedule_of(trainer, module, optimizer)}
        given = {key: value for key, value in spec.items() if key not in ("name", "schedule")}
        if isinstance(schedule := spec.get("schedule"), Mapping):
            given |= {"schedule": {key: value for key, value in schedule.items() if key != "name"}}
        found |= {**dict(_flat(own, prefix)), **dict(_flat(given, prefix))}
    others = {**module.hparams, **getattr(getattr(trainer, "datamodule", None), "hparams", {})}
    others = {key: value for key, value in others.items() if key not in ("optimizer", *INTERNAL)}
    return {**dict(_flat(others)), **found}


def schedule_of(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> str:
    """What changes the learning rate: the word of the schedule, or the class of a scheduler, and callbacks.

    Example:
        `cosine`, `StepLR`, `constant`, `cosine-WarmupFreeSchedule`, `BatchSizeScaling`.
    """
    schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    own = [one for one in schedulers if getattr(one, "optimizer", None) is optimizer]
    classes = [*dict.fromkeys(getattr(one, "word", type(one).__name__) for one in own)]
    said = _spec(module).get("schedule")
    word = said.get("name") if isinstance(said, Mapping) else said
    names = [str(word)] if word and len(trainer.optimizers) == 1 else classes
    names += sorted(vars(vars(optimizer)[RATES])["factors"]) if RATES in vars(optimizer) else []
    return "-".join(names) or "constant"


def _spec(module: LightningModule) -> dict[str, Any]:
    """The `optimizer` among a module's hyper-parameters, if it is a word or a mapping."""
    spec: Any = module.hparams.get("optimizer")
    if isinstance(spec, str):
        return {"name": spec}
    return dict(spec) if isinstance(spec, Mapping) and "name" in spec else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names joined by `/`, and values that TensorBoard takes: others by what they print."""
    for key, given in values.items():
        if isinstance(given, Mapping):
            yield from _flat(given, f"{prefix}{key}/")
        else:
            value = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
            yield f"{prefix}{key}", value if isinstance(value, bool | int | float | str) else str(value)
