"""What one rank of a training holds, from a module on the meta device and its optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.callbacks.stage_callback import StageCallback
from lightning_optim.core.foreign_stages import attach
from lightning_optim.core.guards import refuse_flat, refuse_matrices, refuse_unsummable
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.names import named_parameters
from lightning_optim.distributed.placement import local
from lightning_optim.errors import OptionError
from lightning_optim.language.program import namespace
from lightning_optim.reports.memory import Entry, Kind, frozen_memory, model_memory, predicted_memory
from lightning_optim.training.lightning_names import base_of


def count(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], callbacks: Iterable[Any], cuda: bool = False
) -> list[Entry]:
    """The entries of parameters, gradients, buffers, state and what callbacks add.

    Args:
        module: A module as `placed` returns it.
        optimizers: Its optimizers.
        callbacks: The callbacks of the training.
        cuda: Whether it trains on GPUs, so that what lies on the CPU does not count.

    Raises:
        OptionError: where the strategy cannot serve an optimizer, as its first step would say.
    """
    callbacks = list(callbacks)
    for optimizer in optimizers:
        _refuse(optimizer)
    for callback in callbacks:
        if isinstance(callback, StageCallback):
            for stage, optimizer in zip(callback.stages_for(optimizers), optimizers, strict=False):
                attach(stage, optimizer)
    names: dict[Tensor, str] = {p: name for name, p in named_parameters(module)}
    for i, p in enumerate(p for o in optimizers for group in o.param_groups for p in group["params"]):
        names.setdefault(p, f"parameter {i}")  # flat
    entries: list[Entry] = []
    for optimizer in optimizers:
        entries += [*model_memory(optimizer, names, predicted=True), *predicted_memory(optimizer, names)]
    rest = frozen_memory(optimizers, names)
    trained = {name for p, name in names.items() if p.requires_grad}
    entries += rest
    entries += [_like(entry, "gradient") for entry in rest if entry.name in trained]  # backward makes them all the same
    entries += [_entry("buffer", name, x) for name, x in module.named_buffers()]
    for callback in callbacks:
        entries += _copies(callback, entries, cuda)
    return entries


def unpredicted(optimizers: Sequence[torch.optim.Optimizer]) -> list[str]:
    """Names of the optimizers of other libraries whose state cannot be told before a step."""
    others = [one for one in optimizers if not isinstance(one, Optimizer)]
    return [type(one).__name__ for one in others if not predicted_memory(one) and not _stateless(one)]


def unpredicted_note(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """What is not counted of the state of optimizers of other libraries; empty where all of it is."""
    names = ", ".join(unpredicted(optimizers))
    most = [f"{2 * one.defaults['history_size'] + 2}" for one in optimizers if isinstance(one, torch.optim.LBFGS)]
    bound = f" LBFGS grows to {most[0]} times its parameters (2 history_size + 2)." if most else ""
    return f"The state of {names} is not known before its first step, and not counted.{bound}" if names else ""


def _stateless(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] for g in optimizer.param_groups)


def _refuse(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what the first step would refuse under this strategy."""
    if not isinstance(optimizer, Optimizer):
        return
    owner = type(optimizer).__name__
    try:
        for i, p in optimizer.every_parameter():
            options = optimizer.options_of(optimizer.param_groups[i])
            scalars = {**optimizer.scalars(namespace(options), 1), **dict.fromkeys(optimizer.inputs, 0.0)}
            program = optimizer.program("update", {**options, **optimizer.traits_of(i, p), **scalars})
            refuse_unsummable(owner, program, [p])
            refuse_matrices(optimizer, program, [p])
            refuse_flat(optimizer, i, [p])
    except OptionError:
        raise
    except RuntimeError as error:
        raise OptionError(str(error)) from error


def _copies(callback: Any, entries: Sequence[Entry], cuda: bool) -> list[Entry]:
    """What Lightning's own averaging callbacks keep: a copy of the whole module on its device."""
    from lightning.pytorch import callbacks as lightning_callbacks

    averaging = getattr(lightning_callbacks, "WeightAveraging", None)  # from Lightning 2.6 on
    kinds = [lightning_callbacks.StochasticWeightAveraging, *([averaging] if averaging else [])]
    on_host = cuda and str(getattr(callback, "_device", None)) == "cpu"
    if base_of(type(callback), *kinds) is None or on_host:
        return []
    copied = [entry for entry in entries if entry.kind in ("parameter", "buffer")]
    return [_like(entry, "stage", type(callback).__name__) for entry in copied]


def _like(entry: Entry, kind: Kind, slot: str = "") -> Entry:
    return Entry(entry.group, slot or kind, entry.dtype, entry.elements, entry.bytes, kind, entry.name)


def _entry(kind: Kind, name: str, tensor: Tensor) -> Entry:
    shard = local(tensor)
    word = str(shard.dtype).removeprefix("torch.")
    return Entry(-1, kind, word, shard.numel(), shard.numel() * shard.element_size(), kind, name)
