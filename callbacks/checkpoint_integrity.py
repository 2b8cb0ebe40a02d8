"""Write checkpoints atomically, verify them before a load, and undo a load that fails."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
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

from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.checkpoints import integrity
from lightning_optim.distributed.placement import local
from lightning_optim.distributed.ranks import mean_over_ranks
from lightning_optim.errors import OptionError
from lightning_optim.training.lightning_names import is_a


class CheckpointIntegrity(FitCallback):
    """Write checkpoints atomically, verify them before anything is loaded, and undo a load that fails.

    A checkpoint is written to a folder `.partial` next to its path and renamed when all ranks are done, whether it is
    a file or a folder of FSDP. A process that dies during a save leaves the earlier checkpoint intact. Before a load
    the whole checkpoint is read once and compared with the checksums in it. If the load fails later, for example
    since the optimizer has other parameters, the weights of the model are restored.

    This is for paths in a file system; Lightning alone handles those with a protocol (`s3://`).
    `ConfiguredOptimizer` adds this callback where it is supported.

    Raises:
        OptionError: before a load, for a checkpoint that is truncated, incomplete or changed. At the start, for
            `AsyncCheckpointIO`, which writes after the save has returned.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> options.update(max_steps=1, logger=False, enable_checkpointing=False, limit_val_batches=0)
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "last.ckpt"
        >>> trainer = Trainer(**options)
        >>> trainer.fit(BoringModel())
        >>> trainer.save_checkpoint(path)
        >>> size = path.write_bytes(path.read_bytes()[:-100])  # truncate it
        >>> Trainer(callbacks=[CheckpointIntegrity()], **options).fit(BoringModel(), ckpt_path=path)
        Traceback (most recent call last):
        ...
        lightning_optim.errors.OptionError: The checkpoint is damaged: ...last.ckpt is truncated...
        >>> folder.cleanup()

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.CheckpointIntegrity
    """

    def forget(self) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []  # tensors of the model, and their values before the load

    @staticmethod
    def serves(strategy: Strategy) -> bool:
        """Whether the strategy writes checkpoints in a supported format, and before the save returns."""
        supported = is_a(strategy, SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
        other = is_a(strategy, DeepSpeedStrategy, XLAStrategy)  # subclasses of DDP with formats of their own
        return supported and not other and is_a(strategy.checkpoint_io, TorchCheckpointIO)

    @override
    def begin_run(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy: Any = trainer.strategy
        if is_a(strategy.checkpoint_io, AsyncCheckpointIO):
            raise OptionError(
                "CheckpointIntegrity cannot know when AsyncCheckpointIO has written a checkpoint. Use one of the two."
            )

        def save_checkpoint(save: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            filepath = strategy.broadcast(filepath)
            if _is_remote(filepath):
                save(checkpoint, filepath, storage_options)
                return
            path = Path(filepath)
            with integrity.replacing(path) if trainer.is_global_zero else nullcontext(integrity.partial(path)) as to:
                strategy.barrier()
                save(checkpoint, str(to), storage_options)
                strategy.barrier()

        def load_checkpoint(load: Any, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
            if not _is_remote(checkpoint_path):
                trusted = kwargs.get("weights_only") is False
                checkpoint_path = _verified(trainer, Path(checkpoint_path), trusted)
            if trainer.state.fn == TrainerFn.FITTING:  # this copy takes memory that gradients need later
                tensors = chain(pl_module.parameters(), pl_module.buffers())
                self._before = [(tensor, local(tensor.detach()).clone()) for tensor in tensors]
            try:
                return load(checkpoint_path, *args, **kwargs)
            except CheckpointException as error:  # FSDP2 misses a key in a folder
                missing = re.search(r"Missing key in checkpoint state_dict: ([\w.]+\w)", str(error))
                if missing is None:
                    raise
                raise OptionError(
                    f"The checkpoint {checkpoint_path} holds no {missing[1]}, and FSDP2 reads a folder only if it "
                    "has all keys. Convert it to a file, which may lack some: those start fresh. Run "
                    f"python -m lightning_optim.checkpoints.consolidate {checkpoint_path} full.ckpt"
                ) from error

        self.wrap(strategy, "save_checkpoint", save_checkpoint)
        self.wrap(strategy, "load_checkpoint", load_checkpoint)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away what a killed process has left."""
        saving: list[Any] = [each for each in trainer.checkpoint_callbacks if is_a(each, ModelCheckpoint)]
        folders = {callback.dirpath for callback in saving}
        folders.add(trainer.default_root_dir)  # where a SLURM job saves itself
        for folder in folders if trainer.is_global_zero else ():
            recovered = integrity.tidy(Path(folder)) if folder and not _is_remote(folder) else []
            for path in recovered if trainer.ckpt_path is None else ():
                warnings.warn(
                    f"{path} was being replaced when an earlier process was killed. It is whole, and has its name "
                    "again. If this run was to resume from it, start it once more.",
                    stacklevel=2,
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = []  # the load succeeded

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._before = []  # a finder of learning rates or batch sizes loads between batches

    @override
    @torch.no_grad()
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for tensor, before in self._before:
            local(tensor).copy_(before)
        self._before = []
        super().on_exception(trainer, pl_module, exception)

    @override
    def release(self) -> None:
        super().release()
        self._before = []


def _verified(trainer: Trainer, path: Path, trusted: bool) -> Path:
    """Where the checkpoint is, which one process of each node has verified; all raise an error if one found damage."""
    strategy = trainer.strategy
    path = Path(strategy.broadcast(f"{integrity.recover(path)}" if trainer.is_global_zero else ""))
    damage = integrity.damage(path, trusted) if trainer.local_rank == 0 and path.exists() else ""
    bad = torch.tensor(float(bool(damage)), dtype=torch.float32, device=strategy.root_device)
    if mean_over_ranks(bad).item():
        raise OptionError(
            f"The checkpoint is damaged: {damage or 'see the error of local rank 0.'} Nothing was loaded. Use an "
            "earlier one."
        )
    return path


def _is_remote(path: Any) -> bool:
    return "://" in str(path)
