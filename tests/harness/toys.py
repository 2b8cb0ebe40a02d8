"""A small regression and a quiet Trainer, and what a run did: the weights after each step and those evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

BATCHES, BATCH = 4, 8  # batches in an epoch, samples in a batch


def vector(module: nn.Module) -> Tensor:
    """A copy of all parameters in one row."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def slot(optimizer: torch.optim.Optimizer, name: str) -> Tensor:
    """A copy of one slot of all parameters in one row."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([optimizer.state[p][name].reshape(-1) for p in params]).clone()


def samples(count: int = BATCHES * BATCH) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(count, 4, generator=generator)
    return TensorDataset(inputs, inputs.sin() @ torch.randn(4, 2, generator=generator))


def batches(**options: Any) -> DataLoader[Any]:
    return DataLoader(samples(), **{"batch_size": BATCH, **options})


def plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


class Toy(LightningModule):
    """Notes the weights that each validation and test batch sees, and the loss of each training batch."""

    def __init__(self, make: Make, net: Callable[[], nn.Module] = plain_net) -> None:
        super().__init__()
        self.make = make
        self.net = net()
        self.validated: list[Tensor] = []
        self.tested: list[Tensor] = []
        self.losses: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.validated.append(vector(self))

    def test_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.tested.append(vector(self))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(list(self.parameters()))


class Pair(Toy):
    """Two networks under manual optimization; the second takes a step in every second batch, or later."""

    def __init__(self, make: Make, second: int = 2) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.other, self.second = nn.Linear(4, 2), second

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        every: Any = self.optimizers()
        for optimizer, net, turn in zip(every, (self.net, self.other), (1, self.second), strict=True):
            if index % turn == turn - 1:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.make(list(net.parameters())) for net in (self.net, self.other)]


class Walk(Callback):
    """The weights that training has after each of its steps, and any slot on demand."""

    def __init__(self, slot_name: str | None = None) -> None:
        self.slot_name = slot_name
        self.weights: list[Tensor] = []
        self.slots: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
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


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """A Trainer on one CPU that writes nothing and says nothing."""
    from lightning.pytorch.callbacks import Checkpoint

    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})
