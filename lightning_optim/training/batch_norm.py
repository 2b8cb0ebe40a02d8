"""Recompute batch-norm statistics for averaged weights.  Izmailov et al. 2018, arXiv:1803.05407, section 3.2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.placement import is_sharded, reshard
from lightning_optim.distributed.ranks import any_rank, mean_over_ranks
from lightning_optim.training import extra_pass
from lightning_optim.training.without_trace import without_trace

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

# Layers that are random in training and have no name in torch: those of timm and torchvision.
DROPOUTS = ("Dropout", "DropPath", "DropBlock", "StochasticDepth")


def norms_of(module: nn.Module) -> dict[str, _NormBase]:
    """The normalizations of a module that keep running statistics, by name: batch and instance normalizations."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _NormBase) and layer.running_mean is not None and not is_lazy(layer.running_mean)
    }


def batch_norm_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics of all normalizations of a module, by name."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, layer in norms_of(module).items()
        for name, buffer in layer.named_buffers(recurse=False)
    }


def copy_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set running statistics of a module to values, by name."""
    buffers = batch_norm_buffers(module)
    for name, value in values.items():
        buffers[name].copy_(value)


def recompute(
    trainer: Trainer,
    module: LightningModule,
    modes: Mapping[str, bool],
    batches: int,
    changing: Iterable[Callback] = (),
    owner: str = "IterateAveraging",
) -> None:
    """Replace the running statistics by the mean over training batches under the current weights.

    `training_step` runs over the batches without a trace. Each submodule is in the mode that it has in training, except
    that there is no dropout. Statistics that training does not move are left alone: those of layers in eval mode, with
    momentum 0, or that no batch reaches. Calls of a layer and ranks are weighted by their number of samples. Under FSDP
    all ranks need the same number of batches, as in training.

    Args:
        trainer: The Trainer, during a fit.
        module: The module with batch normalizations.
        modes: Whether each submodule, by name, is in training mode in training. Others stay in the mode of now.
        batches: Number of batches; fewer if the epoch is over.
        changing: The callbacks whose `on_train_batch_start` changes a batch.
        owner: The callback that asks, for the message where there was no batch.
    """
    layers = [layer for layer in norms_of(module).values() if layer.momentum != 0]
    sharded = any(map(is_sharded, module.parameters()))  # then a backward pass must follow, if there are gradients
    with without_trace(trainer, module), torch.set_grad_enabled(not sharded):
        for name, part in module.named_modules():
            dropout = isinstance(part, _DropoutNd) or type(part).__name__.startswith(DROPOUTS)
            part.training = modes.get(name, part.training) and not dropout
        means = [_Mean(layer) for layer in layers]
        try:
            given = extra_pass.run(trainer, module, batches, changing)
        finally:
            for mean in means:
                mean.release()
            reshard(trainer.strategy.model)
    if any_rank(not given):
        rank_zero_warn(
            f"{owner}: the training loader gave no batch to recompute batch-norm statistics from, so they stay those "
            "of the weights of training. Can it be iterated again?"
        )
    elif means:
        _write(means)


@torch.no_grad()
def _write(means: Sequence[_Mean]) -> None:
    """Write the means over all ranks into the layers, except those that were not moved on any rank."""
    samples = mean_over_ranks(
        torch.tensor([float(mean.samples) for mean in means], dtype=torch.float64, device="cpu")
    ).tolist()
    for mean, average in zip(means, samples, strict=True):
        for name, buffer in mean.layer.named_buffers(recurse=False) if average else ():
            if not buffer.is_floating_point():
                buffer.copy_(mean.found.get(name, buffer))
                continue
            share = mean.found.get(name, torch.zeros_like(buffer)).double() * (mean.samples / average)
            buffer.copy_(mean_over_ranks(share))


class _Mean:
    """Makes the running statistics of a layer the mean over its calls, each weighted by its number of samples.

    Attributes:
        layer: The layer.
        samples: Number of samples in all calls that have moved the statistics.
        found: The statistics, once the layer is released; empty if no call has moved them.
    """

    def __init__(self, layer: _NormBase) -> None:
        self.layer, self.samples = layer, 0
        self.found: dict[str, Tensor] = {}
        self._momentum, self._now = layer.momentum, 0
        self._before = _copies(layer)
        before = layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        self._hooks = (before, layer.register_forward_hook(self._leave))

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        self._now = len(inputs) if layer.training else 0
        if not self._now:
            return
        if not self.samples and not all(bool(b.isfinite().all()) for b in self._before.values()):
            self.layer.reset_running_stats()  # 0 times infinity is no number
        self.layer.momentum = self._now / (self.samples + self._now)

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self._now or not (self.samples or self._moved()):  # a subclass may use its statistics in every mode
            return
        counter = self.layer.num_batches_tracked
        if not self.samples and counter is not None and counter != self._before["num_batches_tracked"]:
            counter.fill_(1)
        self.samples += self._now

    def _moved(self) -> bool:
        return any(not torch.equal(now, self._before[name]) for name, now in _copies(self.layer).items())

    def release(self) -> None:
        """Take the statistics, and leave the layer as it was but for them."""
        self.layer.momentum = self._momentum
        self.found = _copies(self.layer) if self.samples else {}
        for hook in self._hooks:
            hook.remove()


def _copies(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in layer.named_buffers(recurse=False)}
