"""What callbacks see that look at curvature: the numbers of the Hessian itself, while training does not notice."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import AdamW, Lion, OptionError
from lightning_optim.analysis import batch_eigenvalue, heavy_ball
from lightning_optim.callbacks import BatchSizeScaling, CurvatureMonitor, CurvatureSchedule, LocalGeometry
from lightning_optim.callbacks.looking_callback import LookingCallback
from lightning_optim.distributed.placement import local
from tests.harness.data import samples
from tests.harness.modules import Make
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, shard, strategy_of, world_size
from tests.harness.tiny_net import TinyNet, exact_hessian, loss_of, six
from tests.harness.trainers import trainer

MAKERS: dict[str, Callable[..., LookingCallback]] = {
    "LocalGeometry": lambda **options: LocalGeometry(**{"every_n_steps": 2, "probes": 3, **options}),
    "CurvatureMonitor": lambda **options: CurvatureMonitor(**{"every_n_steps": 2, "steps": 4, **options}),
}


def momentum(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.01, state_bits=8)


class Noisy(LightningModule):
    """With all that a look could disturb: dropout, batch normalization, random numbers of three libraries."""

    def __init__(self, make: Make = momentum, norm: bool = True) -> None:
        super().__init__()
        self.make = make
        middle = [nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5)] if norm else [nn.Tanh()]
        self.net = nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 2))
        self.seen: list[Tensor] = []

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self, nn.Linear, self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen.append(batch[0].clone())
        noise = random.random() + np.random.rand() + torch.rand(())
        self.log("noise", noise)
        return nn.functional.mse_loss(self.net(batch[0]) * (1 + 0.1 * noise), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


def fresh(make: Make = momentum, norm: bool = True) -> Noisy:
    seed_everything(1, verbose=False)
    return Noisy(make, norm)


def fit(module: LightningModule, *callbacks: Callback, **options: Any) -> list[Any]:
    """All that a run may show: weights, statistics, gradients, state, batches, and what generators give next."""
    seed_everything(0, verbose=False)
    data = DataLoader(samples(16 * world_size()), batch_size=4, shuffle=world_size() == 1)
    path = options.pop("ckpt_path", None)
    run = trainer(*callbacks, **{"max_epochs": 2, **options})
    run.fit(module, data, ckpt_path=path)
    params = list(module.parameters())
    state = [value for values in run.optimizers[0].state_dict()["state"].values() for value in values.values()]
    found = [*params, *module.buffers(), *(p.grad for p in params), *state, *getattr(module, "seen", ())]
    tensors = [local(value).detach().clone() for value in found if isinstance(value, Tensor)]
    return [*tensors, torch.rand(1), random.random(), np.random.rand()]


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (momentum, {}),
        (adamw, {"accumulate_grad_batches": 2, "precision": "bf16-mixed"}),
    ],
)
def test_training_does_not_notice(name: str, make: Make, options: dict[str, Any]) -> None:
    callback = MAKERS[name](batches=2)
    assert same(fit(fresh(make), callback, **options), fit(fresh(make), **options))
    assert [found["step"] for found in callback.history] == ([0, 2, 4] if "precision" in options else [0, 2, 4, 6, 8])


def on_ranks(kind: Kind, precision: Any) -> list[Any]:
    """Whether runs show the same with and without looks, and what the looks have found."""
    found: list[Any] = []
    for name, make_callback in MAKERS.items():
        callback, runs = make_callback(), []
        for callbacks in ([callback], []):
            spread: dict[str, Any] = {"strategy": strategy_of(kind), "precision": precision, "max_epochs": 1}
            runs.append(fit(fresh(norm=False), *callbacks, **spread))
        found.append((name, same(*runs), callback.history))
    return found


def rates_on(kind: Kind) -> Any:
    schedule = CurvatureSchedule(every_n_steps=10, steps=5)
    fit(fresh(norm=False), schedule, strategy=strategy_of(kind), max_steps=2)
    return schedule.history[0]


def everywhere() -> tuple[list[list[Any]], list[Any]]:
    looks = [on_ranks("ddp", "bf16-mixed"), on_ranks("fsdp1 full", "bf16-mixed"), on_ranks("fsdp2 full", "32-true")]
    return looks, [rates_on("ddp"), rates_on("fsdp1 full"), rates_on("fsdp2 full")]


def test_under_ddp_and_fsdp_it_finds_the_same_without_a_trace() -> None:
    """The first look, before training; under FSDP to the accuracy of differences in float32."""
    ranks = run_ranks(everywhere)
    for looks, rates in ranks:
        assert rates == ranks[0][1]
        assert rates[1] == pytest.approx(rates[0], rel=1e-2)
        assert rates[2] == pytest.approx(rates[0], rel=1e-2)
        ddp, fsdp1, fsdp2 = looks
        for one, *others in zip(ddp, fsdp1, fsdp2, strict=True):
            assert [unseen for _, unseen, _ in (one, *others)] == [True] * 3, one[0]
            for _, _, history in others:
                assert history[0] == pytest.approx(one[2][0], rel=1e-3)
            assert len(one[2]) == 5


class Exact(LightningModule):
    """The six samples of the worked numbers, as one batch."""

    def __init__(self, make: Make = momentum) -> None:
        super().__init__()
        self.net, self.make = TinyNet(), make

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return loss_of(self.net, (batch[0], batch[1]))

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))

    def hessian(self) -> Tensor:
        return exact_hessian(self.net, six())


def fit_exact(module: LightningModule, *callbacks: Callback, **options: Any) -> None:
    data, path = DataLoader(TensorDataset(*six()), batch_size=6), options.pop("ckpt_path", None)
    trainer(*callbacks, **{"max_epochs": 2, "log_every_n_steps": 1, **options}).fit(module, data, ckpt_path=path)


def test_r_med_is_that_of_the_matrix_within_its_error() -> None:
    module, geometry = Exact(), LocalGeometry(every_n_steps=2, probes=400, layers=True)
    fit_exact(module, geometry)
    first, last = geometry.history
    assert first["loss"] == pytest.approx(1.063653606626, abs=1e-10)
    for found, exact in ((first, exact_hessian(TinyNet(), six())), (last, module.hessian())):
        sizes = exact.diagonal().abs().sort().values
        assert abs(found["r_med"] - float(sizes[-1] / sizes[15])) < 3 * found["r_med_error"]
        assert found["largest"] == pytest.approx(float(sizes[-1]), rel=0.2)
    assert set(first) >= {"layer/net.inward.weight", "layer/net.out.bias"}


def test_eigenvalues_and_trace_are_those_of_the_matrix() -> None:
    module, monitor = Exact(), CurvatureMonitor(every_n_steps=2, steps=31, probes=20)
    fit_exact(module, monitor)
    first, last = monitor.history
    assert (first["largest"], first["smallest"]) == pytest.approx((2.473035665290, -0.723972882584), abs=1e-9)
    assert abs(first["trace"] - 4.802144159818) < 3 * first["trace_error"]
    assert first["gradient_norm"] == pytest.approx(0.488176869704, abs=1e-10)
    values = torch.linalg.eigvalsh(module.hessian())
    assert last["largest"] == pytest.approx(float(values[-1]), abs=1e-9)
    assert last["lr_times_largest"] == pytest.approx(0.02 * float(values[-1]), abs=1e-9)
    assert last["threshold"] == pytest.approx(2 * 1.9 / 0.02)
    assert last["stability"] == pytest.approx(float(values[-1]) / 190, abs=1e-9)


@pytest.mark.parametrize("of_torch", [False, True])
def test_stability_of_adam_is_that_of_the_preconditioned_matrix(of_torch: bool) -> None:
    """Two groups with rates of their own; the matrix is written out."""

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": params[:2], "lr": 0.01}, {"params": params[2:], "lr": 0.03}]
        return torch.optim.AdamW(groups) if of_torch else AdamW(groups)

    module, monitor = Exact(make), CurvatureMonitor(every_n_steps=2, steps=31, probes=1)
    fit_exact(module, monitor)
    state = [module.trainer.optimizers[0].state[p] for p in module.parameters()]
    root = torch.cat([(s["exp_avg_sq"] / (1 - 0.999**2)).sqrt().reshape(-1) + 1e-8 for s in state])
    lr = torch.cat(
        [torch.full((p.numel(),), rate) for p, rate in zip(module.parameters(), (0.01, 0.01, 0.03, 0.03), strict=True)]
    )
    scale = (lr.double() * 0.1 / (2 * 1.9) / (root * (1 - 0.9**2))).sqrt()
    values = torch.linalg.eigvalsh(scale[:, None] * module.hessian() * scale)
    assert monitor.history[1]["stability"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert "stability" not in monitor.history[0]  # there is no state yet


def test_an_optimizer_without_a_known_preconditioner_is_said_once() -> None:
    monitor = CurvatureMonitor(every_n_steps=1, steps=3)
    with pytest.warns(UserWarning, match="logs eigenvalues, but no stability: for Lion") as said:
        fit_exact(Exact(Lion), monitor, max_epochs=3)
    assert len([w for w in said if "stability" in str(w.message)]) == 1
    assert [set(found) & {"stability", "largest"} for found in monitor.history] == [{"largest"}] * 4


def test_the_schedule_takes_the_rates_of_the_spectrum() -> None:
    """On a quadratic with eigenvalues from 1 to 10, whose noise is zero: Polyak's rates, and fast convergence."""

    class Quadratic(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(10, dtype=torch.float64))
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = (torch.arange(1.0, 11.0, dtype=torch.float64) * self.p.square()).sum() / 2
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.p], lr=0.1, momentum=0.5)

    def run(*callbacks: Callback) -> Quadratic:
        module = Quadratic()
        trainer(*callbacks, max_steps=40).fit(module, DataLoader(TensorDataset(torch.zeros(40, 1))))
        return module

    schedule = CurvatureSchedule(every_n_steps=100, steps=10, small="least", safety=1.0, most_change=1e6)
    found, plain = run(schedule), run()
    assert schedule.history[0]["noise"] == pytest.approx(0, abs=1e-20)
    assert schedule.rates == pytest.approx(heavy_ball(10, 1), rel=1e-9)
    assert found.losses[-1] < plain.losses[-1] / 10
    group = found.trainer.optimizers[0].param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.1, 0.5)  # as it was configured, once the fit is over


def test_the_schedule_corrects_for_the_batch_size_and_bounds_changes() -> None:
    """Batches whose Hessians are random matrices: the corrected eigenvalue is that of a batch of two accumulated."""
    rng, size = torch.Generator().manual_seed(0), 120
    noise = torch.randn(400, size, size, generator=rng, dtype=torch.float64)
    noise = (noise + noise.mT) * (0.2 / size) ** 0.5 / 2**0.5
    noise[:, 0, 0] += 2.0
    noise += torch.eye(size, dtype=torch.float64) * 1e-3

    class Random(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.full((size,), 1e-3, dtype=torch.float64))

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.p @ batch[0][0] @ self.p / 2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([self.p], lr=0.01, momentum=0.9)

    schedule = CurvatureSchedule(every_n_steps=1000, steps=60, batches=8)
    trainer(schedule, max_steps=1, accumulate_grad_batches=2).fit(Random(), DataLoader(TensorDataset(noise)))
    (found,) = schedule.history
    kappa = found["noise"]
    assert kappa == pytest.approx(0.2, rel=0.15)  # of one batch
    assert found["largest"] == pytest.approx(batch_eigenvalue(2.0, kappa / 8), rel=0.05)
    assert found["corrected"] == pytest.approx(batch_eigenvalue(2.0, kappa / 2), rel=0.05)
    assert found["lr"] == pytest.approx(0.02)  # twice what it was, no more
    assert found["momentum"] == pytest.approx(0.8)  # 1 - momentum is twice what it was


def test_the_schedule_resumes_its_rates(tmp_path: Path) -> None:
    def run(epochs: int, path: str | None = None) -> tuple[CurvatureSchedule, list[Any]]:
        module, schedule = Exact(), CurvatureSchedule(every_n_steps=3, steps=10)
        save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        fit_exact(module, schedule, save, max_epochs=epochs, ckpt_path=path)
        return schedule, [p.detach() for p in module.parameters()]

    whole, weights = run(8)
    run(4)
    resumed, again = run(8, str(tmp_path / "step=4.ckpt"))
    assert len(whole.history) == 3
    assert resumed.history == whole.history
    assert same(weights, again)
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]
    assert saved["lr"] == 0.02  # the configured one


@pytest.mark.parametrize(
    ("make", "callbacks", "words"),
    [
        (adamw, [], "AdamW steps otherwise. Use sgd or sgdw"),
        (momentum, [BatchSizeScaling(4)], "sets the learning rate, and BatchSizeScaling does too"),
    ],
)
def test_the_schedule_refuses_what_it_cannot_set(make: Make, callbacks: list[Callback], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        fit(fresh(make), CurvatureSchedule(), *callbacks)


def test_a_loss_that_is_no_number_is_said_once_and_training_goes_on() -> None:
    class Broken(Exact):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return super().training_step(batch, index) * math.nan

    callback = MAKERS["LocalGeometry"](every_n_steps=1)
    with pytest.warns(UserWarning, match=r"LocalGeometry cannot look at step 0: .* is nan.* Training goes on") as said:
        fit_exact(Broken(), callback, max_epochs=3)
    assert len([w for w in said if "cannot look" in str(w.message)]) == 1
    assert callback.history == []


def test_a_resumed_run_finds_what_an_unbroken_one_finds(tmp_path: Path) -> None:
    for make_callback in MAKERS.values():
        whole, part, rest = (make_callback() for _ in range(3))

        def save() -> Callback:
            return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)

        fit(fresh(), whole)
        fit(fresh(), part, save(), max_epochs=1)
        fit(fresh(), rest, save(), ckpt_path=str(tmp_path / "step=4.ckpt"))
        assert rest.history[: len(part.history)] == part.history
        assert [found["step"] for found in rest.history] == [found["step"] for found in whole.history]
        for file in tmp_path.glob("*.ckpt"):
            file.unlink()


def test_under_manual_optimization_the_returned_loss_is_looked_at() -> None:
    class Pair(Exact):
        """Two optimizers; it returns the loss, or does not."""

        def __init__(self, returns: bool) -> None:
            super().__init__()
            self.automatic_optimization, self.returns = False, returns

        def training_step(self, batch: list[Tensor], index: int) -> Any:
            every: Any = self.optimizers()
            loss = super().training_step(batch, index)
            for optimizer in every:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in every:
                optimizer.step()
            return loss if self.returns else None

        def configure_optimizers(self) -> Any:
            return [self.make(list(layer.parameters())) for layer in (self.net.inward, self.net.out)]

    callback = MAKERS["LocalGeometry"]()
    fit_exact(Pair(returns=True), callback)
    assert [found["step"] for found in callback.history] == [0, 2, 4]
    with pytest.warns(UserWarning, match="training_step returns no loss"):
        fit_exact(Pair(returns=False), callback)


def test_scalars_and_pictures_are_in_tensorboard(tmp_path: Path) -> None:
    for make_callback in MAKERS.values():
        callback = make_callback()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_exact(Exact(), callback, logger=TensorBoardLogger(tmp_path, name=callback.prefix))
        events = EventAccumulator(str(next((tmp_path / callback.prefix).glob("version_*"))), {"images": 0})
        events.Reload()
        tags = events.Tags()
        names = {f"{callback.prefix}/{name}" for name in callback.history[-1]} - {f"{callback.prefix}/step"}
        assert names - set(tags["scalars"]) <= {f"{callback.prefix}/loss"}
        assert [tag for tag in tags["images"] if tag.startswith(callback.prefix)]
