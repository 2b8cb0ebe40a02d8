"""The weights of training evaluated beside their average, against an evaluation of both by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from torchmetrics import MeanMetric

from lightning_optim.callbacks import IterateAveraging
from tests.harness.data import batches
from tests.harness.modules import Toy, vector
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import Walk, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*callbacks used to create the checkpoint", "ignore:.*your dataloader is not resumable"
)


class Notes(DummyLogger):
    """Keeps what is logged: the step and the value, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[tuple[int | None, float]]] = defaultdict(list)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.found[name].append((step, value))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return super().__getattr__(name)


class Scored(Toy):
    """Logs a loss, a metric, and a value that it computes at the end from what its steps have left."""

    def __init__(self, make: Any, net: Any = None) -> None:
        super().__init__(make, *([net] if net else []))
        self.mean = MeanMetric()
        self.left: list[Tensor] = []

    def score(self, batch: Sequence[Tensor], prefix: str) -> None:
        loss = self.loss(batch)
        self.left.append(loss.detach() + torch.rand(()))
        self.mean(loss)
        self.log(f"{prefix}/loss", loss, batch_size=len(batch[0]), sync_dist=True)
        self.log(f"{prefix}/mean", self.mean)

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        super().validation_step(batch, index)
        self.score(batch, "val")

    def test_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self.log("val/steps", float(len(self.left)))
        self.left.clear()


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.02)


def by_hand(module: Scored, weights: Tensor) -> float:
    """The loss of these weights on all samples."""
    before = vector(module)
    vector_to_parameters(weights, module.parameters())
    with torch.no_grad():
        losses = [module.loss(batch).item() for batch in batches(batch_size=16)]
    vector_to_parameters(before, module.parameters())
    return sum(losses) / len(losses)


def fit(*callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> tuple[Any, Scored, Notes]:
    torch.manual_seed(0)
    module, logger = Scored(adam), Notes()
    run = trainer(*callbacks, **{"logger": logger, "max_epochs": 4, "log_every_n_steps": 1, **options})
    run.fit(module, batches(), batches(batch_size=16), ckpt_path=ckpt_path)
    return run, module, logger


def test_both_are_what_an_evaluation_by_hand_says() -> None:
    """Before the average begins both are the same; the test after the fit compares them too."""
    walk, averaging = Walk(), IterateAveraging(start=0.5, evaluate_raw=True)
    run, module, logger = fit(walk, averaging)
    ends = [walk.weights[4 * epoch + 3] for epoch in range(4)]
    raw = [value for _, value in logger.found["val/loss_raw"]]
    assert raw == pytest.approx([by_hand(module, weights) for weights in ends], rel=1e-5)
    assert [step for step, _ in logger.found["val/loss_raw"]] == [step for step, _ in logger.found["val/loss"]]
    assert logger.found["val/mean_raw"][-1][1] == pytest.approx(raw[-1], rel=1e-5)
    assert {value for name in ("val/steps", "val/steps_raw") for _, value in logger.found[name]} == {2.0}
    collected = [ends[i] for i in range(4) if 4 * (i + 1) / 16 >= 0.5]
    averages = [ends[0], *(torch.stack(collected[: i + 1]).mean(0) for i in range(len(collected)))]
    assert [value for _, value in logger.found["val/loss"]] == pytest.approx(
        [by_hand(module, weights) for weights in averages], rel=1e-5
    )
    average = vector(module)
    tested = run.test(module, batches(batch_size=16), verbose=False)
    assert torch.equal(vector(module), average)
    assert tested[0]["test/loss"] == pytest.approx(by_hand(module, average), rel=1e-5)
    assert logger.found["test/loss_raw"][-1][1] == pytest.approx(by_hand(module, ends[-1]), rel=1e-5)
    assert averaging.raw_metrics["test/loss"] == logger.found["test/loss_raw"][-1][1]
    assert "test/loss_raw" not in tested[0]


def test_nothing_else_changes(tmp_path: Path) -> None:
    """Weights, metrics of the average, generators, checkpoints and where a run resumes are as without it."""
    found = []
    for raw in (False, True):
        saving = ModelCheckpoint(tmp_path / str(raw), "{step}", monitor="val/loss", save_top_k=-1)
        averaging = IterateAveraging("ema", decay=0.5, evaluate_raw=raw)
        options: dict[str, Any] = {"num_sanity_val_steps": 1, "val_check_interval": 2, "max_epochs": 2}
        run, module, logger = fit(averaging, saving, **options)
        weights, drawn = vector(module), torch.rand(())
        saved = sorted(path.name for path in (tmp_path / str(raw)).iterdir())
        progress = torch.load(tmp_path / str(raw) / saved[-1], weights_only=True)["loops"]
        metrics = {name: values for name, values in logger.found.items() if not name.endswith("_raw")}
        begun = tmp_path / str(raw) / "step=4.ckpt"
        resumed = fit(IterateAveraging("ema", decay=0.5, evaluate_raw=raw), ckpt_path=begun, **options)
        found.append((weights, drawn, saved, progress, metrics, run.callback_metrics, len(module.validated)))
        assert torch.equal(vector(resumed[1]), weights)
        for name in ("val/loss", "val/mean", *(("val/loss_raw", "val/steps_raw") if raw else ())):
            assert resumed[2].found[name] == logger.found[name][2:], name
    without, with_raw = found
    assert torch.equal(without[0], with_raw[0])
    assert without[1:] == with_raw[1:]


def test_weights_that_are_not_of_the_fit_are_not_called_raw(tmp_path: Path) -> None:
    """A test of a file, and of another module."""
    saving = ModelCheckpoint(tmp_path, "last")
    run, _, logger = fit(saving, IterateAveraging(start=0, evaluate_raw=True))
    run.test(ckpt_path=tmp_path / "last.ckpt", dataloaders=batches(), verbose=False)
    run.test(Scored(adam), batches(), verbose=False)
    assert len(logger.found["test/loss"]) == 2
    assert "test/loss_raw" not in logger.found


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def test_statistics_are_those_of_the_weights() -> None:
    """Of batch normalizations: the same fit without an average has the same metrics as the raw weights."""
    found = []
    for callbacks in ([IterateAveraging(start=0, evaluate_raw=True)], []):
        torch.manual_seed(0)
        module, logger = Scored(adam, normed), Notes()
        run = trainer(*callbacks, logger=logger, log_every_n_steps=1)
        run.fit(module, batches(), batches(batch_size=16))
        run.test(module, batches(batch_size=16), verbose=False)
        suffix = "_raw" if callbacks else ""
        found.append([logger.found[f"{name}/loss{suffix}"] for name in ("val", "test")])
    assert found[0] == found[1]
    assert len(found[0][0]) == 3


def on_two(kind: Kind) -> tuple[dict[str, list[tuple[int | None, float]]], float]:
    averaging = IterateAveraging(start=0, evaluate_raw=True)
    run, module, logger = fit(averaging, strategy=strategy_of(kind))
    run.test(module, batches(batch_size=16), verbose=False)
    return dict(logger.found), averaging.raw_metrics["test/loss"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2 full", pytest.param("fsdp1 full", marks=pytest.mark.full)])
def test_two_processes_say_the_same(kind: Kind) -> None:
    (first, tested), (second, again) = run_ranks(on_two, kind)
    assert first == second
    assert tested == again == first["test/loss_raw"][-1][1]
    alone = fit(IterateAveraging(start=0, evaluate_raw=True))[2].found
    assert [value for _, value in first["val/loss_raw"]] == pytest.approx(
        [value for _, value in alone["val/loss_raw"]], rel=1e-3
    )


def test_a_loader_that_gives_its_batches_once_is_told() -> None:
    module = Scored(adam)
    averaging = IterateAveraging("ema", evaluate_raw=True)
    with pytest.warns(UserWarning, match=r"evaluate_raw=True\): the loader of validation gives its batches once"):
        trainer(averaging, max_epochs=1).fit(module, batches(), iter(list(batches(batch_size=16))))
