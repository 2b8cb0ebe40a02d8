"""A quiet Trainer, and what a run did: the weights after each step and those evaluated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.harness.data import batches
from tests.harness.modules import Make, Toy, slot, vector
from tests.harness.nets import plain_net
from tests.harness.strategies import world_size

# The keys of a Trainer that keep it quiet, as a config has them.
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """A Trainer on the CPUs of all ranks that writes nothing and says nothing."""
    quiet = {
        **QUIET,
        "devices": world_size(),
        "max_epochs": 3,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


class Walk(Callback):
    """The weights that training has after each of its steps, and any slot on demand."""

    def __init__(self, slot_name: str | None = None) -> None:
        self.slot_name = slot_name
        self.weights: list[Tensor] = []
        self.slots: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > len(self.weights):
            self.weights.append(vector(pl_module))
            if self.slot_name is not None:
                self.slots.append(slot(trainer.optimizers[0], self.slot_name))


class Run:
    """A fit that is over: its Trainer, module and walk."""

    def __init__(
        self,
        make: Make,
        *callbacks: Callback,
        net: Callable[[], nn.Module] = plain_net,
        train: DataLoader[Any] | None = None,
        ckpt_path: str | Path | None = None,
        module: Toy | None = None,
        watch: str | None = None,
        **options: Any,
    ) -> None:
        seed_everything(0, verbose=False)
        self.module = Toy(make, net) if module is None else module
        self.walk = Walk(watch)
        self.trainer = trainer(self.walk, *callbacks, **options)
        self.trainer.fit(
            self.module, batches() if train is None else train, batches(batch_size=16), ckpt_path=ckpt_path
        )
