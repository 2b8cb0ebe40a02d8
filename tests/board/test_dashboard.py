"""What the dashboard logs: rates against the steps that they make, and hyper-parameters as TensorBoard reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_optim.callbacks import BatchSizeScaling, Dashboard, IterateAveraging, WarmupFreeSchedule
from lightning_optim.errors import OptionError
from tests.harness.data import batches
from tests.harness.modules import Configured, Toy, vector
from tests.harness.trainers import Walk, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is smaller than the logging interval", "ignore:.*callbacks used to create the checkpoint"
)


class Judged(Configured):
    """A configured module that logs, in the progress bar, a loss."""

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", self.loss(batch), prog_bar=True)
        self.log("val/other", 1.0)


def fit(folder: Path, spec: Any, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    logger = TensorBoardLogger(folder, "", "")
    run = trainer(*callbacks, **{"logger": logger, "log_every_n_steps": 1, "max_epochs": 2, **options})
    run.fit(Judged(spec), batches(), batches(batch_size=16), ckpt_path=ckpt_path)
    return run


def read(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], EventAccumulator]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def hparams(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The hyper-parameters of a run and its metrics, by TensorBoard's own reader."""
    data = read(folder)[1].summary_metadata
    start = metadata.parse_session_start_info_plugin_data(data[metadata.SESSION_START_INFO_TAG].plugin_data.content)
    plan = metadata.parse_experiment_plugin_data(data[metadata.EXPERIMENT_TAG].plugin_data.content)
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert set(values) == {info.name for info in plan.hparam_infos}
    return values, [info.name.tag for info in plan.metric_infos]


def test_rates_are_those_that_are_applied(tmp_path: Path) -> None:
    """Cosine, times a warm-up, times the factor of a larger batch: by formula, and by what a step of SGD does."""
    warmup = WarmupFreeSchedule(warmup="linear", beta2=0.5)
    spec = {"name": "sgd", "lr": 0.1, "schedule": "cosine", "momentum": 0.0}
    fit(tmp_path, spec, BatchSizeScaling(reference_batch=4), warmup, Dashboard(), walk := Walk())
    curves, _ = read(tmp_path)
    prefix = "learning_rate/cosine-BatchSizeScaling-WarmupFreeSchedule"
    assert {tag for tag in curves if tag.startswith("learning_rate/")} == {f"{prefix}/main", f"{prefix}/no_decay"}
    tag = f"{prefix}/main"
    factor = [2 * 0.5 * (1 + math.cos(math.pi * t / 8)) * min(1, (1 - 0.5) / 2 * (t + 1)) for t in range(8)]
    assert [value for _, value in curves[tag]] == pytest.approx([0.1 * f for f in factor], rel=1e-5)
    assert [step for step, _ in curves[tag]] == list(range(8)) == [step for step, _ in curves["train/loss"]]
    assert len(walk.weights) == 8


@pytest.mark.parametrize(("every", "steps"), [(1, list(range(8))), (3, [2, 5]), (0, [])])
def test_rates_are_logged_with_the_loss(every: int, steps: list[int], tmp_path: Path) -> None:
    fit(tmp_path, "adan", Dashboard(), log_every_n_steps=every)
    curves, _ = read(tmp_path)
    assert [step for step, _ in curves.get("learning_rate/constant/main", [])] == steps
    assert [step for step, _ in curves.get("train/loss", [])] == steps


def test_the_first_group_has_what_matters(tmp_path: Path) -> None:
    """By default what the progress bar shows; nothing of TensorBoard's own order can come before it."""
    fit(tmp_path, "adan", Dashboard(), IterateAveraging(start=0.5, evaluate_raw=True))
    curves, _ = read(tmp_path)
    assert sorted({tag.partition("/")[0] for tag in curves})[0] == "Overview"
    first = {tag.removeprefix("Overview/") for tag in curves if tag.startswith("Overview/")}
    assert first == {"train/loss", "val/loss", "lr/constant"}
    for name in ("train/loss", "val/loss"):
        assert curves[f"Overview/{name}"] == curves[name]
    assert curves["Overview/lr/constant"] == curves["learning_rate/constant/main"]
    assert "epoch" not in curves
    beside, _ = read(tmp_path / "raw")
    assert beside == {"Overview/val/loss": curves["val/loss_raw"]}


def test_settings_stand_beside_results(tmp_path: Path) -> None:
    spec = {"name": "adan", "lr": 0.02, "betas": [0.9, 0.8, 0.7], "schedule": {"name": "linear", "warmup_steps": 2}}
    fit(tmp_path / "given", spec, Dashboard(["val/loss", "test/accuracy"]))
    values, metrics = hparams(tmp_path / "given")
    assert values["optimizer"] == "adan"
    assert values["lr"] == 0.02
    assert values["betas"] == "[0.9, 0.8, 0.7]"
    assert values["schedule"] == "linear"
    assert values["schedule/warmup_steps"] == 2
    assert values["state_bits"] == 32
    assert metrics == ["val/loss", "test/accuracy"]
    fit(tmp_path / "found", "adan", Dashboard())
    values, metrics = hparams(tmp_path / "found")
    assert {"optimizer": "adan", "schedule": "constant", "lr": 1e-3}.items() <= values.items()
    assert metrics == ["train/loss", "val/loss", "val/other"]
    assert "hp_metric" not in read(tmp_path / "found")[0]


def test_a_run_that_resumes_says_the_same(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    spec = {"name": "adan", "schedule": "cosine"}
    fit(tmp_path / "whole", spec, Dashboard(), saving)
    fit(tmp_path / "rest", spec, Dashboard(), ckpt_path=tmp_path / "step=4.ckpt")
    assert hparams(tmp_path / "rest") == hparams(tmp_path / "whole")
    whole, rest = read(tmp_path / "whole")[0], read(tmp_path / "rest")[0]
    for tag in ("learning_rate/cosine/main", "Overview/val/loss"):
        assert rest[tag] == [pair for pair in whole[tag] if pair[0] >= 4]


class Several(Toy):
    """Two optimizers of torch by hand, one with a scheduler."""

    def __init__(self) -> None:
        super().__init__(lambda params: torch.optim.Adam(params))
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, second = (torch.optim.Adam(self.net[i].parameters()) for i in (0, 2))  # type: ignore[index]
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 1)]

    def training_step(self, batch: Any, index: int) -> Any:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


def test_several_optimizers_of_torch(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    module = Several()
    trainer(Dashboard(), logger=logger, log_every_n_steps=1).fit(module, batches(), batches())
    curves, _ = read(tmp_path)
    names = {tag for tag in curves if tag.startswith(("learning_rate", "Overview"))}
    assert names == {"learning_rate/0/StepLR", "learning_rate/1/constant", "Overview/lr/StepLR"}
    values, _ = hparams(tmp_path)
    assert values["optimizer"] == values["1/optimizer"] == "Adam"
    assert (values["schedule"], values["1/schedule"]) == ("StepLR", "constant")


def test_training_does_not_notice(tmp_path: Path) -> None:
    plain, told = (fit(tmp_path / str(len(c)), "adan", *c) for c in ([], [Dashboard()]))
    assert torch.equal(vector(plain.lightning_module), vector(told.lightning_module))
    logger = told.loggers[0]
    assert not {"log_metrics", "log_hyperparams"} & set(vars(logger))


@pytest.mark.parametrize("metrics", ["val/loss", 3, [1]])
def test_wrong_metrics_are_refused(metrics: Any) -> None:
    with pytest.raises(OptionError, match="a list of names of metrics"):
        Dashboard(metrics)
