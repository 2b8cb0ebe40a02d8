"""Runs that save, and runs that go on from what others saved: under every strategy, in 32 bits and in 8."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import ConfiguredOptimizer, OptimizerStrategy, storage
from lightning_optim.callbacks import IterateAveraging, LookaheadSync
from tests.harness.cpu_fsdp import CPUFSDP
from tests.harness.worlds import UNITS, Odd, Wide, whole

EPOCH = 4
KINDS = ("single", "ddp", "fsdp1 full", "fsdp1 sharded", "fsdp2 full", "fsdp2 sharded")


class Setting(NamedTuple):
    """How a run is spread and how it keeps state."""

    kind: str
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


class Task(ConfiguredOptimizer, LightningModule):
    def __init__(self, optimizer: OptimizerStrategy, sharded: bool) -> None:
        super().__init__()
        self.save_hyperparameters({"optimizer": optimizer})
        self.net = Odd(torch.float32)
        self.sharded = sharded
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.sharded and not isinstance(self.net.out.weight, torch.distributed.tensor.DTensor):
            mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
            for name in UNITS:
                fully_shard(self.net.get_submodule(name), mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss


class Parts:
    """A batch sampler: this rank's part of each global batch of 8."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(EPOCH):
            yield torch.arange(8 * batch, 8 * batch + 8).chunk(self.ranks)[self.rank].tolist()


def strategy_of(setting: Setting) -> Strategy | str:
    form: Any = setting.kind.split()[-1]
    if setting.kind == "single":
        return "auto"
    if setting.kind == "ddp":
        return DDPStrategy(find_unused_parameters=True)
    if setting.kind.startswith("fsdp1"):
        return CPUFSDP(state_dict_type=form, auto_wrap_policy={Wide})
    return ModelParallelStrategy(setting.ranks, 1, save_distributed_checkpoint=form == "sharded")


def fit(
    setting: Setting, optimizer: Any, resume: Path | None = None, folder: Path | None = None, **options: Any
) -> Run:
    """Two epochs, or one with a checkpoint at its end where a folder is given; `options` are the Trainer's."""
    rank, ranks = int(os.environ.get("RANK", 0)), setting.ranks
    spec = {**(optimizer if isinstance(optimizer, dict) else {"name": optimizer}), "state_bits": setting.bits}
    task = Task(OptimizerStrategy.parse(spec), setting.kind.startswith("fsdp2"))
    x = torch.randn(8 * EPOCH, 5, generator=torch.Generator().manual_seed(0))
    callbacks: list[Callback] = [IterateAveraging("ema", 0.5, start=2), LookaheadSync(k=3)]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "saved", every_n_train_steps=EPOCH, save_on_train_epoch_end=False))
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=strategy_of(setting),
        max_epochs=2 if folder is None else 1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    loader = DataLoader(TensorDataset(x, x[:, :1].sin()), batch_sampler=Parts(rank, ranks))
    trainer.fit(task, loader, ckpt_path=resume)
    made = trainer.optimizers[0]
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
