"""Warm-ups and decays against closed forms, plain loops and schedulers; what is logged is what is applied."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_optim import OptimizerStrategy, OptionError, create_optimizer
from lightning_optim.callbacks import IterateAveraging, LookaheadSync, NonFiniteGuard, WarmupFreeSchedule
from lightning_optim.cli import main
from lightning_optim.training import second_moment
from lightning_optim.training.schedules import SCHEDULES
from tests.harness.data import batches, samples, seeded_samples
from tests.harness.modules import Made, Make, Toy, vector
from tests.harness.nets import seeded_net
from tests.harness.ranks import run_ranks
from tests.harness.rates import (
    LR,
    SCHEDULED,
    Applied,
    Manual,
    Meddler,
    Note,
    Rest,
    adamw,
    adan,
    logged,
    plain_loop,
    rates,
    rmsprop,
    sgd,
    stored,
    warm,
)
from tests.harness.strategies import strategy_of
from tests.harness.trainers import Run, trainer

ROUNDING = 1e-13  # of sums in another order, in float64


# ---------------------------------------------------------------- by hand


# ---------------------------------------------------------------- what is applied


@pytest.mark.parametrize("make", [adan, adamw, rmsprop])
@pytest.mark.parametrize(
    ("rule", "decay", "final"),
    [
        ("linear", "constant", None),
        ("exponential", "cosine", 0.1),
        ("rectified", "linear", None),
        ("linear", "flat_linear", 0.2),
        ("none", "inverse_sqrt", None),
    ],
)
def test_training_is_the_plain_loop_at_these_rates(make: Make, rule: Any, decay: Any, final: float | None) -> None:
    applied = Applied()
    run = Run(make, WarmupFreeSchedule(rule, decay, final), applied, precision="64-true")
    expected = rates(rule, decay, 12, 12, e=final or 0.0)
    assert applied.first == pytest.approx(expected, rel=1e-12)
    assert (vector(run.module) - plain_loop(make, expected)).abs().max() <= ROUNDING
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == LR  # as it was


@pytest.mark.filterwarnings("ignore:WarmupFreeSchedule. training has 12 steps")
def test_every_group_has_its_own_beta2() -> None:
    def grouped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups: list[Any] = [{"params": params[:2], "betas": (0.9, 0.7)}, {"params": params[2:], "betas": (0.9, 0.99)}]
        return torch.optim.Adam(groups, lr=LR)

    applied = Applied()
    Run(grouped, WarmupFreeSchedule("exponential"), applied)
    expected = [[LR * warm("exponential", t, b) for b in (0.7, 0.99)] for t in range(1, 13)]
    assert applied.rates[0] == [pytest.approx(both, rel=1e-12) for both in expected]


def test_options_of_the_decays() -> None:
    for options, expected in (
        ({"decay": "inverse_sqrt", "timescale": 3}, [math.sqrt(3 / (t + 3)) for t in range(12)]),
        ({"decay": "inverse_sqrt", "timescale": 0.25}, [math.sqrt(3 / (t + 3)) for t in range(12)]),
        ({"decay": "flat_linear", "decay_fraction": 0.5}, [1.0] * 6 + [1 - u / 6 for u in range(6)]),
        ({"decay": "linear", "total_steps": 6}, [max(0.0, 1 - t / 6) for t in range(12)]),
    ):
        applied = Applied()
        Run(sgd, WarmupFreeSchedule("none", **options), applied)  # type: ignore[arg-type]
        assert applied.first == pytest.approx([LR * x for x in expected], abs=1e-15)


@pytest.mark.parametrize("decay", ["inverse_sqrt", "flat_linear"])
def test_the_optimizers_own_schedule_is_the_same_arithmetic(decay: Any) -> None:
    class Scheduled(Toy):
        def configure_optimizers(self) -> Any:
            return OptimizerStrategy("adamw", lr=LR, no_decay=[], schedule=decay).configure(self)

    applied, mine = Applied(), Applied()
    Run(adamw, applied, module=Scheduled(adamw))
    Run(adamw, WarmupFreeSchedule("none", decay), mine)
    assert applied.first == mine.first == pytest.approx(rates("none", decay, 12, 12), rel=1e-12)


def test_a_learning_rate_that_is_a_tensor_is_filled() -> None:
    given = torch.tensor(LR, dtype=torch.float64)
    applied = Applied()
    run = Run(lambda p: torch.optim.Adam(p, lr=given, betas=(0.9, 0.7)), WarmupFreeSchedule("linear"), applied)
    assert applied.first == pytest.approx(rates("linear", "constant", 12, 12), rel=1e-12)
    assert run.trainer.optimizers[0].param_groups[0]["lr"] is given
    assert float(given) == LR


# ---------------------------------------------------------------- how long training is


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 2}, 8),
        ({"max_steps": 5, "max_epochs": None}, 5),
        ({"accumulate_grad_batches": 2}, 6),
        ({"accumulate_grad_batches": 3}, 6),  # an epoch ends with a step over one batch
        ({"limit_train_batches": 3, "accumulate_grad_batches": 2}, 6),
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
    ],
)
def test_a_decay_ends_with_the_training(options: dict[str, Any], steps: int) -> None:
    applied = Applied()
    Run(adan, WarmupFreeSchedule("none", "linear"), applied, **options)
    assert applied.first == pytest.approx([LR * (1 - t / steps) for t in range(steps)], rel=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_accumulation_that_changes_between_epochs(first: bool) -> None:
    changes, applied = GradientAccumulationScheduler({0: 1, 1: 4}), Applied()
    both: list[Callback] = [WarmupFreeSchedule("none", "linear"), changes]
    Run(adan, *(both if first else both[::-1]), applied)
    assert applied.first == pytest.approx([LR * (1 - t / 6) for t in range(6)], rel=1e-12)  # 4 + 1 + 1


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(samples())


@pytest.mark.parametrize(
    ("options", "stream"),
    [
        ({"max_time": {"seconds": 60}, "max_epochs": None}, False),
        ({"max_epochs": -1}, False),
        ({"max_epochs": 2}, True),  # of epochs without a length
    ],
)
@pytest.mark.filterwarnings("ignore:WarmupFreeSchedule. training has 3 steps")
def test_a_length_that_nobody_knows(options: dict[str, Any], stream: bool) -> None:
    train: Any = DataLoader(Stream(), batch_size=8) if stream else None
    module = Toy(adan)
    for decay in ("linear", "cosine", "flat_linear", "inverse_sqrt"):
        words = f"decay='{decay}' needs to know how long training is.*max_time is no number of steps.*total_steps"
        with pytest.raises(OptionError, match=words):
            Run(adan, WarmupFreeSchedule("linear", decay), train=train, module=module, **options)
    assert module.losses == []
    if stream:
        scheduled = {"name": "adan", "schedule": "cosine"}

        class Scheduled(Toy):
            def configure_optimizers(self) -> Any:
                return OptimizerStrategy.parse(scheduled).configure(self)

        with pytest.raises(OptionError, match="schedule 'cosine' needs to know how long training is"):
            Run(adan, module=Scheduled(adan), train=train, **options)
    applied = Applied()
    Run(adan, WarmupFreeSchedule("linear", "linear", total_steps=9), applied, train=train, max_steps=4)
    assert applied.first == pytest.approx(rates("linear", "linear", 4, 9), rel=1e-12)
    for needless in (WarmupFreeSchedule("linear"), WarmupFreeSchedule("none", "inverse_sqrt", timescale=5)):
        Run(adan, needless, train=train, **{**options, "max_steps": 3})


# ---------------------------------------------------------------- with a scheduler


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("make", [adan, adamw])
def test_the_warmup_multiplies_what_a_scheduler_sets(name: str, make: Make) -> None:
    """Whether it computes the next rate from the last one or from the first."""
    alone, warmed = Applied(), Applied()
    Run(make, alone, module=SCHEDULED[name](make))
    run = Run(make, WarmupFreeSchedule("linear"), warmed, module=SCHEDULED[name](make))
    assert len(set(alone.first)) > 1
    assert warmed.first == [lr * warm("linear", t, 0.7) for t, lr in enumerate(alone.first, start=1)]
    [config] = run.trainer.lr_scheduler_configs
    assert type(config.scheduler).__module__ == "torch.optim.lr_scheduler"  # the class is its own again
    assert type(config.scheduler) is getattr(lr_scheduler, type(config.scheduler).__name__)


def test_two_decays_are_refused() -> None:
    words = r"decay='cosine' meets a scheduler \(StepLR\).*leave the one or the other out. With decay='constant'"
    module = SCHEDULED["step"](adan)
    with pytest.raises(OptionError, match=words):
        Run(adan, WarmupFreeSchedule("linear", "cosine"), module=module)
    assert module.losses == []


def default_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR)


@pytest.mark.parametrize(("warmup", "over"), [("linear", 1 - 1e-6), ("exponential", 0.99), ("rectified", 0.99)])
def test_a_training_that_ends_in_the_warmup_is_warned_of(warmup: Any, over: float) -> None:
    with pytest.warns(UserWarning, match="training has 12 steps.*with beta2=0.999 of AdamW") as caught:
        Run(default_adamw, WarmupFreeSchedule(warmup))
    (message,) = [str(w.message) for w in caught if "WarmupFreeSchedule" in str(w.message)]
    takes = next(t for t in range(1, 10_000) if warm(warmup, t, 0.999) >= over)
    told = (
        f"takes {takes} with beta2=0.999 of AdamW. So the learning rate ends at {100 * warm(warmup, 12, 0.999):.2g} %"
    )
    assert told in message
    assert message.endswith("Train longer, or set warmup='none'.")


def test_the_beta2_that_is_advised_warms_up_in_time() -> None:
    """A fifth of training; and nobody warns where nobody knows the length, or in a test run."""
    with pytest.warns(UserWarning, match=r"training has 176 steps.*or here: 0.9432 takes 36 steps, or set"):
        Run(default_adamw, WarmupFreeSchedule(), max_epochs=44)
    Run(default_adamw, WarmupFreeSchedule(beta2=0.9432), max_epochs=44)
    Run(default_adamw, WarmupFreeSchedule(), fast_dev_run=3)
    Run(default_adamw, WarmupFreeSchedule(), train=DataLoader(Stream(), batch_size=8))


class Scheduled(Toy):
    def __init__(self, schedule: dict[str, Any]) -> None:
        super().__init__(adan)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        return OptimizerStrategy.parse({"name": "adan", "schedule": self.schedule}).configure(self)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"max_steps": 12}, {"max_steps": 12, "max_epochs": -1}])
def test_a_schedule_that_is_all_warmup_is_warned_of(name: str, options: dict[str, Any]) -> None:
    words = rf"schedule '{name}': training has 12 steps, and warmup_steps=48.*ends at 25 %.*warmup_steps, such as 1\."
    with pytest.warns(UserWarning, match=words) as caught:
        Run(adan, module=Scheduled({"name": name, "warmup_steps": 48}), **options)
    assert len([w for w in caught if "warmup_steps" in str(w.message)]) == 1
    Run(adan, module=Scheduled({"name": name, "warmup_steps": 48}), fast_dev_run=3)
    Run(adan, module=Scheduled({"name": name, "warmup_steps": 6}), **options)


class Unfreezer(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("other", "steps"), [(Meddler, 2), (Unfreezer, 4), (lambda: StochasticWeightAveraging(0.1, 1), 4)]
)
def test_whoever_else_changes_learning_rates_is_refused(other: Callable[[], Callback], steps: int, first: bool) -> None:
    both = [WarmupFreeSchedule("linear"), other()]
    module = Toy(adamw)
    words = r"learning rates of AdamW are \[.*WarmupFreeSchedule had set \[.*leave the one or the other out"
    with pytest.raises(OptionError, match=words):
        Run(adamw, *(both if first else both[::-1]), module=module)
    assert len(module.losses) == steps


@pytest.mark.parametrize("first", [True, False])
def test_with_callbacks_that_change_weights(first: bool) -> None:
    others: list[Callback] = [LookaheadSync(3), IterateAveraging("ema")]
    warmup: list[Callback] = [WarmupFreeSchedule("linear", "cosine")]
    applied = Applied()
    run = Run(adan, *(warmup + others if first else others + warmup), applied, precision="64-true")
    assert applied.first == pytest.approx(rates("linear", "cosine", 12, 12), rel=1e-12)

    class Given(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            trainer.optimizers[0].param_groups[0]["lr"] = rates("linear", "cosine", 12, 12)[trainer.global_step]

    by_hand = Run(adan, Given(), LookaheadSync(3), IterateAveraging("ema"), precision="64-true")
    assert (vector(run.module) - vector(by_hand.module)).abs().max() <= ROUNDING


# ---------------------------------------------------------------- what is logged


@pytest.mark.parametrize("module", [None, "step"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged_is_applied(first: bool, accumulate: int, module: str | None, tmp_path: Path) -> None:
    both: list[Callback] = [WarmupFreeSchedule("linear"), LearningRateMonitor()]
    applied = Applied()
    Run(
        adan,
        *(both if first else both[::-1]),
        applied,
        module=None if module is None else SCHEDULED[module](adan),
        logger=TensorBoardLogger(str(tmp_path), name="", version=""),
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )
    steps = 12 // accumulate
    expected = stored(applied.first)
    found = logged(tmp_path)
    assert len(set(applied.first)) > 2
    assert found["lr-Adan"] == found["warmup_free_schedule/lr"] == expected
    factors = [warm("linear", t, 0.7) for t in range(1, steps + 1)]
    assert found["warmup_free_schedule/factor"] == stored(factors)


def test_what_is_logged_of_groups_and_how_often(tmp_path: Path) -> None:
    def grouped(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups: list[Any] = [{"params": params[:2], "name": "body"}, {"params": params[2:], "lr": 0.1}]
        return torch.optim.Adam(groups, lr=LR, betas=(0.9, 0.7))

    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    Run(grouped, WarmupFreeSchedule("linear"), logger=logger, log_every_n_steps=4)
    found = logged(tmp_path)
    for tag, lr in (("lr/body", LR), ("lr/1", 0.1), ("factor/body", 1.0), ("factor/1", 1.0)):
        expected = {t: pytest.approx(lr * warm("linear", t + 1, 0.7), rel=1e-6) for t in (3, 7, 11)}
        assert found[f"warmup_free_schedule/{tag}"] == expected


# ---------------------------------------------------------------- real updates


class Faulty(Toy):
    """Has batches without a loss, and gradients that overflow."""

    def __init__(self, make: Make, without: tuple[int, ...] = (), infinite: tuple[int, ...] = ()) -> None:
        super().__init__(make)
        self.without, self.infinite = without, infinite

    def training_step(self, batch: Any, index: int) -> Any:
        step = len(self.losses)
        loss = super().training_step(batch, index)
        if step in self.without:
            return None
        return loss * math.inf if step in self.infinite else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("make", [adan, adamw])
@pytest.mark.parametrize("scheduled", [False, True])
def test_only_real_updates_count(make: Make, scheduled: bool) -> None:
    class Both(Faulty):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(list(self.parameters()))
            if not scheduled:
                return optimizer
            return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]

    applied = Applied()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=100)
    module = Both(make, without=(1, 6), infinite=(3, 4))
    run = Run(
        make,
        WarmupFreeSchedule("linear", "constant"),
        applied,
        module=module,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    assert run.trainer.global_step == 12
    assert scaler.get_scale() == 0.5  # halved twice: two steps were skipped
    updates = [0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 7]  # before each batch
    by_scheduler = [0.5**t if scheduled else 1.0 for t in range(12)]  # Lightning lets that count every batch
    expected = [LR * s * warm("linear", t + 1, 0.7) for s, t in zip(by_scheduler, updates, strict=True)]
    assert applied.first == expected


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_do_not_count_in_single_precision() -> None:
    applied = Applied()
    Run(adan, WarmupFreeSchedule("linear"), applied, module=Faulty(adan, without=(0, 1, 5)))
    updates = [0, 0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
    assert applied.first == pytest.approx([LR * warm("linear", t + 1, 0.7) for t in updates], rel=1e-12)


@pytest.mark.filterwarnings("ignore:NonFiniteGuard skips step")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("make", [adan, adamw])
def test_steps_that_a_guard_skips_do_not_count(make: Make, first: bool) -> None:
    both: list[Callback] = [WarmupFreeSchedule("linear"), NonFiniteGuard()]
    applied = Applied()
    Run(make, *(both if first else both[::-1]), applied, module=Faulty(make, infinite=(2, 3)))
    updates = [0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9]
    assert applied.first == pytest.approx([LR * warm("linear", t + 1, 0.7) for t in updates], rel=1e-12)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("step", [4, 5])  # the end of an epoch, and the middle of one
@pytest.mark.parametrize("name", [None, "step", "cosine"])
@pytest.mark.parametrize("make", [adan, adamw])
def test_a_resumed_run_is_the_same_run(make: Make, name: str | None, step: int, tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Run, Applied]:
        applied = Applied()
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)
        module = Toy(make) if name is None else SCHEDULED[name](make)
        schedule = WarmupFreeSchedule("rectified", "flat_linear" if name is None else "constant")
        train: Any = Rest(step)
        return Run(make, schedule, applied, saving, module=module, train=train, ckpt_path=ckpt_path), applied

    whole, before = run(tmp_path)
    path = tmp_path / f"step={step}.ckpt"
    rest, after = run(tmp_path / "again", path)
    assert after.first == before.first[step:]
    assert [w.tolist() for w in rest.walk.weights[-7:]] == [w.tolist() for w in whole.walk.weights[-7:]]
    saved = torch.load(path, weights_only=True)
    assert saved["callbacks"]["WarmupFreeSchedule"] == {"steps": [step]}
    if name is None:
        assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == LR  # without the factor


@pytest.mark.parametrize("make", [adan, adamw, sgd])
def test_a_run_that_it_joins_and_one_that_it_leaves(make: Make, tmp_path: Path) -> None:
    """A run begun without it decays from where it is, and a run that goes on without it has the plain rate."""
    Run(make, ModelCheckpoint(tmp_path, "{step}"), max_epochs=1)
    applied = Applied()
    both = [WarmupFreeSchedule("none", "linear"), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)]
    Run(make, *both, applied, max_epochs=2, ckpt_path=tmp_path / "step=4.ckpt")
    assert applied.first == pytest.approx([LR * (1 - t / 8) for t in range(4, 8)], rel=1e-12)
    left = Applied()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        Run(make, left, max_epochs=3, ckpt_path=tmp_path / "step=8.ckpt")
    assert left.first == [LR] * 4


def test_a_state_dict_taken_during_the_fit_loads_there() -> None:
    class Reloading(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            [optimizer] = trainer.optimizers
            state = optimizer.state_dict()
            assert state["param_groups"][0]["lr"] == LR
            optimizer.load_state_dict(state)

    for make in (adan, adamw):
        applied = Applied()
        Run(make, WarmupFreeSchedule("linear"), Reloading(), applied)
        assert applied.first == pytest.approx(rates("linear", "constant", 12, 12), rel=1e-12)


def test_a_second_fit_begins_anew() -> None:
    schedule, firsts = WarmupFreeSchedule("linear", "cosine"), []
    for _ in range(2):
        applied = Applied()
        Run(adan, schedule, applied)
        firsts.append(applied.first)
    assert firsts[0] == firsts[1]


def test_an_error_leaves_the_optimizer_as_it_was() -> None:
    class Failing(Toy):
        def training_step(self, batch: Any, index: int) -> Any:
            if index == 2:
                raise RuntimeError("stop here")
            return super().training_step(batch, index)

    module = Failing(adamw)
    found = trainer(WarmupFreeSchedule("linear"))
    with pytest.raises(RuntimeError, match="stop here"):
        found.fit(module, batches(), batches())
    [optimizer] = found.optimizers
    assert optimizer.param_groups[0]["lr"] == LR
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == LR


# ---------------------------------------------------------------- manual optimization


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    applied = Applied()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    Run(adan, WarmupFreeSchedule("linear"), applied, module=Manual(), logger=logger, log_every_n_steps=1)
    assert [x for [x] in applied.rates[0]] == pytest.approx([LR * warm("linear", t, 0.7) for t in range(1, 25)])
    second = [LR * 0.5 ** (t - 1) * warm("linear", t, 0.9) for t in range(1, 7)]
    assert [x for [x] in applied.rates[1]] == pytest.approx(second, rel=1e-12)
    found = logged(tmp_path)
    assert found["warmup_free_schedule/lr/0"] == {t: np.float32(applied.rates[0][2 * t][0]) for t in range(12)}
    assert found["warmup_free_schedule/factor/1"][11] == np.float32(warm("linear", 7, 0.9))


def test_manual_optimization_needs_a_length() -> None:
    class Simple(Toy):
        def __init__(self) -> None:
            super().__init__(adan)
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> Any:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    words = "in manual optimization the Trainer does not know how many steps.*Set total_steps"
    with pytest.raises(OptionError, match=words):
        Run(adan, WarmupFreeSchedule("none", "linear"), module=Simple())
    applied = Applied()
    Run(adan, WarmupFreeSchedule("none", "linear", total_steps=12), applied, module=Simple())
    assert applied.first == pytest.approx(rates("none", "linear", 12, 12), rel=1e-12)


# ---------------------------------------------------------------- whose beta2, and what is refused


@pytest.mark.parametrize(
    ("spec", "beta2"),
    [
        ({"name": "adam", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "adamw", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "adamax", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "adan", "betas": (0.8, 0.85, 0.95)}, 0.95),
        ({"name": "adapnm", "betas": (0.8, 0.95, 1.0)}, 0.95),
        ({"name": "adabelief", "betas": (0.8, 0.95), "rectify": False}, 0.95),
        ({"name": "acprop", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "diffgrad", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "padam", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "lamb", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "generalized_signsgd", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "rmsprop", "alpha": 0.95}, 0.95),
        ({"name": "scalar_rmsprop", "alpha": 0.95}, 0.95),
        ({"name": "moment_estimation_sgd", "beta": 0.95}, 0.95),
        ({"name": "nadam", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "ademamix", "betas": (0.8, 0.95, 0.99)}, 0.95),
        ({"name": "adopt", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "mars", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "prodigy", "betas": (0.8, 0.95)}, 0.95),
        ({"name": "schedule_free_adamw", "betas": (0.8, 0.95)}, 0.95),
        *((name, None) for name in ("sgd", "adagrad")),
        *((name, None) for name in ("sgdw", "pnm", "lion", "lars", "koala_v", "koala_m", "adafactor")),
    ],
)
def test_the_second_moment_of_our_optimizers(spec: Any, beta2: float | None) -> None:
    optimizer = create_optimizer(spec, [nn.Parameter(torch.ones(2))])
    assert second_moment.decay(optimizer, optimizer.param_groups[0]) == beta2
    if beta2 is None:
        words = f"warmup='linear' follows the decay of the second moment, and {type(optimizer).__name__} has none"
        module = Toy(lambda params: create_optimizer(spec, params))
        with pytest.raises(OptionError, match=words):
            Run(adan, WarmupFreeSchedule("linear"), module=module)
        assert module.losses == []


def test_three_betas_of_an_unknown_class_are_not_guessed_at() -> None:
    class Mine(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=LR)
            for group in self.param_groups:
                group["betas"] = (0.9, 0.8, 0.7)

    with pytest.raises(OptionError, match=r"Mine has none that is known. Set warmup='none', or beta2=..."):
        Run(Mine, WarmupFreeSchedule("linear"))
    applied = Applied()
    Run(Mine, WarmupFreeSchedule("linear", beta2=0.7), applied)
    assert applied.first == pytest.approx(rates("linear", "constant", 12, 12), rel=1e-12)


@pytest.mark.parametrize(
    ("spec", "warmup", "words"),
    [
        ("radam", "linear", "RAdam rectifies its steps itself.*Set warmup='none'"),
        ("adabelief", "rectified", "AdaBelief rectifies its steps itself"),
        ({"name": "adam", "amsgrad": True}, "rectified", "Adam divides by a maximum. Set warmup='linear' or 'exp"),
        ("adapnm", "rectified", "AdaPNM divides by a maximum"),
        ("adamax", "rectified", "AdaMax divides by a maximum"),
        ({"name": "adam", "betas": (0.5, 0.5)}, "rectified", "needs a beta2 above 0.6, and Adam has 0.5"),
    ],
)
def test_warmups_that_do_not_fit_the_optimizer(spec: Any, warmup: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Run(lambda params: create_optimizer(spec, params), WarmupFreeSchedule(warmup))
    Run(lambda params: create_optimizer(spec, params), WarmupFreeSchedule("none", "linear"), fast_dev_run=True)


def test_an_optimizer_without_a_learning_rate() -> None:
    def own_steps(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return create_optimizer({"name": "adafactor", "mode": "paper", "warmup_init": True}, params)

    def nothing(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = sgd(params)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    for make, words in (
        (own_steps, r"Adafactor .*group 0 \(lr=0.01, warmup_init=True"),
        (nothing, r"SGD .*group 0 \(lr=None"),
    ):
        module = Toy(make)
        with pytest.raises(OptionError, match=words):
            Run(make, WarmupFreeSchedule("none", "linear"), module=module)
        assert module.losses == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup": "rectify"}, "warmup='rectify' must be 'linear', 'exponential', 'rectified' or 'none'"),
        ({"decay": "exp"}, "decay='exp' must be 'constant', 'linear', 'cosine', 'inverse_sqrt' or 'flat_linear'"),
        ({"warmup": "none"}, "warmup='none' with decay='constant' does nothing"),
        ({"decay": "linear", "final": -0.1}, "final=-0.1 must be at least 0"),
        ({"final": 0.1}, "final=0.1 does nothing with decay='constant'"),
        ({"decay": "cosine", "decay_fraction": 0.2}, "decay_fraction=0.2 does nothing with decay='cosine'"),
        ({"decay": "flat_linear", "decay_fraction": 0.0}, r"decay_fraction=0.0 must be in \(0, 1\]"),
        ({"decay": "linear", "timescale": 5}, "timescale=5 does nothing with decay='linear'"),
        ({"decay": "inverse_sqrt", "timescale": 2.5}, "timescale=2.5 must be a number of steps, or a fraction"),
        ({"beta2": 1.0}, r"beta2=1.0 must be in \[0, 1\)"),
        ({"warmup": "none", "decay": "linear", "beta2": 0.9}, "beta2=0.9 does nothing with warmup='none'"),
        ({"total_steps": 5}, "total_steps=5 does nothing with decay='constant', which needs no length"),
        ({"decay": "linear", "total_steps": 0}, "total_steps=0 must be an integer of at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"WarmupFreeSchedule: {words}"):
        WarmupFreeSchedule(**options)


# ---------------------------------------------------------------- config and ranks


def test_from_a_config(tmp_path: Path) -> None:
    callback = {"warmup": "none", "decay": "inverse_sqrt", "timescale": 3, "final": 0.1}
    paths = {
        "lightning_optim.callbacks.WarmupFreeSchedule": callback,
        "tests.harness.rates.Note": {},
    }
    config = {
        "seed_everything": 0,
        "model": {"class_path": "tests.harness.modules.Configured"},
        "data": {"class_path": "tests.harness.data.Data"},
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)},
            "callbacks": [{"class_path": path, "init_args": options} for path, options in paths.items()],
        },
    }
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(config))
    Note.kept.clear()
    main(["fit", "--config", str(tmp_path / "in.yaml")])
    assert Note.kept == pytest.approx([1e-3 * math.sqrt(3 / (t + 3)) for t in range(4)], rel=1e-12)


def on_ranks(kind: str) -> tuple[list[float], list[float]]:
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    sampler: Any = DistributedSampler(samples(), ranks, rank, shuffle=False)
    loader: DataLoader[Any] = DataLoader(samples(), batch_size=4, sampler=sampler)
    applied = Applied()
    run = Run(adan, WarmupFreeSchedule("linear", "cosine"), applied, train=loader, strategy=kind, devices=ranks)
    return applied.first, vector(run.module).tolist()


def test_two_ranks() -> None:
    (first, ones), (second, others) = run_ranks(on_ranks, "ddp")
    assert first == second == pytest.approx(rates("linear", "cosine", 12, 12), rel=1e-12)
    assert ones == others


class SavesFirst(Callback):
    """Before the first step, when a strategy may take one of its own to have some state to save."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            trainer.save_checkpoint(f"{self.folder}/0.ckpt")


def sharded(kind: Any, folder: str, steps: int, ckpt_path: str | None = None) -> tuple[list[float], list[float]]:
    module, applied = Made(adan, seeded_net), Applied()
    fit = trainer(
        WarmupFreeSchedule("linear", "linear", total_steps=8),
        SavesFirst(folder),
        applied,
        strategy=strategy_of(kind),
        max_epochs=steps // 4,
    )
    fit.fit(module, DataLoader(seeded_samples(scale=1.0), batch_size=8), ckpt_path=ckpt_path)
    fit.save_checkpoint(f"{folder}/{steps}.ckpt")
    return applied.first, module.losses


@pytest.mark.parametrize("kind", ["fsdp1 full", "fsdp2 full"])
def test_sharded_and_resumed(kind: str, tmp_path: Path) -> None:
    """A strategy with flat parameters, and one that steps at rate 0 to have some state to save."""
    folder = str(tmp_path)
    whole, losses = run_ranks(sharded, kind, folder, 8)[0]
    assert whole == pytest.approx(rates("linear", "linear", 8, 8), rel=1e-12)
    run_ranks(sharded, kind, folder, 4)
    rest, after = run_ranks(sharded, kind, folder, 8, f"{folder}/4.ckpt")[0]
    assert rest == whole[4:]
    assert after == losses[4:]
