"""Schedules in a Trainer: the rates that are applied, resumed runs, metrics, callbacks, and what has no length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import lr_scheduler

from lightning_optim import OptimizerStrategy, OptionError
from lightning_optim.callbacks import WarmupFreeSchedule
from lightning_optim.config.schedule import read
from lightning_optim.training.lengths import Timeline
from lightning_optim.training.shapes import SHAPES
from tests.harness.data import BATCHES, batches
from tests.harness.modules import Configured, vector
from tests.harness.ranks import run_ranks
from tests.harness.rates import Applied, Rest
from tests.harness.schedules import SPECS
from tests.harness.trainers import trainer

EPOCHS = 4
LOSSES = [1.0, 0.5, 0.6, 0.7, 0.4, 0.4, 0.4, 0.4]
LR = 0.5


class Scored(Configured):
    """Logs a loss that is known beforehand after each epoch."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", LOSSES[self.trainer.current_epoch])


def fit(
    schedule: Any, *callbacks: Callback, ckpt_path: Any = None, module: Any = None, done: int = 0, **options: Any
) -> Any:
    torch.manual_seed(0)
    applied = Applied()
    made = Scored({"name": "adamw", "lr": LR, "schedule": schedule}) if module is None else module
    found = trainer(applied, *callbacks, **{"max_epochs": EPOCHS, **options})
    loader: Any = Rest(done)
    validated = module is None or is_overridden("validation_step", module)
    found.fit(made, loader, batches(batch_size=32) if validated else None, ckpt_path=ckpt_path)
    return applied.first, made, found


def expected(schedule: Any, total: int, epoch: float) -> list[float]:
    shape = read(schedule)
    assert shape is not None
    timeline = Timeline(lambda: total, lambda epochs: epochs * epoch)
    return [LR * shape.at(step, timeline) for step in range(total)]


saved_by_another = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to")
every = pytest.mark.parametrize("name", [name for name in SHAPES if name != "plateau"])


@every
@pytest.mark.parametrize("warmup", [0.25, "1 epoch"])
def test_what_is_applied(name: str, warmup: Any) -> None:
    """With accumulated batches, and with a warm-up whose steps are not known before training starts."""
    schedule = {**SPECS[name], "warmup": warmup}
    rates, _, _ = fit(schedule, accumulate_grad_batches=2)
    assert rates == expected(schedule, 2 * EPOCHS, 2)
    rates, _, _ = fit(schedule, max_epochs=-1, max_steps=6)
    assert rates == expected(schedule, 6, BATCHES)


@saved_by_another
@pytest.mark.parametrize("name", SHAPES)
def test_a_resumed_run_repeats_its_bits(name: str, tmp_path: Path) -> None:
    options = {"momentum": [0.5, 0.9]} if name == "one_cycle" else {"patience": 0} if name == "plateau" else {}
    schedule = {**SPECS[name], **options, "warmup": 0.3}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1, save_on_train_epoch_end=False)
    rates, whole, _ = fit(schedule, saving)
    assert len({*rates}) > 3
    at_ends = (
        [] if name == "plateau" else [8]
    )  # Lightning goes on after the validation of that epoch, without its metric
    for done in (2, 6, 10, *at_ends):
        rest, module, _ = fit(schedule, ckpt_path=tmp_path / f"step={done}.ckpt", done=done)
        assert rest == rates[done:], done
        assert torch.equal(vector(module), vector(whole)), done


@saved_by_another
@pytest.mark.parametrize("options", [{}, {"save_on_train_epoch_end": True}])
@pytest.mark.parametrize("log", ["validation_step", "training_step", "on_train_epoch_end"])
def test_a_plateau_that_was_saved_at_the_end_of_an_epoch(log: str, options: dict[str, Any], tmp_path: Path) -> None:
    class Logs(Scored):
        def validation_step(self, batch: Any, index: int) -> None:
            if log == "validation_step":
                super().validation_step(batch, index)

        def training_step(self, batch: Any, index: int) -> Any:
            if log == "training_step":
                self.log("loss", LOSSES[self.trainer.current_epoch], on_step=False, on_epoch=True)
            return super().training_step(batch, index)

        def on_train_epoch_end(self) -> None:
            if log == "on_train_epoch_end":
                self.log("loss", LOSSES[self.trainer.current_epoch])

    def run(*callbacks: Callback, **options: Any) -> list[float]:
        torch.manual_seed(0)
        applied, schedule = Applied(), {**SPECS["plateau"], "patience": 0, "warmup": 5}
        module = Logs({"name": "adamw", "lr": LR, "schedule": schedule})
        trainer(applied, *callbacks, max_epochs=EPOCHS).fit(module, batches(), batches(batch_size=32), **options)
        return applied.first

    rates = run(ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **options))
    assert rates == pytest.approx(by_torch(5, patience=0)[: len(rates)])
    for done in (4, 8, 12) if log != "on_train_epoch_end" else ():
        assert run(ckpt_path=tmp_path / f"step={done}.ckpt") == rates[done:], done


def by_torch(warmup: int, **options: Any) -> list[float]:
    """The rates of torch's own scheduler for these losses, after a warm-up."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, found = lr_scheduler.ReduceLROnPlateau(optimizer, **options), []
    for loss in LOSSES:
        found += [optimizer.param_groups[0]["lr"]] * BATCHES
        scheduler.step(loss)
    return [rate * min(1.0, (step + 1) / max(warmup, 1)) for step, rate in enumerate(found)]


@pytest.mark.parametrize(
    ("options", "torchs"),
    [
        ({"patience": 0}, {"patience": 0}),
        ({"patience": 1, "factor": 0.5}, {"patience": 1, "factor": 0.5}),
        ({"patience": 0, "mode": "max"}, {"patience": 0, "mode": "max"}),
        ({"patience": 0, "cooldown": 2}, {"patience": 0, "cooldown": 2}),
        ({"patience": 0, "factor": 0.5, "final": 0.25}, {"patience": 0, "factor": 0.5, "min_lr": 0.25 * LR}),
        (
            {"patience": 0, "threshold": 0.3, "threshold_mode": "abs"},
            {"patience": 0, "threshold": 0.3, "threshold_mode": "abs"},
        ),
    ],
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_a_plateau_is_that_of_torch(options: dict[str, Any], torchs: dict[str, Any], warmup: int) -> None:
    rates, _, _ = fit({**SPECS["plateau"], **options, "warmup": warmup}, max_epochs=len(LOSSES))
    assert rates == pytest.approx(by_torch(warmup, **torchs), rel=1e-12)
    assert len({*rates}) > 1


def test_a_plateau_may_read_its_metric_after_steps() -> None:
    class Steps(Configured):
        def training_step(self, batch: Any, index: int) -> Any:
            self.log("loss", 1.0)
            return super().training_step(batch, index)

    schedule = {**SPECS["plateau"], "patience": 0, "factor": 0.5, "interval": "step", "frequency": 2}
    module = Steps({"name": "sgd", "lr": LR, "schedule": schedule})
    rates, _, _ = fit(schedule, module=module, max_epochs=2)
    assert rates == [LR * 0.5 ** max(step // 2 - 1, 0) for step in range(2 * BATCHES)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit_val_batches": 0}, r"monitors 'val/loss', and this fit has no validation: .*Add validation, or"),
        ({"check_val_every_n_epoch": 2}, r"and validation runs every 2 epochs .*Write frequency: 2 there"),
    ],
)
def test_a_plateau_whose_metric_will_not_be_there_is_told_before_a_step(options: Any, words: str) -> None:
    class Stops(Applied):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match=words), pytest.raises(SystemExit):
        fit({**SPECS["plateau"], "monitor": "val/loss"}, Stops(), **options)


def test_a_plateau_reads_a_metric_of_every_second_epoch() -> None:
    schedule = {**SPECS["plateau"], "patience": 0, "factor": 0.5, "frequency": 2}
    rates, _, _ = fit(schedule, max_epochs=8, check_val_every_n_epoch=2)
    epochs = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]  # losses 0.5, 0.7, 0.4 and 0.4
    assert rates == [LR * factor for factor in epochs for _ in range(BATCHES)]


@saved_by_another
def test_a_schedule_whose_place_is_unknown_is_refused(tmp_path: Path) -> None:
    fit(SPECS["plateau"], ModelCheckpoint(tmp_path, "plateau"), max_epochs=1)
    fit("cosine", ModelCheckpoint(tmp_path, "cosine"), max_epochs=1)
    for schedule, file in (("linear", "plateau.ckpt"), (SPECS["plateau"], "cosine.ckpt")):
        with pytest.raises(
            OptionError, match=r"has the state of another kind of schedule, and schedule '(linear|plat)"
        ):
            fit(schedule, ckpt_path=tmp_path / file)
    rates, _, _ = fit("step", ckpt_path=tmp_path / "cosine.ckpt")
    assert rates == pytest.approx([*expected("cosine", EPOCHS, 1)[1:2], *expected("step", EPOCHS * BATCHES, 4)[5:]], 1)


@pytest.mark.parametrize("name", ["step", "cosine", "plateau"])
def test_factors_of_callbacks_multiply(name: str) -> None:
    schedule = {**SPECS[name], "warmup": 0.25, **({"patience": 0} if name == "plateau" else {})}
    alone, _, _ = fit(schedule)
    rates, _, _ = fit(schedule, WarmupFreeSchedule("linear", beta2=0.8))
    warm = [min(1.0, 0.1 * (step + 1)) for step in range(len(alone))]
    assert rates == pytest.approx([rate * factor for rate, factor in zip(alone, warm, strict=True)])


def test_a_monitor_logs_the_first_rate_of_a_warm_up(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step")
    rates, _, found = fit({"name": "cosine", "warmup": 0.5}, monitor, logger=logger, log_every_n_steps=1)
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lr-AdamW/main")
    assert [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]] == rates
    assert found.lr_scheduler_configs[0].scheduler.title == "cosine after warm-up"
    assert not [one for one in found.callbacks if type(one).__name__ == "BeginSchedule"]


def test_epochs_whose_steps_differ() -> None:
    """A callback changes how many batches are accumulated: four steps, and then two in an epoch."""
    changing = GradientAccumulationScheduler({0: 1, 2: 2})
    rates, _, _ = fit({"name": "step", "every": "1 epoch", "gamma": 0.5}, changing)
    assert rates == [LR] * 4 + [LR / 2] * 4 + [LR / 4] * 2 + [LR / 8] * 2


class Endless(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(batches())


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        ({"name": "step", "every": "1 epoch"}, {"max_steps": 4}, "'step' counts in epochs, and an epoch .* no length"),
        ({"name": "cosine", "warmup": 0.5}, {"max_epochs": 2}, "'cosine' needs to know how long training is"),
        ({"name": "constant", "warmup": 0.5}, {"max_epochs": -1}, "'constant' needs to know how long training is"),
        ({"name": "multi_step", "milestones": [4, 0.5]}, {"max_epochs": -1}, "'multi_step' needs to know how long"),
        ("one_cycle", {"max_epochs": -1}, "'one_cycle' needs to know how long"),
    ],
)
def test_what_has_no_length(schedule: Any, options: dict[str, Any], words: str) -> None:
    module = Configured({"name": "adamw", "schedule": schedule})
    with pytest.raises(OptionError, match=words):
        trainer(**options).fit(module, torch.utils.data.DataLoader(Endless(), batch_size=None))
    module = Configured({"name": "adamw", "schedule": {"name": "step", "every": 3, "warmup": 2}})
    trainer(max_epochs=-1, max_steps=5).fit(module, torch.utils.data.DataLoader(Endless(), batch_size=None))


def test_momentum_without_momentum_is_refused() -> None:
    with pytest.raises(OptionError, match=r"momentum=\[0.85, 0.95\] cycles momentum or the first of betas, and KoalaV"):
        fit("", module=Configured({"name": "koala_v", "schedule": {"name": "one_cycle", "momentum": [0.85, 0.95]}}))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "constant"])
def test_beside_schedule_free_only_a_warm_up(name: str) -> None:
    with pytest.raises(OptionError, match=f"averages its iterates instead of a schedule, and schedule {name!r}"):
        OptimizerStrategy.parse({"name": "schedule_free_adamw", "schedule": SPECS[name]})
    with pytest.raises(OptionError, match=r"warmup_steps=5 and warmup=0.1 of the schedule would multiply"):
        OptimizerStrategy.parse(
            {"name": "schedule_free_sgd", "warmup_steps": 5, "schedule": {"name": "constant", "warmup": 0.1}}
        )


class Two(LightningModule):
    """Two optimizers, each with a schedule of its own, under manual optimization."""

    def __init__(self, specs: list[Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.specs, self.rates = specs, list[list[float]]()
        self.nets = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

    def configure_optimizers(self) -> Any:
        optimizers, schedulers = [], []
        for spec, net in zip(self.specs, self.nets, strict=True):
            strategy = OptimizerStrategy.parse(spec)
            optimizers.append(strategy.create(net))
            schedulers += strategy.schedulers(optimizers[-1], self.trainer)
        return optimizers, schedulers

    def training_step(self, batch: Any, index: int) -> None:
        optimizers: Any = self.optimizers()
        schedulers: Any = self.lr_schedulers()
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        for optimizer, scheduler, net in zip(optimizers, schedulers, self.nets, strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
            optimizer.step()
            scheduler.step()


def test_each_of_two_optimizers_has_its_own() -> None:
    first, second = {"name": "linear", "warmup": 0.25}, {"name": "step", "every": 3, "gamma": 0.5}
    module = Two([{"name": name, "lr": LR, "schedule": s} for name, s in (("adamw", first), ("sgd", second))])
    trainer(max_epochs=2).fit(module, batches())
    assert [list(rates) for rates in zip(*module.rates, strict=True)] == [
        expected(first, 2 * BATCHES, BATCHES),
        expected(second, 2 * BATCHES, BATCHES),
    ]


def rates_where_losses_differ() -> list[float]:
    """Under DDP with a loss that gets better on one rank and worse on the other, and better in the mean."""

    class Ranks(Configured):
        def validation_step(self, batch: Any, index: int) -> None:
            epoch = self.trainer.current_epoch
            self.log("loss", [-3.0, 1.0][self.global_rank] * [0, 2, 1, 3][epoch], sync_dist=False)

    schedule = {**SPECS["plateau"], "patience": 0, "factor": 0.5}
    module = Ranks({"name": "sgd", "lr": LR, "schedule": schedule})
    rates: list[float] = fit(schedule, module=module, strategy="ddp")[0]
    return rates


def test_all_ranks_change_their_rates_together() -> None:
    first, second = run_ranks(rates_where_losses_differ)
    assert first == second
    assert len({*first}) > 1
