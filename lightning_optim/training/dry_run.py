"""Use the loss, the data and the optimizers of a fit before it starts, without side effects."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader

from lightning_optim.errors import OptionError
from lightning_optim.training.lightning_names import is_a, optimizers_in

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


HALF = (torch.float16, torch.bfloat16)


class NoLoss(OptionError):
    """`training_step` returned None for a batch; the Trainer would skip it."""


class TrainingStep(nn.Module):
    """The module's training_step as a function of parameters and batches, on a copy of the module.

    The copy computes in float64 if the Trainer does, and otherwise in float32 if the module is in half precision. It
    has no dropout, and normalizes by batch statistics where the module does. `self.log` does nothing.

    Args:
        trainer: The Trainer, for device and precision.
        pl_module: The module, before it is sharded.

    Raises:
        OptionError: when called, if training_step returns no loss.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().__init__()
        clone: Any = copy.deepcopy(pl_module)
        if getattr(clone, "_compiler_ctx", None) is not None:  # compiled methods are bound to the original
            for name in ("forward", "training_step"):
                vars(clone).pop(name, None)
        clone.to(trainer.strategy.root_device)
        clone._apply(lambda x: x.float() if x.dtype in HALF else x)
        self._context: Any = contextlib.nullcontext
        if is_a(trainer.precision_plugin, DoublePrecision):
            clone.double()
            self._context = trainer.precision_plugin.forward_context
        clone.trainer = trainer
        vars(clone)["log"] = lambda *args, **kwargs: None
        for part in clone.modules():
            part.training = part.training and isinstance(part, _NormBase)
            if isinstance(part, nn.SyncBatchNorm):  # only this rank runs it
                vars(part)["forward"] = functools.partial(_BatchNorm.forward, part)
        self.module: LightningModule = clone
        self._takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        self._calls = 0

    def parameters_by_name(self) -> dict[str, Tensor]:
        """The trainable parameters of the copy."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def forward(self, batch: Any) -> Tensor:
        with self._context():
            output: Any = self.module.training_step(*((batch, self._calls) if self._takes_index else (batch,)))
        self._calls += 1
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            error = NoLoss if output is None else OptionError
            raise error(
                "training_step must return the loss, as a tensor with a gradient or under 'loss' in a dict; it "
                f"returned {type(output).__name__}."
            )
        return loss

    def loss(self, theta: Mapping[str, Tensor], parts: Sequence[Any]) -> Tensor:
        """The loss of batches under given parameters: of all as one batch if possible, else the mean over samples."""
        named = {f"module.{name}": p for name, p in theta.items()}
        whole = joined(parts)
        if whole is not None:
            loss: Tensor = torch.func.functional_call(self, named, (whole,))
            return loss
        sizes = [size_of(part) or 1 for part in parts]
        losses = [torch.func.functional_call(self, named, (part,)) for part in parts]
        return torch.stack([loss * size for loss, size in zip(losses, sizes, strict=True)]).sum() / sum(sizes)


@contextlib.contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Avoid fused attention and cuDNN's recurrent layers, which have no second derivative or no evaluation mode."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), contextlib.ExitStack() as stack:
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def half_batches(trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Endless halves of training batches, from a copy of the training loader that shares the dataset only.

    Raises:
        OptionError: if the loader is an iterator, which would lose these batches, or has no batch.
    """
    batches = _copies(trainer.fit_loop._data_source.dataloader())
    while True:
        count = 0
        for batch, *_ in batches:
            count += 1
            batch = trainer.strategy.batch_to_device(pl_module._on_before_batch_transfer(batch))
            yield from halves_of(_in_precision(trainer, batch))
        if not count:
            raise OptionError("The training loader gives no batch.")


def _in_precision(trainer: Trainer, batch: Any) -> Any:
    """A batch in the dtype in which `TrainingStep` computes."""
    if is_a(trainer.precision_plugin, DoublePrecision):
        return trainer.precision_plugin.convert_input(batch)
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in HALF else x, batch)


def _copies(loaders: Any) -> CombinedLoader:
    combined = is_a(loaders, CombinedLoader)
    copies = tree_map(_copy, loaders.iterables if combined else loaders)
    return CombinedLoader(copies, loaders._mode if combined else "max_size_cycle")  # pyright: ignore[reportArgumentType]


def _copy(loader: Any) -> Any:
    if isinstance(loader, DataLoader):
        bare = copy.copy(loader)
        vars(bare)["_iterator"] = None  # with persistent workers this is the iterator of training
        return copy.deepcopy(bare, {id(loader.dataset): loader.dataset})
    if isinstance(loader, Iterator):
        raise OptionError(
            "The training loader is an iterator, which gives each batch once, so batches used before training "
            "would be missing in it. Give the Trainer a DataLoader, or something that can be iterated again."
        )
    return loader


def optimizers_of(trainer: Trainer, pl_module: LightningModule) -> list[torch.optim.Optimizer]:
    """The optimizers from an extra call of configure_optimizers. All ranks must call this.

    If configure_optimizers reads the number of steps, the Trainer sets up copies of the training loader for it.
    """
    loop: Any = trainer.fit_loop
    source, loader = loop._data_source, loop._combined_loader
    loop._data_source = _Source(source)
    try:
        return list(optimizers_in(pl_module.configure_optimizers()))
    finally:
        loop._data_source, loop._combined_loader = source, loader


class _Source:
    """The Trainer's data source with copies of the loaders."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def dataloader(self) -> Any:
        return _copies(self._source.dataloader())


def halves_of(batch: Any) -> list[Any]:
    """A batch split in two along the first axis. Without 2 samples or more in tensors of equal length it is not split.

    Example:
        >>> [tuple(x.shape) for x, y in halves_of([torch.zeros(5, 3), torch.zeros(5)])]
        [(2, 3), (2, 3)]
        >>> len(halves_of({"text": ["a", "b"], "label": torch.zeros(2)}))
        1
    """
    leaves, spec = tree_flatten(batch)
    size = size_of(batch)
    if size < 2:
        return [batch]
    cuts = (slice(0, size // 2), slice(size // 2, size // 2 * 2))
    return [tree_unflatten([leaf[cut] for leaf in leaves], spec) for cut in cuts]


def size_of(batch: Any) -> int:
    """The number of samples of a batch of tensors with equal first axes; 0 for other batches."""
    leaves, _ = tree_flatten(batch)
    sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else 0 for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 else 0


def joined(parts: Sequence[Any]) -> Any:
    """The concatenation of batches along the first axis, or None if their structures or shapes differ."""
    leaves = [tree_flatten(part) for part in parts]
    fits = all(size_of(part) for part in parts) and all(spec == leaves[0][1] for _, spec in leaves)
    rows = list(zip(*(found for found, _ in leaves), strict=True)) if fits else []
    if not rows or any(leaf.shape[1:] != row[0].shape[1:] for row in rows for leaf in row):
        return None
    return tree_unflatten([torch.cat(row) for row in rows], leaves[0][1])
