"""The loss on fixed batches is the same at every look and in every run, and nobody notices that it was looked at."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import OptionError
from lightning_optim.distributed.placement import is_sharded, local
from lightning_optim.training.fixed_loss import FixedLoss
from tests.harness.data import samples
from tests.harness.modules import vector
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, shard, strategy_of, world_size
from tests.harness.trainers import trainer


class Net(LightningModule):
    """Dropout, batch normalization and noise of three libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2))
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen.append(batch[0].clone())
        noise = random.random() + np.random.rand() + torch.rand(())
        return nn.functional.mse_loss(self.net(batch[0]) * (1 + 0.1 * noise), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Looks(Callback):
    """Looks after every step, and takes gradients of what it sees."""

    def __init__(self, batches: int = 2) -> None:
        self.batches = batches
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fixed = FixedLoss(trainer, pl_module, self.batches, 3, "Looks")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        with self.fixed.look() as closure:
            loss = closure()
            assert closure().item() == loss.item()
            self.losses.append(loss.item())
            params = list(self.fixed.parameters().values())
            if any(map(is_sharded, params)):
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                torch.autograd.grad(loss, params)


def fit(*callbacks: Callback, **options: Any) -> tuple[Any, ...]:
    """All that a run may show: weights, statistics, state, batches, and what generators give next."""
    seed_everything(0, verbose=False)
    module = Net()
    loader = DataLoader(samples(), batch_size=8, shuffle=True, generator=options.pop("generator", None))
    run = trainer(*callbacks, max_epochs=2, **options)
    run.fit(module, loader)
    state = run.optimizers[0].state_dict()["state"].values()
    return (
        vector(module),
        [b.clone() for b in module.buffers()],
        [s["momentum_buffer"].clone() for s in state],
        [p.grad for p in module.parameters()],
        module.seen,
        (torch.rand(1), random.random(), np.random.rand()),
        module.training and all(part.training for part in module.modules()),
    )


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_look_leaves_no_trace(own_generator: bool) -> None:
    def options() -> dict[str, Any]:
        return {"generator": torch.Generator().manual_seed(5) if own_generator else None}

    assert same(fit(Looks(), **options()), fit(**options()))


def test_batches_are_those_of_the_seed_whenever_the_first_look_is() -> None:
    class Late(Looks):
        """First looks in the second epoch."""

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pass

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
            if trainer.current_epoch:
                if not hasattr(self, "fixed"):
                    super().on_train_start(trainer, pl_module)
                super().on_train_batch_end(trainer, pl_module, *args)

    early, late = Looks(), Late()
    fit(early, accumulate_grad_batches=2)
    fit(late, accumulate_grad_batches=2)
    assert late.losses == early.losses[4:]


def test_it_is_the_loss_in_full_precision_without_dropout() -> None:
    plain, mixed = Looks(1), Looks(1)
    fit(plain, max_steps=1)
    fit(mixed, max_steps=1, precision="bf16-mixed")
    assert mixed.losses == pytest.approx(plain.losses, rel=0.02)  # the weights after one step differ a little
    assert mixed.losses != plain.losses
    assert all(np.float32(loss) == loss for loss in mixed.losses)


def test_what_has_no_loss_is_refused() -> None:
    class Silent(Net):
        def training_step(self, batch: list[Tensor], index: int) -> Any:
            return None

    class Asks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with FixedLoss(trainer, pl_module, 1, 0, "Asks").look() as closure:
                closure()

    with pytest.raises(OptionError, match="Asks: training_step returns no loss"):
        trainer(Asks()).fit(Silent(), DataLoader(samples(), batch_size=8))


class Sharded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self, nn.Linear, self.device_mesh["data_parallel"])


def under(kind: Kind, precision: Any) -> tuple[bool, list[float]]:
    """Whether a run with looks shows the same as one without, and what the looks saw."""
    looks, found = Looks(), []
    for callbacks in ([looks], []):
        seed_everything(0, verbose=False)
        module = Sharded()
        data = DataLoader(samples(16 * world_size()), batch_size=8)
        trainer(*callbacks, strategy=strategy_of(kind), precision=precision, max_epochs=1).fit(module, data)
        found.append(([local(p).detach().clone() for p in module.parameters()], module.seen))
    return same(*found), looks.losses


def both() -> list[tuple[bool, list[float]]]:
    return [under("ddp", "bf16-mixed"), under("fsdp1 full", "bf16-mixed"), under("fsdp2 full", "32-true")]


def test_under_ddp_and_fsdp() -> None:
    for of_rank in run_ranks(both):
        for unseen, losses in of_rank:
            assert unseen
            assert len(losses) == 4
