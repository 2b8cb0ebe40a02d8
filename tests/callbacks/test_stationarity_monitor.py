"""StationarityMonitor in real Trainers: verdicts on known processes, every strategy, and no trace in the run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import AdamW
from lightning_optim.callbacks import StationarityMonitor
from tests.harness.data import batches
from tests.harness.modules import Plain, Toy
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, rank, strategy_of, world_size
from tests.harness.trainers import trainer
from tests.harness.worlds import whole

APPROACHING, INVARIANT, MOVING = "approaching a stationary point", "invariant measure reached", "still moving"


class Process(LightningModule):
    """SGD on a quadratic with noisy minimum, or down a slope."""

    def __init__(self, noise: float, slope: float = 0.0, gamma: float = 1.0, start: float = 3.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.full((20,), start))
        self.noise, self.slope, self.gamma, self.rate = noise, slope, gamma, 0.7

    def training_step(self, batch: Any, index: int) -> Tensor:
        away = self.theta - self.noise * batch[0][0]
        loss: Tensor = (1 - abs(self.slope)) * away.square().sum() / 2 + self.slope * self.theta.sum()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, self.gamma)
        return [optimizer], [{"scheduler": decay, "interval": "step"}]


def noise(steps: int) -> DataLoader[Any]:
    values = torch.randn(steps, 20, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(values), batch_size=1)


@pytest.mark.parametrize(
    ("module", "verdict"),
    [
        (Process(0.0), APPROACHING),
        (Process(1.0), INVARIANT),
        (Process(1.0, start=300.0), INVARIANT),
        (Process(1.0, slope=-1.0), MOVING),
        (Process(0.0, slope=-1.0, gamma=0.97), "undecided"),
    ],
)
def test_verdicts(module: Process, verdict: str) -> None:
    monitor = StationarityMonitor(window=64, samples=64, batches=16, every=2)
    trainer(monitor, max_epochs=1, limit_train_batches=384).fit(module, noise(384))
    step, found = monitor.history[-1]
    assert (step, found.verdict) == (384, verdict), str(found)
    if verdict == INVARIANT:
        measured = [one.gradient for _, one in monitor.history if one.gradient is not None]
        assert measured[-1].noise == pytest.approx(20, rel=0.4)
        assert measured[-1].square == pytest.approx(float(module.theta.detach().square().sum()), abs=12)


def test_the_loss_is_that_of_the_window() -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.values.append(outputs["loss"].item())

    monitor, losses = StationarityMonitor(window=64, samples=64, batches=0), Losses()
    trainer(monitor, losses, max_epochs=1, limit_train_batches=192).fit(Process(1.0, start=30.0), noise(192))
    (_, before), (_, found) = monitor.history
    assert before.loss == pytest.approx(sum(losses.values[64:128]) / 64, rel=1e-6)
    assert found.loss == pytest.approx(sum(losses.values[128:]) / 64, rel=1e-6)


Numbers = tuple[float, float, float, float, float]


class Both(Toy):
    """The same function of a batch on any number of ranks."""


def make(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.5)


def fit(kind: Kind, look: bool) -> tuple[dict[str, Tensor], list[Numbers]]:
    torch.manual_seed(0)
    module = Both(make)
    monitor = StationarityMonitor(window=64, samples=32, batches=8, every=1)
    rows = torch.arange(32).view(4, world_size(), -1)[:, rank()].reshape(-1).tolist()
    data: Any = batches().dataset
    mine = DataLoader(torch.utils.data.Subset(data, rows), batch_size=8 // world_size())
    fitting = trainer(*([monitor] if look else []), strategy=strategy_of(kind), max_epochs=40, limit_val_batches=0)
    fitting.fit(module, mine, mine)
    model: Any = fitting.strategy.model if kind.startswith("fsdp1") else module
    found = [
        (one.displacement, one.slowdown, one.level, one.loss, one.gradient.square)
        for _, one in monitor.history
        if one.gradient is not None
    ]
    return {name: p.clone() for name, p in whole(model).items()}, found


def on_ranks(kind: Kind) -> list[Numbers]:
    with_it, found = fit(kind, True)
    without, _ = fit(kind, False)
    assert with_it.keys() == without.keys()
    assert all(torch.equal(p, without[name]) for name, p in with_it.items())
    return found


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp1 full", marks=pytest.mark.full), "fsdp2 full"])
def test_ranks_see_what_one_process_sees(kind: Kind) -> None:
    alone = on_ranks("single")
    assert len(alone) == 1
    for found in run_ranks(on_ranks, kind):
        for one, expected in zip(found, alone, strict=True):
            assert one == pytest.approx(expected, rel=1e-3)


def random_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))


def traces(*callbacks: Callback, **options: Any) -> tuple[list[float], list[Any]]:
    torch.manual_seed(3)
    module = Toy(lambda p: AdamW(p, lr=0.01), random_net)
    fitting = trainer(*callbacks, max_epochs=40, gradient_clip_val=0.1, **options)
    fitting.fit(module, batches(shuffle=True), batches(batch_size=16))
    state = [value for slots in fitting.optimizers[0].state.values() for value in slots.values()]
    return module.losses, [*module.state_dict().values(), *state, torch.get_rng_state()]


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "max_time": None}])
def test_a_run_with_it_is_the_run_without_it(options: dict[str, Any]) -> None:
    """Bit for bit: dropout, batch statistics, shuffled samples, clipping, and gradients over other batches."""
    monitor = StationarityMonitor(window=64, samples=32, batches=8, every=1)
    length = {"val_check_interval": 1.0, **options}
    losses, state = traces(monitor, **length)
    other_losses, other_state = traces(**length)
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(state, other_state, strict=True) if isinstance(a, Tensor))
    assert bool(monitor.history) == (not options)


def test_a_resumed_run_goes_on_with_finished_windows(tmp_path: Any) -> None:
    straight, first, second = (StationarityMonitor(window=64, batches=8) for _ in range(3))
    for monitor, epochs, path in ((straight, 3, None), (first, 2, None), (second, 3, tmp_path / "two.ckpt")):
        module = Process(1.0)
        run = trainer(monitor, max_epochs=epochs, limit_train_batches=64)
        run.fit(module, noise(64), ckpt_path=path)
        if monitor is first:
            run.save_checkpoint(tmp_path / "two.ckpt")
    (step, found), (again, resumed) = straight.history[-1], second.history[-1]
    assert step == again == 192
    assert (resumed.verdict, resumed.slowdown, resumed.displacement) == (
        found.verdict,
        found.slowdown,
        found.displacement,
    )
    assert resumed.first_gradient == found.first_gradient


class Silent(Plain):
    """Manual optimization that returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return make(list(self.parameters()))


class Constant(Plain):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch, index) + self.still

    def configure_optimizers(self) -> Any:
        return make(list(self.net.requires_grad_(False).parameters()))

    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Parameter(torch.zeros(()))


class Broken(Toy):
    def training_step(self, batch: Any, index: int) -> Tensor:
        return super().training_step(batch, index) * (float("nan") if self.trainer.global_step > 70 else 1.0)


def told(monitor: StationarityMonitor, module: LightningModule) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(monitor, max_epochs=65, limit_val_batches=0).fit(module, batches(), batches())
    return [str(w.message) for w in caught if "StationarityMonitor" in str(w.message)]


def test_what_it_cannot_see_it_says_once() -> None:
    monitor = StationarityMonitor(window=64, samples=32, batches=8)
    (warned,) = told(monitor, Silent())
    assert "the full gradient is not measured: training_step returns no loss" in warned
    assert len(monitor.history) == 3  # without losses
    (warned,) = told(StationarityMonitor(window=64, samples=32, batches=0), Broken(make))
    assert "weights are not finite" in warned


def test_a_frozen_model_is_nothing_to_watch() -> None:
    monitor = StationarityMonitor()
    with pytest.warns(UserWarning, match="no parameter is trained"):
        trainer(monitor, max_epochs=1).fit(Constant(), batches())
    assert monitor.history == []


class Pulled(Process):
    """Comes to rest between the minimum of the loss and zero, where the gradient is not small."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (self.theta - 2).square().sum() / 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, weight_decay=0.5)


def test_a_weight_decay_balances_the_gradient() -> None:
    monitor = StationarityMonitor(window=64, batches=8)
    trainer(monitor, max_epochs=1).fit(Pulled(0.0), noise(192))
    assert monitor.history[-1][1].verdict == APPROACHING


def test_slow_weights_are_compared_over_more_windows() -> None:
    """They are correlated over twenty steps, too long for windows of 64."""
    module = Process(1.0)
    module.rate = 0.1
    monitor = StationarityMonitor(window=64, batches=0)
    trainer(monitor, max_epochs=1).fit(module, noise(64 * 24))
    verdicts = [found.verdict for _, found in monitor.history]
    assert verdicts[0] == MOVING
    assert verdicts[-1] == INVARIANT
