"""Batches of the training loader once more, as training sees them, while its own iterator stays where it is."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from lightning_optim.errors import OptionError, first_line
from lightning_optim.training.lightning_names import is_a

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer


def run(
    trainer: Trainer,
    module: LightningModule,
    batches: int,
    changing: Iterable[Callback] = (),
    each: Callable[[Any], None] | None = None,
) -> int:
    """Call `training_step` for the first batches of an epoch.

    They come from the same loaders under the same limits as in training, from a new iterator, and go through the same
    hooks: those of the transfer to the device and the module's `on_train_batch_start`.

    Args:
        trainer: The Trainer, during a fit. Use `without_trace` around this.
        module: Its module.
        batches: The number of batches; fewer if the epoch is over.
        changing: The callbacks whose `on_train_batch_start` changes a batch.
        each: Called with what `training_step` returns for each batch.

    Returns:
        The number of batches that there were.
    """
    count = 0
    with _loader(trainer) as loader:
        for index, batch in _prepared(trainer, module, itertools.islice(loader, batches)):
            for callback in changing:
                callback.on_train_batch_start(trainer, module, batch, index)
            if module.on_train_batch_start(batch, index) == -1:
                break
            output = step(trainer, module, batch, index)
            if each is not None:
                each(output)
            count += 1
    return count


def fixed(trainer: Trainer, module: LightningModule, batches: int, seed: int) -> list[tuple[int, Any]]:
    """The first batches of an epoch whose order is that of a seed, on the device of the module.

    They are the same whenever this is called, as far as the loader's order and the dataset follow generators that are
    known here: those of torch, numpy and Python, and those of the loader and its samplers.

    Args:
        trainer: The Trainer, during a fit. Use `without_trace` around this.
        module: Its module.
        batches: The number of batches; fewer if the epoch is over.
        seed: For every generator.

    Returns:
        Each batch with its index in the epoch.
    """
    with _loader(trainer, seed) as loader:
        return list(_prepared(trainer, module, itertools.islice(loader, batches)))


def _prepared(trainer: Trainer, module: LightningModule, fetched: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Batches in the precision and on the device of the module; without those that a hook has turned into None."""
    for index, (raw, *_) in enumerate(fetched):
        batch = trainer.precision_plugin.convert_input(raw)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        if batch is not None:
            yield index, batch


def step(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Any:
    """What `training_step` returns for a batch, called as the strategy calls it."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    args = (batch, index) if takes_index else (batch,)
    if isinstance(trainer.strategy.model, DistributedDataParallel):
        # Not through the wrapper, which would broadcast the buffers of rank 0 and wait for a backward pass.
        with trainer.precision_plugin.train_step_context():
            return module.training_step(*args)
    return trainer.strategy.training_step(*args)


def reason(module: LightningModule, error: Exception) -> str:
    """Why `training_step` could not be run and differentiated once more, as a sentence."""
    twice = any("through the graph a second time" in str(one) for one in (error, error.__cause__))
    if twice and not module.automatic_optimization:
        return (
            "training_step calls loss.backward(), which leaves the loss that it returns without a graph. Call "
            "self.manual_backward(loss) instead."
        )
    line = first_line(error)
    return line if isinstance(error, OptionError) else f"{type(error).__name__}: {line}"


def changes(batch: Any, action: Callable[[], None]) -> bool:
    """Call a function, and tell whether it has changed or replaced a tensor in a batch of lists, tuples and dicts."""
    before = _state(batch)
    action()
    return bool(_state(batch) != before)


def _state(batch: Any) -> Any:
    leaves, structure = tree_flatten(batch)
    return structure, [(id(leaf), leaf._version if isinstance(leaf, Tensor) else 0) for leaf in leaves]


def check(trainer: Trainer, module: LightningModule, batches: int | None, owner: str, otherwise: str) -> None:
    """Refuse a fit whose batches cannot be had once more.

    Args:
        trainer: The Trainer, when training starts.
        module: Its module.
        batches: The number of batches that will be wanted; None if there is no limit but that of an epoch.
        owner: Who wants them, for the message.
        otherwise: What to do instead, for the message.

    Raises:
        OptionError: if a loader is an iterator, or is in the middle of its epoch and there is no other; if
            `training_step` takes the iterator itself; or if an epoch may have no end.
    """
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise OptionError(
            f"{owner}: training_step takes dataloader_iter and fetches its batches itself, so nobody else can give "
            f"them to it. {otherwise}"
        )
    endless = trainer.num_training_batches == float("inf") and trainer.max_epochs == -1
    if endless and batches is None:
        raise OptionError(
            f"{owner}: the training loader has no length and the Trainer no max_epochs, so an epoch may have no end. "
            f"Set limit_train_batches of the Trainer, or batch_norm_batches here. {otherwise}"
        )
    loaders = _combined(trainer).flattened
    for loader, fresh in zip(loaders, _others(trainer, loaders), strict=True):
        if isinstance(loader, Iterator):
            raise OptionError(
                f"{owner}: the training loader ({type(loader).__name__}) is an iterator, which gives each batch once. "
                f"Give the Trainer a DataLoader, or something that can be iterated again. {otherwise}"
            )
        if _knows_its_place(loader) and fresh is loader:
            raise OptionError(
                f"{owner}: the training loader has a state_dict, so it will be in the middle of its epoch, and there "
                "is no other. Give the Trainer a LightningDataModule, or a module with train_dataloader, instead of "
                f"the loader. {otherwise}"
            )


def _combined(trainer: Trainer) -> CombinedLoader:
    combined: Any = trainer.fit_loop._combined_loader
    return combined  # type: ignore[no-any-return]


@contextmanager
def _loader(trainer: Trainer, seed: int | None = None) -> Iterator[CombinedLoader]:
    """The loaders of training with iterators of their own, under the same limits; in the order of a seed, if given."""
    combined = _combined(trainer)
    loaders = [_copied(loader) for loader in _others(trainer, combined.flattened)]
    mode: Any = combined._mode
    again = CombinedLoader(combined.iterables, mode)
    again.flattened, again.limits = loaders, combined.limits
    generators = {generator for loader in loaders for generator in _generators(loader)}
    states = [(generator, generator.get_state()) for generator in generators]
    samplers = {id(s): s for loader in loaders for s in _samplers(loader) if hasattr(s, "set_epoch")}.values()
    epochs = [(sampler, getattr(sampler, "epoch", trainer.current_epoch)) for sampler in samplers]
    try:
        if seed is not None:
            _start_from(seed, generators, samplers)
        yield iter(again)
    finally:
        for generator, state in states:
            generator.set_state(state)
        for sampler, epoch in epochs if seed is not None else ():
            sampler.set_epoch(epoch)


def _start_from(seed: int, generators: Iterable[Any], samplers: Iterable[Any]) -> None:
    """Seed all generators, and let samplers that shuffle by the epoch do that as in the first one."""
    seed_everywhere(seed)
    for generator in generators:
        start = getattr(generator, "manual_seed", None) or getattr(generator, "seed", None)
        if start is not None:
            start(seed)
    for sampler in samplers:
        sampler.set_epoch(0)


def seed_everywhere(seed: int) -> None:
    """Seed the generators that have no owner: those of torch, numpy and Python. Use `generators_kept` around this."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _knows_its_place(loader: Any) -> bool:
    return hasattr(loader, "state_dict")


def _others(trainer: Trainer, loaders: list[Any]) -> list[Any]:
    """The loaders, except that one which remembers its position in the epoch is made once more."""
    if not any(map(_knows_its_place, loaders)):
        return loaders
    made: Any = trainer.fit_loop._data_source.dataloader()
    made = made if is_a(made, CombinedLoader) else CombinedLoader(made)
    found = []
    for loader, other in zip(loaders, made.flattened, strict=True):
        if not _knows_its_place(loader):
            found.append(loader)
            continue
        prepared: Any = trainer._data_connector._prepare_dataloader(other, shuffle=True, mode=RunningStage.TRAINING)
        _set_sampler_epoch(prepared, trainer.current_epoch)
        found.append(trainer.strategy.process_dataloader(prepared))
    return found


def _copied(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return loader
    copied = copy.copy(loader)
    vars(copied)["_iterator"] = None  # with persistent workers this is the iterator of training
    return copied


def _generators(loader: Any) -> Iterator[Any]:
    for source in (loader, *_samplers(loader)):
        generator = getattr(source, "generator", None)
        if hasattr(generator, "get_state"):
            yield generator


def _samplers(loader: Any) -> tuple[Any, Any]:
    return getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)
