"""Checkpoints that are whole or not there, and nothing half loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from typing_extensions import override

from lightning_optim.checkpoints import integrity
from lightning_optim.distributed.placement import local
from lightning_optim.distributed.ranks import mean_over_ranks
from lightning_optim.errors import OptionError


class CheckpointIntegrity(Callback):
    """Save checkpoints atomically, verify them before anything is loaded, and undo a load that fails.

    Every save is written beside its place, in a folder `.partial`, and takes the place when all ranks are done; a
    process that dies in the middle leaves the checkpoint before it as it was. That holds for the folders of FSDP as
    well as for files. Before a load all of a checkpoint is read once and compared with the checksums in it. Where
    the load fails after that, say since the optimizer has other parameters, the weights are put back.

    It is for paths of a file system; those with a protocol (`s3://`) are left to Lightning.
    `ConfiguredOptimizer` brings it along where it can serve.

    Raises:
        OptionError: before a load, for a checkpoint that is cut off, incomplete or changed; at the start, for
            `AsyncCheckpointIO`, which writes after the save is said to be over.
    """

    def __init__(self) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []
        self._undo: list[Callable[[], None]] = []

    @staticmethod
    def serves(strategy: Strategy) -> bool:
        """Whether the strategy writes checkpoints in a form that is known here, and before its save is over."""
        known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy | ModelParallelStrategy)
        other = isinstance(strategy, DeepSpeedStrategy | XLAStrategy)  # heirs of DDP with forms of their own
        return known and not other and isinstance(strategy.checkpoint_io, TorchCheckpointIO)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.teardown(trainer, pl_module, stage)  # of a run that an exception ended
        strategy: Any = trainer.strategy
        if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
            raise OptionError(
                "CheckpointIntegrity cannot know when AsyncCheckpointIO has written a checkpoint. Use one of the two."
            )
        save, load = strategy.save_checkpoint, strategy.load_checkpoint

        def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            filepath = strategy.broadcast(filepath)
            if _is_remote(filepath):
                save(checkpoint, filepath, storage_options)
                return
            if trainer.is_global_zero:
                integrity.begin(Path(filepath))
            strategy.barrier()
            save(checkpoint, str(integrity.partial(Path(filepath))), storage_options)
            strategy.barrier()
            if trainer.is_global_zero:
                integrity.commit(Path(filepath))

        def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            if not _is_remote(checkpoint_path):
                _refuse_damage(trainer, Path(checkpoint_path))
            if trainer.state.fn == TrainerFn.FITTING:  # the memory of gradients is free as yet
                held = chain(pl_module.parameters(), pl_module.buffers())
                self._before = [(tensor, local(tensor.detach()).clone()) for tensor in held]
            try:
                return load(checkpoint_path, *args, **kwargs)
            except CheckpointException as error:  # a folder that FSDP2 reads, and which lacks what it asks for
                missing = re.search(r"Missing key in checkpoint state_dict: ([\w.]+\w)", str(error))
                if missing is None:
                    raise
                raise OptionError(
                    f"The checkpoint {checkpoint_path} holds no {missing[1]}, and FSDP2 reads a folder only where it "
                    "holds all. Make it one file, in which what is missing starts fresh: "
                    f"python -m lightning_optim.checkpoints.consolidate {checkpoint_path} full.ckpt"
                ) from error

        strategy.save_checkpoint, strategy.load_checkpoint = save_checkpoint, load_checkpoint
        self._undo = [lambda: setattr(strategy, "save_checkpoint", save)]
        self._undo.append(lambda: setattr(strategy, "load_checkpoint", load))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = []  # everything is loaded

    @override
    @torch.no_grad()
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for tensor, before in self._before:
            local(tensor).copy_(before)
        self._before = []

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._undo:
            self._undo.pop()()
        self._before = []


def _refuse_damage(trainer: Trainer, path: Path) -> None:
    """Let one process of each node read the checkpoint, and all of them refuse it where one does."""
    if trainer.is_global_zero:
        integrity.recover(path)
    found = integrity.damage(path) if trainer.local_rank == 0 and path.exists() else ""
    bad = torch.tensor(float(bool(found)), device=trainer.strategy.root_device)
    if mean_over_ranks(bad).item():
        raise OptionError(
            f"The checkpoint is damaged: {found or 'the process that read it says how.'} Nothing was loaded. Use an "
            "earlier one."
        )


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
