"""Recompute batch-norm statistics for averaged weights.  Izmailov et al. 2018, arXiv:1803.05407, section 3.2."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from lightning_optim.distributed.placement import reshard
from lightning_optim.distributed.ranks import any_rank, mean_over_ranks
from lightning_optim.errors import OptionError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def batch_norm_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics of all batch normalizations of a module, by name."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        for name, buffer in layer.named_buffers(recurse=False)
    }


def copy_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set running statistics of a module to values, by name."""
    buffers = batch_norm_buffers(module)
    for name, value in values.items():
        buffers[name].copy_(value)


@torch.no_grad()
def recompute(trainer: Trainer, module: LightningModule, batches: int | None = None) -> None:
    """Replace the running statistics by the mean over training batches under the current weights.

    Batches and ranks are weighted by their number of samples. Random states, the mode of every submodule and the
    iterator of the training loader are restored. Under FSDP all ranks need the same number of batches, as in training.

    Args:
        trainer: The Trainer, during a fit.
        module: The module with batch normalizations.
        batches: Number of batches. Default: all of an epoch.

    Raises:
        OptionError: if the training loader has no batch, or batches that `inputs_of` does not support.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    momenta = [layer.momentum for layer in norms]
    modes = {layer: layer.training for layer in module.modules()}
    seen = 0
    forward = _gathering(trainer.strategy.model, module)
    module.eval()
    for layer in norms:
        layer.reset_running_stats()
        layer.train()
    try:
        with isolate_rng(), _pass(trainer) as loader, trainer.precision_plugin.forward_context():
            for batch in itertools.islice(loader, batches):
                inputs = inputs_of(trainer.precision_plugin.convert_input(batch))
                seen += len(inputs)
                for layer in norms:
                    layer.momentum = len(inputs) / seen
                forward(trainer.strategy.batch_to_device(inputs))
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
        for member, mode in modes.items():
            member.training = mode
        reshard(trainer.strategy.model)
    if any_rank(not seen):
        raise OptionError(
            "IterateAveraging: the training loader gave no batch to recompute batch-norm statistics from. Set "
            "batch_norm='keep'."
        )
    weight = seen / float(mean_over_ranks(torch.tensor(float(seen), dtype=torch.float64, device="cpu")))
    for layer in norms:
        for buffer in (layer.running_mean, layer.running_var):
            assert buffer is not None
            buffer.copy_(mean_over_ranks(buffer.double() * weight))


def _gathering(outermost: Any, module: LightningModule) -> Any:
    """The module to call for a forward pass: under FSDP1 the wrapper that gathers parameters, else the module.

    DDP's wrapper is not used, since it broadcasts the statistics of rank 0.
    """
    fully_sharded = sys.modules.get("torch.distributed.fsdp")
    wrapped = fully_sharded is not None and isinstance(outermost, fully_sharded.FullyShardedDataParallel)
    return outermost if wrapped else module


@contextmanager
def _pass(trainer: Trainer) -> Iterator[Iterator[Any]]:
    """The batches of an epoch from a new iterator. That of training may be in the middle of an epoch."""
    loader: Any = trainer.train_dataloader
    if hasattr(loader, "state_dict"):  # it remembers its position in the epoch; so make another one
        loader = trainer.fit_loop._data_source.dataloader()
        if loader is trainer.train_dataloader:
            raise OptionError(
                "IterateAveraging cannot recompute batch-norm statistics: the training loader is in the middle of its "
                "epoch, and there is no other. Give the Trainer a LightningDataModule, or a module with "
                "train_dataloader, instead of a loader with state_dict; or set batch_norm='keep'."
            )
    if not isinstance(loader, DataLoader):
        yield iter(loader)
        return
    loader = copy.copy(loader)
    vars(loader)["_iterator"] = None  # with persistent workers this is the iterator of training
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    generators = {getattr(source, "generator", None) for source in (loader, *samplers)}
    states = [(generator, generator.get_state()) for generator in generators if generator is not None]
    try:
        yield iter(loader)
    finally:
        for generator, state in states:
            generator.set_state(state)


def inputs_of(batch: Any) -> Tensor:
    """The input of the module's `forward`: the batch if it is a tensor, or the first item of a list or tuple.

    Raises:
        OptionError: for other batches.
    """
    first = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(first, Tensor):
        return first
    raise OptionError(
        f"IterateAveraging cannot tell what to give to forward from a batch of type {type(batch).__name__}: it takes a "
        "tensor, or a list whose first item is one. Set batch_norm='keep', or let the loader give such batches."
    )
