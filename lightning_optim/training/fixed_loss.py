"""The training loss on batches that stay the same, in the middle of a fit and without a trace in it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.names import named_parameters
from lightning_optim.distributed.placement import drop_gradients, is_sharded, reshard
from lightning_optim.errors import OptionError
from lightning_optim.training import extra_pass
from lightning_optim.training.dry_run import differentiable, size_of
from lightning_optim.training.lightning_names import is_a
from lightning_optim.training.without_trace import without_trace

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

Closure = Callable[[], Tensor]


class FixedLoss:
    """The loss that `training_step` returns, on the same batches at every look.

    Dropout is off, batch normalization uses the statistics of its batch, and mixed precision is off, so that the loss
    is a function of the parameters alone. Random numbers in `training_step` come from the same seed in every call.
    The loss is the mean over the samples of this rank; products with its Hessian average over ranks.

    Args:
        trainer: The Trainer, in `on_train_start` or later in a fit.
        module: Its module.
        batches: The number of batches of this rank's loader. They stay on the device for the fit, and their loss is one
            graph: it takes as much memory as that many training steps at once.
        seed: Which batches these are. They are the same after a resume.
        owner: Who looks, for messages.

    Raises:
        OptionError: if the loader gives its batches only once, or has none.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, batches: int, seed: int, owner: str) -> None:
        self._trainer, self._module, self._seed, self._owner = trainer, module, seed, owner
        extra_pass.check(trainer, module, batches, owner, f"Or leave {owner} out.")
        with without_trace(trainer, module):
            self._batches = extra_pass.fixed(trainer, module, batches, seed)
        if not self._batches:
            raise OptionError(f"{owner}: the training loader gives no batch to look at. Leave {owner} out.")

    def parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in named_parameters(self._module) if p.requires_grad and not is_lazy(p)}

    @contextlib.contextmanager
    def look(self) -> Iterator[Closure]:
        """Inside, the closure that this gives returns the loss, as a graph. Afterwards nothing has happened."""
        trainer, module = self._trainer, self._module
        with contextlib.ExitStack() as stack:
            stack.callback(reshard, trainer.strategy.model)
            stack.enter_context(without_trace(trainer, module))
            stack.enter_context(differentiable(module))
            stack.enter_context(_kept_gradients(module))
            stack.enter_context(_full_precision(trainer))
            outermost: nn.Module = trainer.strategy.model or module
            for part in outermost.modules():
                stack.callback(setattr, part, "training", part.training)
                part.training = part.training and isinstance(part, _NormBase)
            yield self._loss

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._batches)

    def of_batch(self, i: int) -> Closure:
        """The loss of batch number i alone, for use inside `look`."""
        return lambda: self._loss(self._batches[i : i + 1])

    def _loss(self, batches: Sequence[tuple[int, Any]] | None = None) -> Tensor:
        extra_pass.seed_everywhere(self._seed)
        losses, sizes = [], []
        for index, batch in self._batches if batches is None else batches:
            output: Any = extra_pass.step(self._trainer, self._module, batch, index)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if loss is not None:
                losses.append(self._checked(loss))
                sizes.append(size_of(batch) or 1)
        if not losses:
            raise OptionError(
                f"{self._owner}: training_step returns no loss for the batches that are looked at. Return the loss "
                "from it, also where it calls manual_backward itself."
            )
        weights = torch.tensor(sizes, dtype=losses[0].dtype, device=losses[0].device)
        return torch.stack(losses) @ (weights / weights.sum())

    def _checked(self, loss: Any) -> Tensor:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss.reshape(())
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise OptionError(
            f"{self._owner}: training_step must return the loss, a tensor with one element, or it under 'loss' in a "
            f"dict; it returned {found}."
        )


@contextlib.contextmanager
def _kept_gradients(module: nn.Module) -> Iterator[None]:
    """Products under FSDP leave gradients, and would add to those that are there."""
    sharded = [p for p in module.parameters() if not is_lazy(p) and is_sharded(p)]
    before = [p.grad for p in sharded]
    drop_gradients(sharded)
    try:
        yield
    finally:
        drop_gradients(sharded)
        for p, grad in zip(sharded, before, strict=True):
            p.grad = grad


@contextlib.contextmanager
def _full_precision(trainer: Trainer) -> Iterator[None]:
    """Neither autocast nor the low precision of FSDP1: in 8 bits of mantissa curvature is noise."""
    with contextlib.ExitStack() as stack:
        plugin: Any = trainer.precision_plugin
        if is_a(plugin, MixedPrecision) or _casts(plugin):
            _put(stack, plugin, "train_step_context", contextlib.nullcontext)
        for unit in _units_of_fsdp1(trainer.strategy.model):
            handle: Any = unit._handle
            _put(stack, unit, "_use_full_prec_in_eval", True)  # which all modules are set to
            if handle is not None:
                _put(stack, handle, "_use_full_prec_in_eval", True)
                if handle._uses_reduce_mixed_precision:
                    _put(stack, handle, "_reduce_dtype", handle.flat_param.dtype)
        yield


def _casts(plugin: Any) -> bool:
    return type(plugin).__name__ == "FSDPPrecision" and str(getattr(plugin, "precision", "")).endswith("-mixed")


def _units_of_fsdp1(model: Any) -> Iterator[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(model, nn.Module):
        yield from (part for part in model.modules() if isinstance(part, fsdp.FullyShardedDataParallel))


def _put(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack closes."""
    own = vars(owner)
    stack.callback(own.__setitem__, name, own[name]) if name in own else stack.callback(own.pop, name)
    own[name] = value
