"""The memory of activations, by two batches on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_optim.errors import OptionError, first_line, is_whole, shown
from lightning_optim.estimate.placing import quiet
from lightning_optim.estimate.spread import Spread
from lightning_optim.training.lightning_names import is_a, overrides

# A CPU has no float16 arithmetic for all layers; bfloat16 takes as many bytes.
ON_CPU = {"16-mixed": "bf16-mixed", "16-true": "bf16-true"}


def measure(
    make: nn.Module | Callable[[], nn.Module], data: Any, spread: Spread, batch_size: int | None, notes: list[str]
) -> int:
    """Bytes that a training step holds beside parameters, gradients, buffers and state, at most at a time.

    The module is built on the CPU and runs two batches there, without steps of the optimizer. The second counts: in
    its forward pass the gradients of the first are still there, as in a training.

    Args:
        make: Makes the module.
        data: A DataLoader or a LightningDataModule, or None for the loaders of the module.
        spread: How the training is spread. A rank is taken to get a batch as the loader gives it.
        batch_size: Samples of a batch; None as they come.
        notes: What is assumed is added here.

    Raises:
        OptionError: if the batches cannot be run.
    """
    if batch_size is not None and not is_whole(batch_size):
        raise OptionError(f"batch_size={shown(batch_size)} must be an integer of at least 1.")
    if isinstance(make, nn.Module):
        raise OptionError(
            "activations are measured with a module of its own: give estimate_memory a function that makes the module, "
            "such as its class."
        )
    module: Any = make()
    if not is_a(module, LightningModule):
        raise OptionError(f"activations are measured by a training_step, and {type(module).__name__} has none.")
    if data is None and not overrides(module, "train_dataloader", LightningModule):
        raise OptionError(
            f"activations are measured with batches, and there is no data: {type(module).__name__} has no "
            "train_dataloader, and no data was given. Add `data:` to the config, or leave --activations out."
        )
    watch = _Watch(batch_size)
    _run(module, data, spread, watch)
    if watch.bytes is None:
        raise OptionError("activations: the data gave no two batches for training. Leave --activations out.")
    notes.append(
        f"Activations were measured on the CPU, of a batch of {watch.samples} samples on a rank. Kernels of a GPU may "
        "keep more or less."
    )
    if spread.mesh[1] > 1:
        notes.append("Tensor parallelism was not considered in activations.")
    return watch.bytes


def _run(module: Any, data: Any, spread: Spread, watch: _Watch) -> None:
    """Run two batches, without steps of an optimizer."""
    if module.automatic_optimization:
        module.configure_optimizers = lambda: _still(module)
        module.configure_callbacks = lambda: []
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "limit_val_batches": 0, "num_sanity_val_steps": 0, "max_epochs": 2}
    options |= {"limit_train_batches": 2}  # and not `max_steps`: a batch may have several in manual optimization
    precision: Any = ON_CPU.get(spread.precision, spread.precision)
    try:
        with quiet():
            trainer = Trainer(accelerator="cpu", devices=1, precision=precision, callbacks=[watch], **options)
            if data is None or is_a(data, LightningDataModule):
                trainer.fit(module, datamodule=data)
            else:
                trainer.fit(module, train_dataloaders=data)
    except OptionError:
        raise
    except Exception as error:  # a user's step may raise anything
        raise OptionError(
            f"activations: a batch cannot be run with {type(module).__name__} on the CPU: {type(error).__name__}: "
            f"{first_line(error)} Leave --activations out to count without them."
        ) from error


def _still(module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer without state that changes nothing."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)


class _Watch(Callback):
    """Counts in the last of two batches.

    Args:
        batch_size: Samples to which batches are cut or repeated.

    Attributes:
        bytes: What was held at most, without gradients; None before the last batch.
        samples: Samples of the batch.
    """

    def __init__(self, batch_size: int | None) -> None:
        self.bytes: int | None = None
        self.samples: int | None = batch_size
        self._live: Any = None
        self._gradients = 0
        self._batches = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.samples is not None:
            pl_module.on_before_batch_transfer = lambda batch, index: _resized(batch, self.samples)  # type: ignore

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:  # no step, so no state of its own
            optimizer.step = lambda closure=None: None if closure is None else closure()  # type: ignore[assignment, method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batches += 1
        if self._batches != 2:
            return
        tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor)]
        sizes = [len(x) for x in tensors if x.dim()]
        self.samples = self.samples or (sizes[0] if sizes else 0)
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self._gradients = sum(x.numel() * x.element_size() for x in gradients)
        self._live = _Live([*tensors, *gradients])
        self._live.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            trained = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
            self.bytes = max(0, self._live.most - max(trained, self._gradients))
            self._live = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None


def _resized(batch: Any, size: int) -> Any:
    """A batch with another number of samples: the first tensor tells along which sizes samples lie."""
    sizes = [len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()]
    if not sizes:
        return batch
    index = torch.arange(size, dtype=torch.int64, device="cpu") % sizes[0]
    return tree_map(
        lambda x: x[index.to(x.device)] if isinstance(x, Tensor) and x.dim() and len(x) == sizes[0] else x, batch
    )


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, the bytes of storages are counted from when they are made until they are freed.

    Args:
        held: Tensors that are there already.

    Attributes:
        now: Bytes that are held.
        most: The largest value of `now` so far.
    """

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: dict[int, int] = {}
        for x in held:
            self._add(x)

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._add(x)
        return result
