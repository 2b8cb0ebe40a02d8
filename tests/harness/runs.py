"""Runs that save, and runs that go on from what others saved: under every strategy, in 32 bits and in 8."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimizerStrategy, storage
from lightning_optim.callbacks import IterateAveraging, LookaheadSync
from tests.harness.modules import Configured
from tests.harness.nets import Wide, odd_net
from tests.harness.strategies import Kind, rank, strategy_of
from tests.harness.trainers import trainer
from tests.harness.worlds import whole

EPOCH = 4


class Setting(NamedTuple):
    """How a run is spread and how it keeps state."""

    kind: Kind
    bits: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.bits} bits, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


class Run(NamedTuple):
    """What a rank has to show: its losses, the weights in full, and all state that it holds, codes as codes.

    State is by the number of the parameter and the slot; where nothing of a parameter is here there is none to show.
    """

    losses: list[float]
    weights: dict[str, Tensor]
    state: dict[tuple[int, str], list[Tensor]]


class Task(Configured):
    unit = Wide

    def __init__(self, optimizer: OptimizerStrategy) -> None:
        super().__init__(optimizer, odd_net)


class Parts:
    """A batch sampler: this rank's part of each global batch of 8."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(EPOCH):
            yield torch.arange(8 * batch, 8 * batch + 8).chunk(self.ranks)[self.rank].tolist()


def task_trainer(setting: Setting, *callbacks: Callback, **options: Any) -> Trainer:
    """The Trainer of a `Task`."""
    ddp = {"find_unused_parameters": True} if setting.kind == "ddp" else {}
    return trainer(*callbacks, strategy=strategy_of(setting.kind, Wide, **ddp), devices=setting.ranks, **options)


def task_batches(ranks: int) -> DataLoader[Any]:
    """The part of this rank of the batches of an epoch."""
    x = torch.randn(8 * EPOCH, 5, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :1].sin()), batch_sampler=Parts(rank(), ranks))


def saving(folder: Path) -> ModelCheckpoint:
    """A checkpoint at the end of the first epoch."""
    return ModelCheckpoint(folder, "saved", every_n_train_steps=EPOCH, save_on_train_epoch_end=False)


def fit(
    setting: Setting, optimizer: Any, resume: Path | None = None, folder: Path | None = None, **options: Any
) -> Run:
    """Two epochs, or one with a checkpoint at its end where a folder is given; `options` are the Trainer's."""
    spec = {**(optimizer if isinstance(optimizer, dict) else {"name": optimizer}), "state_bits": setting.bits}
    task = Task(OptimizerStrategy.parse(spec))
    callbacks: list[Callback] = [IterateAveraging("ema", 0.5, start=2), LookaheadSync(k=3)]
    callbacks += [] if folder is None else [saving(folder)]
    fitting = task_trainer(setting, *callbacks, max_epochs=2 if folder is None else 1, **options)
    fitting.fit(task, task_batches(setting.ranks), ckpt_path=resume)
    made = fitting.optimizers[0]
    params = [p for group in made.param_groups for p in group["params"]]
    state = {(i, n): kept(x) for i, p in enumerate(params) if p.numel() for n, x in made.state.get(p, {}).items()}
    for name, value in made.param_groups[0].items():
        if isinstance(value, Tensor):
            state[-1, name] = [value]
    return Run(task.losses, whole(task.net), state)


def kept(value: Any) -> list[Tensor]:
    """The very numbers of a slot."""
    if isinstance(value, storage.Quantized):
        return [value.codes, value.scales]
    return [value.to_local() if hasattr(value, "to_local") else value]


def identical(one: Run, other: Run, after: int = EPOCH) -> bool:
    """Whether a resumed run is the second half of an uninterrupted one, bit for bit."""
    same = one.losses[after:] == other.losses and one.state.keys() == other.state.keys()
    same = same and all(torch.equal(p, other.weights[n]) for n, p in one.weights.items())
    return same and all(
        torch.equal(a, b) for key, own in one.state.items() for a, b in zip(own, other.state[key], strict=True)
    )
