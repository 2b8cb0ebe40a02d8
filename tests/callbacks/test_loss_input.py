"""The loss that reaches KOALA: that of the whole batch, whatever it is made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_optim import KoalaV
from lightning_optim.callbacks import LossInput
from tests.harness.data import BATCH, batches, samples
from tests.harness.modules import Toy, vector
from tests.harness.ranks import run_ranks
from tests.harness.trainers import Run

ROUNDING = 1e-12


def koala(params: Sequence[Tensor]) -> KoalaV:
    return KoalaV(params, sigma=0.1)


def plain_loop(windows: Sequence[int], parts: int, epochs: int = 3, moment: bool = False) -> Tensor:
    """The weights after steps over windows of so many batches, each of which counts 1/parts; in float64."""
    seed_everything(0, verbose=False)
    module = Toy(koala).double()
    optimizer = koala(list(module.parameters()))
    for _ in range(epochs):
        left = iter(batches())
        for window in windows:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            taken = [[part.double() for part in next(left)] for _ in range(window)]
            for inputs, targets in taken:
                loss = nn.functional.mse_loss(module(inputs), targets) / parts
                torch.autograd.backward(loss)
                total += loss.detach()
            inputs, targets = taken[-1]
            with torch.no_grad():
                each = (module(inputs) - targets).square().mean(1)
            optimizer.set_loss(total, each.square().mean() if moment else None)
            optimizer.step()
    return vector(module)


@pytest.mark.parametrize(
    ("parts", "windows"),
    [(1, [1, 1, 1, 1]), (2, [2, 2]), (4, [4]), (3, [3, 1])],  # Lightning steps at the end of an epoch too
)
def test_the_loss_is_that_of_all_accumulated_batches(parts: int, windows: list[int]) -> None:
    run = Run(koala, LossInput(), accumulate_grad_batches=parts, precision="64-true")
    assert (vector(run.module) - plain_loop(windows, parts)).abs().max() <= ROUNDING
    assert run.module.losses[-1] < run.module.losses[0] / 2


class Knowing(Toy):
    """Tells the optimizer the losses of single samples."""

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        each: Tensor = (self(batch[0]) - batch[1]).square().mean(1)
        optimizer: Any = self.optimizers()
        optimizer.set_loss(each.mean(), each.square().mean())
        return each.mean()


def test_what_the_module_knows_of_single_samples_counts() -> None:
    seed_everything(0, verbose=False)
    run = Run(koala, LossInput(), module=Knowing(koala), precision="64-true")
    assert (vector(run.module) - plain_loop([1] * 4, 1, moment=True)).abs().max() <= ROUNDING
    assert (vector(run.module) - plain_loop([1] * 4, 1)).abs().max() > 1e-3


def test_the_factor_of_a_gradient_scaler_is_not_part_of_the_loss() -> None:
    ends = []
    for scale in (1.0, 256.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run = Run(koala, LossInput(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        assert scaler.get_scale() == scale
        ends.append(vector(run.module))
    assert (ends[0] - ends[1]).abs().max() <= 2e-3  # rounding in float16
    seed_everything(0, verbose=False)
    assert (ends[0] - vector(Toy(koala))).abs().max() > 0.1


def on_ranks(ranks: int) -> Tensor:
    """Every rank takes every n-th sample of each batch."""
    rank, data = int(os.environ.get("RANK", 0)), samples()
    order = [i for first in range(0, len(data), BATCH) for i in range(first + rank, first + BATCH, ranks)]
    loader: DataLoader[Any] = DataLoader(data, batch_size=BATCH // ranks, sampler=order)
    strategy: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    return vector(Run(koala, LossInput(), train=loader, precision="64-true", **strategy).module)


def test_two_processes_read_the_mean_of_their_losses() -> None:
    first, second = run_ranks(on_ranks, 2)
    assert torch.equal(first, second)
    assert (first - on_ranks(1)).abs().max() <= ROUNDING


# ---------------------------------------------------------------- several optimizers by hand


class ByHand(Toy):
    """Two networks with an optimizer each, and what each optimizer was told in a step."""

    second: Any = staticmethod(koala)

    def __init__(self) -> None:
        super().__init__(koala)
        self.automatic_optimization = False
        self.other = nn.Linear(2, 2)
        self.told: list[tuple[int, float]] = []
        self.due: list[tuple[int, float]] = []  # what they should be told

    def configure_optimizers(self) -> Any:
        optimizers = koala(list(self.net.parameters())), self.second(list(self.other.parameters()))
        for i, optimizer in enumerate(optimizers):
            if isinstance(optimizer, KoalaV):
                optimizer.register_step_pre_hook(lambda o, *_, i=i: self.told.append((i, float(o._loss.mean))))
        return list(optimizers)

    def losses_of(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        first = nn.functional.mse_loss(self(batch[0]), batch[1])
        return first, (self.other(batch[1]) - 3).square().mean()

    def backward_of(self, *losses: Tensor) -> None:
        for loss in losses:
            self.manual_backward(loss)

    def step(self, i: int, due: Tensor, **zero: Any) -> None:
        every: Any = self.optimizers()
        every[i].step()
        every[i].zero_grad(**zero)
        if isinstance(every[i].optimizer, KoalaV):
            self.due.append((i, due.item()))

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        """Both backward passes before both steps."""
        first, second = self.losses_of(batch)
        self.backward_of(first, second)
        self.step(0, first)
        self.step(1, second)


class OneLoss(ByHand):
    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        loss = sum(self.losses_of(batch), torch.zeros(()))
        self.backward_of(loss)
        self.step(1, loss)
        self.step(0, loss)


class Adversaries(ByHand):
    """The first loss reaches both networks; the gradient that the second gets from it is set to zero."""

    zero: bool = True

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        every: Any = self.optimizers()
        first = -self.other(self(batch[0])).square().mean() / 100
        self.backward_of(first)
        self.step(0, first)
        every[1].zero_grad(set_to_none=self.zero)
        second = self.other(self(batch[0]).detach()).square().mean()
        self.backward_of(second)
        self.step(1, second, set_to_none=self.zero)


class KeepsZeros(Adversaries):
    zero = False


class Toggled(ByHand):
    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        every: Any = self.optimizers()
        with every[0].toggle_model():
            first = self.other(self(batch[0])).square().mean()
            self.backward_of(first)
        with every[1].toggle_model():
            second = self.other(self(batch[0])).square().mean()
            self.backward_of(second)
        self.step(1, second)
        self.step(0, first)


class SlowSecond(ByHand):
    """The second accumulates two batches while the first steps in each."""

    held: Sequence[Tensor] = ()

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        first, second = self.losses_of(batch)
        self.backward_of(first, second / 2)
        self.step(0, first)
        self.held = [*self.held, second.detach() / 2]
        if index % 2:
            self.step(1, self.held[-2] + self.held[-1])


class BesideSGD(ByHand):
    second = staticmethod(lambda params: torch.optim.SGD(params, lr=0.01))


class BesideLBFGS(ByHand):
    """Whose closure is called many times in a step."""

    second = staticmethod(lambda params: torch.optim.LBFGS(params, lr=0.1))

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        first, _ = self.losses_of(batch)
        self.backward_of(first)
        lbfgs: Any = self.optimizers()

        def closure() -> Tensor:
            lbfgs[1].zero_grad()
            loss = self.losses_of(batch)[1]
            self.backward_of(loss)
            return loss

        lbfgs[1].step(closure)
        self.step(0, first)


BY_HAND = [ByHand, OneLoss, Adversaries, KeepsZeros, Toggled, SlowSecond, BesideSGD, BesideLBFGS]


@pytest.mark.parametrize("module", BY_HAND)
def test_each_optimizer_reads_the_losses_of_its_gradient(module: type[ByHand]) -> None:
    net = module()
    Run(koala, LossInput(), module=net)
    assert len(net.told) >= 12
    for told, due in zip(net.told, net.due, strict=True):
        assert told == pytest.approx(due, rel=1e-6)


class Hidden(ByHand):
    """Reentrant checkpointing hides the parameters of the second loss from its graph."""

    def losses_of(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        first, _ = super().losses_of(batch)
        targets = batch[1].clone().requires_grad_()
        second: Any = checkpoint(self.other, targets, use_reentrant=True)
        return first, second.square().mean()

    def configure_optimizers(self) -> Any:
        return [koala(list(self.net.parameters())), koala(list(self.other.parameters()))]


def test_a_loss_that_hides_its_parameters_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match=r"KoalaV reads the loss, and nobody supplied it.*set_loss\(loss\)"):
        Run(koala, LossInput(), module=Hidden())


def test_without_a_second_moment_the_square_of_the_mean_is_taken() -> None:
    ends = []
    for second_moment in (None, 9.0, 10.0):
        layer = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(layer.weight)
        optimizer = koala(list(layer.parameters()))
        torch.autograd.backward(layer(torch.ones(1, 2, dtype=torch.float64)).sum())
        optimizer.set_loss(3.0, second_moment)
        optimizer.step()
        ends.append(layer.weight.tolist())
    assert ends[0] == ends[1] != ends[2]


def test_without_it_a_plain_step_says_what_to_do() -> None:
    layer = nn.Linear(2, 1)
    optimizer = koala(list(layer.parameters()))
    layer(torch.ones(1, 2)).sum().backward()
    words = r"KoalaV reads the loss, and nobody supplied it. Call optimizer.step\(closure\).*set_loss\(loss\)"
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    optimizer.set_loss(1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match=words):  # each loss serves one step
        optimizer.step()
