"""The loss, the data and the optimizer of a fit that has not begun, looked at without leaving a trace."""

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

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


HALF = (torch.float16, torch.bfloat16)


class NoLoss(OptionError):
    """A batch for which training_step returned no loss; the Trainer would go on with the next one."""


class TrainingStep(nn.Module):
    """The module's training_step as a function of parameters and batches, on a copy that nobody else uses.

    The copy computes in float32 where the module is in half precision, and in float64 where the Trainer does; without
    dropout, and with batch statistics where the module normalises by those. What it logs with `self.log` goes nowhere.

    Args:
        trainer: Says on which device.
        pl_module: The module, whole.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().__init__()
        twin: Any = copy.deepcopy(pl_module)
        if getattr(twin, "_compiler_ctx", None) is not None:  # then these are bound to the original
            for name in ("forward", "training_step"):
                vars(twin).pop(name, None)
        twin.to(trainer.strategy.root_device)
        twin._apply(lambda x: x.float() if x.dtype in HALF else x)
        self._context: Any = contextlib.nullcontext
        if isinstance(trainer.precision_plugin, DoublePrecision):
            twin.double()
            self._context = trainer.precision_plugin.forward_context
        twin.trainer = trainer
        vars(twin)["log"] = lambda *args, **kwargs: None
        for part in twin.modules():
            part.training = part.training and isinstance(part, _NormBase)
            if isinstance(part, nn.SyncBatchNorm):  # the other ranks are not there to talk to
                vars(part)["forward"] = functools.partial(_BatchNorm.forward, part)
        self.module: LightningModule = twin
        self._takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        self._calls = 0

    def parameters_by_name(self) -> dict[str, Tensor]:
        """The trainable parameters of the copy."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def forward(self, batch: Any) -> Tensor:
        with self._context():
            found: Any = self.module.training_step(*((batch, self._calls) if self._takes_index else (batch,)))
        self._calls += 1
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            kind = NoLoss if found is None else OptionError
            raise kind(
                "training_step must return the loss, as a tensor with a gradient or under 'loss' in a dict; it "
                f"returned {type(found).__name__}."
            )
        return loss

    def loss(self, theta: Mapping[str, Tensor], parts: Sequence[Any]) -> Tensor:
        """The loss under given parameters: of one batch where the parts go together, else the mean over them."""
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
    """Use what can be differentiated twice and in evaluation mode: fused attention and cuDNN's recurrences cannot."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), contextlib.ExitStack() as stack:
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def half_batches(trainer: Trainer, pl_module: LightningModule) -> Iterator[Any]:
    """Halves of the batches of the training loader without end, from a copy that shares only the data set with it.

    Raises:
        OptionError: where the loader is an iterator, whose batches would be gone, or gives none.
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
    """A batch in the type in which `TrainingStep` computes, where that is another than the run's."""
    if isinstance(trainer.precision_plugin, DoublePrecision):
        return trainer.precision_plugin.convert_input(batch)
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in HALF else x, batch)


def _copies(loaders: Any) -> CombinedLoader:
    combined = isinstance(loaders, CombinedLoader)
    copies = tree_map(_copy, loaders.iterables if combined else loaders)
    return CombinedLoader(copies, loaders._mode if combined else "max_size_cycle")


def _copy(loader: Any) -> Any:
    if isinstance(loader, DataLoader):
        bare = copy.copy(loader)
        vars(bare)["_iterator"] = None  # where workers persist, it is training's
        return copy.deepcopy(bare, {id(loader.dataset): loader.dataset})
    if isinstance(loader, Iterator):
        raise OptionError(
            "The training loader is an iterator, which gives each batch once, so looking at batches before training "
            "would take them away. Give the Trainer a DataLoader, or something that can be iterated again."
        )
    return loader


def optimizers_of(trainer: Trainer, pl_module: LightningModule) -> list[torch.optim.Optimizer]:
    """What configure_optimizers makes, asked for once more than the Trainer does. Every rank must ask.

    Where it wants to know the number of steps, the Trainer sets up copies of the training loader.
    """
    loop: Any = trainer.fit_loop
    source, loader = loop._data_source, loop._combined_loader
    loop._data_source = _Source(source)
    try:
        return list(_optimizers(pl_module.configure_optimizers()))
    finally:
        loop._data_source, loop._combined_loader = source, loader


class _Source:
    """Where the Trainer's loaders come from, with copies in their place."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def dataloader(self) -> Any:
        return _copies(self._source.dataloader())


def _optimizers(configured: Any) -> Iterator[torch.optim.Optimizer]:
    if isinstance(configured, torch.optim.Optimizer):
        yield configured
    elif isinstance(configured, Mapping):
        yield from _optimizers(configured.get("optimizer"))
    elif isinstance(configured, list | tuple):
        for item in configured:
            yield from _optimizers(item)


def halves_of(batch: Any) -> list[Any]:
    """A batch cut in two along the first axis; itself where it is no collection of tensors of one length of 2 or more.

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
    """The number of samples, where every part of a batch is a tensor with one entry for each; else 0."""
    leaves, _ = tree_flatten(batch)
    sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else 0 for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 else 0


def joined(parts: Sequence[Any]) -> Any:
    """Batches one after the other in one, or None where their shapes do not go together."""
    leaves = [tree_flatten(part) for part in parts]
    fits = all(size_of(part) for part in parts) and all(spec == leaves[0][1] for _, spec in leaves)
    rows = list(zip(*(found for found, _ in leaves), strict=True)) if fits else []
    if not rows or any(leaf.shape[1:] != row[0].shape[1:] for row in rows for leaf in row):
        return None
    return tree_unflatten([torch.cat(row) for row in rows], leaves[0][1])
