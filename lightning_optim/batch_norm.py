"""Batch-norm statistics of averaged weights, from a pass over training batches.  Izmailov et al. 2018, section 3.2."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_optim.errors import OptionError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def batch_norm_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics of all batch normalisations of a module, by name."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, part in module.named_modules()
        if isinstance(part, _BatchNorm)
        for name, buffer in part.named_buffers(recurse=False)
    }


@torch.no_grad()
def recompute(trainer: Trainer, module: LightningModule, batches: int | None = None) -> None:
    """Replace the running statistics by those of the current weights over training batches.

    A batch of b samples after n earlier ones enters with weight b / (n + b); ranks are averaged at the end. The
    run's random state, the mode of every submodule and the iterator of training are left as they were.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    momenta = [part.momentum for part in norms]
    modes = {part: part.training for part in module.modules()}
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        module.eval()
        for part in norms:
            part.reset_running_stats()
            part.train()
        seen = 0
        try:
            for batch in itertools.islice(iter(trainer.train_dataloader or ()), batches):
                inputs = inputs_of(batch)
                seen += len(inputs)
                for part in norms:
                    part.momentum = len(inputs) / seen
                module(trainer.strategy.batch_to_device(inputs))
        finally:
            for part, momentum in zip(norms, momenta, strict=True):
                part.momentum = momentum
            for member, mode in modes.items():
                member.training = mode
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for part in norms:
            for buffer in (part.running_mean, part.running_var):
                assert buffer is not None
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


def inputs_of(batch: Any) -> Tensor:
    """What the module's `forward` takes: the batch itself, or its first item where it is a sequence.

    Raises:
        OptionError: for a batch of another kind.
    """
    first = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(first, Tensor):
        return first
    raise OptionError(
        f"IterateAveraging cannot tell what to give to forward from a batch of type {type(batch).__name__}: it takes a "
        "tensor, or a list whose first item is one. Set batch_norm='keep', or let the loader give such batches."
    )
