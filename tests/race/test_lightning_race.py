"""Races on real Trainers: what candidates share, what a run finds, and what goes wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_optim
from lightning_optim import OptimizerStrategy, OptionError
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.race.candidates import read_candidates, spec_at
from tests.harness.data import samples
from tests.harness.nets import plain_net
from tests.harness.trainers import QUIET


class Regression(LightningModule):
    """Notes what it saw, and fails with an optimizer on demand."""

    seen: list[tuple[str, list[float]]]

    def __init__(self, poison: str = "", breaks: str = "") -> None:
        super().__init__()
        self.net, self.poison, self.breaks = plain_net(), poison, breaks

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        optimizer: Any = self.optimizers()
        name = type(optimizer.optimizer).__name__
        self.seen.append((name, batch[0][:, 0].tolist()))
        if name == "Lion":  # what the optimizer takes must not change the order of the next epoch
            torch.rand(3)
            random.random()
        if name == self.poison and self.global_step == 3:
            loss = loss * float("nan")
        if name == self.breaks:
            raise RuntimeError("shapes do not fit\nat all")
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))
        self.log("val/accuracy", (self.net(batch[0]).argmax(1) == batch[1].argmax(1)).float().mean())


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    return DataLoader(samples(), batch_size=8, shuffle=True), DataLoader(samples(16), batch_size=8)


def compare(*candidates: Any, module: Any = Regression, **options: Any) -> Any:
    Regression.seen = []
    short = {"epochs": None if "steps" in options else 2, "seeds": 2, "factors": [1.0], "extend": 0, "lr": 0.01}
    trainer = {**QUIET, "use_distributed_sampler": False, **options.pop("trainer", {})}
    trainer.pop("max_epochs", None)
    return lightning_optim.compare(candidates, module=module, data=loaders, trainer=trainer, **{**short, **options})


def test_all_see_the_same_batches_and_begin_with_the_same_weights() -> None:
    found = compare("adamw", "lion", "torch.optim.SGD")
    seen = Regression.seen[1:]  # behind the batch that is tried first
    by_name = {name: [batch for who, batch in seen if who == name] for name in ("AdamW", "Lion", "SGD")}
    assert len(by_name["AdamW"]) == 2 * 2 * 4
    assert by_name["AdamW"] == by_name["Lion"] == by_name["SGD"]
    assert by_name["AdamW"][:4] != by_name["AdamW"][4:8]  # epochs are shuffled differently,
    assert by_name["AdamW"][:8] != by_name["AdamW"][8:]  # and so are seeds
    starts = {(key[2], run.facts["start"]) for key, run in found.runs.items()}
    assert len(starts) == 2
    assert found.notes == []
    (note,) = compare("adamw", module=lambda: Whole(plain_net())).notes
    assert note.startswith("Candidates replace the optimizer that Whole configures")
    assert found.metric.name == "val/loss"


def test_a_run_finds_what_a_plain_loop_finds() -> None:
    found = compare("torch.optim.SGD", seeds=[5])
    (run,) = found.runs.values()
    batches = [batch for _, batch in Regression.seen[1:]]
    torch.manual_seed(5)
    net = plain_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=found.standings[0].best.lr)
    inputs, targets = samples().tensors
    losses = []
    for first in batches:
        index = [int((inputs[:, 0] == x).nonzero()) for x in first]
        loss = nn.functional.mse_loss(net(inputs[index]), targets[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert run.curves["training loss"] == (list(range(1, 9)), pytest.approx(losses, rel=1e-5))
    assert run.metrics["training loss"] == pytest.approx(losses[-1], rel=1e-5)
    x, y = samples(16).tensors
    with torch.no_grad():
        assert run.metrics["val/loss"] == pytest.approx(nn.functional.mse_loss(net(x), y).item(), rel=1e-5)
    assert run.curves["val/loss"][0] == [4, 8]
    assert (run.steps, run.state_bytes) == (8, 0)


def test_a_number_of_steps_ends_in_a_validation() -> None:
    found = compare("adamw", steps=6, metric="val/accuracy")
    run = found.runs["adamw", 0.01, 0]
    assert (run.steps, run.curves["val/loss"][0]) == (6, [4, 6])
    assert found.metric.mode == "max"
    parameters = sum(p.numel() for p in plain_net().parameters())
    assert run.state_bytes == 4 * (2 * parameters + 4)  # two moments, and a step counter for each of four tensors


def test_a_candidate_that_diverges_and_one_that_crashes() -> None:
    found = compare("adamw", "adan", "sgd", module=lambda: Regression(poison="Adan"))
    adamw, adan, sgd = found.standings
    assert adan.note == "the training loss is nan at step 4."
    assert "finished no run" in adan.verdict
    assert set(adamw.best.values) == set(sgd.best.values) == {0, 1}
    assert found.rows()[1][2] == "diverged"
    found = compare("adamw", "sgd", module=lambda: Regression(breaks="SGD"))
    assert found.standings[1].note == "RuntimeError: shapes do not fit."
    assert found.rows()[1][2] == "crashed"
    assert len(found.runs["sgd", found.standings[1].best.lr, 0].facts["traceback"].splitlines()) > 3


def test_callbacks_stay_and_checkpoints_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = [ModelCheckpoint(), LearningRateMonitor(), EarlyStopping("val/loss", patience=0, min_delta=1e9)]
    found = compare("adamw", epochs=5, trainer={"callbacks": callbacks, "enable_checkpointing": True})
    assert found.standings[0].note == "A callback stopped it after 8 steps."
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_raced_is_said_before_anything_runs() -> None:
    with pytest.raises(OptionError, match="trains on 2 devices with DDPStrategy"):
        compare("adamw", trainer={"devices": 2})
    with pytest.raises(OptionError, match="trainer=3 must be a mapping"):
        lightning_optim.compare(["adamw"], module=Regression, trainer=3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"the Trainer of the config cannot be made on this machine: .*max_epuchs"):
        compare("adamw", trainer={"max_epuchs": 1})
    with pytest.raises(OptionError, match=r"ByHand optimizes by itself \(automatic_optimization=False\)"):
        compare("adamw", module=ByHand)
    with pytest.raises(OptionError, match="does not say how long"):
        compare("adamw", epochs=None)
    with pytest.raises(OptionError, match=r"no metric 'val/acc'. Did you mean val/accuracy .* There are train/loss"):
        compare("adamw", metric="val/acc")
    with pytest.raises(OptionError, match=r"no candidate trains a batch. RuntimeError: broken"):
        compare("adamw", "sgd", module=Broken)
    with pytest.raises(OptionError, match=r"candidate 'adam2': There is no optimizer named 'adam2'. Did you mean adam"):
        compare("adamw", "adam2")
    with pytest.raises(OptionError, match=r"compare has no option 'epoch'. Did you mean epochs"):
        compare("adamw", epoch=3)
    with pytest.raises(OptionError, match="either config, a YAML file, or module"):
        lightning_optim.compare(["adamw"])


class ByHand(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        several: Any = self.optimizers()
        return nn.functional.mse_loss(self.net(batch[0]), batch[1]) * len(list(several))


class Broken(Regression):
    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        raise RuntimeError("broken")


def test_candidates_take_from_the_config_what_is_no_option_of_an_optimizer() -> None:
    config = OptimizerStrategy.parse(
        {
            "name": "adamw",
            "lr": 2e-3,
            "weight_decay": 0.1,
            "schedule": "cosine",
            "groups": [{"params": "bias", "lr": 4e-3}],
        }
    )
    given = ["adamw", "adan", {"name": "adamw", "lr": 1e-3, "schedule": "linear"}, "schedule_free_adamw", "prodigy"]
    same, adan, own, free, prodigy = read_candidates(given, config)
    assert spec_at(same, 2e-3) == config.config
    assert spec_at(same, 1e-3)["groups"] == [{"params": "bias", "lr": 2e-3}]
    assert (adan.lr, adan.spec["schedule"]) == (0.01, "cosine")
    assert spec_at(adan, 0.01)["groups"] == [{"params": "bias", "lr": pytest.approx(0.02)}]
    assert (own.name, own.lr) == ("adamw schedule=linear", 1e-3)
    assert "schedule" not in free.spec
    assert free.note == "It averages, and has no schedule."
    assert prodigy.lr == 1.0
    low, high = read_candidates([{"name": "adamw", "lr": 1e-3}, "{name: adamw, lr: 1e-2}"])
    assert (low.name, high.name) == ("adamw lr=0.001", "adamw lr=0.01")
    (mars,) = read_candidates(["mars"], lr=1e-3)
    assert [mars.lr, spec_at(mars, 6e-3)["lr_1d"]] == pytest.approx([3e-3, 2e-3])


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_learns_at_a_learning_rate_of_its_grid(name: str) -> None:
    """Around AdamW's 0.01: 60 steps on a small problem halve the loss, at the centre, beside it, or one beyond."""
    (candidate,) = read_candidates([name], lr=0.01)
    tried = []
    for factor in (1, 0.3, 3, 0.09):
        torch.manual_seed(0)
        module = Whole(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2)))
        strategy = OptimizerStrategy.parse({**spec_at(candidate, factor * candidate.lr), "engine": "reference"})
        module.strategy = strategy
        trainer = Trainer(**{**QUIET, "max_epochs": 60, "enable_checkpointing": False}, callbacks=strategy.callbacks())
        trainer.fit(module, DataLoader(samples(64), batch_size=64))
        tried.append(module.losses[-1] / module.losses[0])
        if tried[-1] < 0.5:
            return
    raise AssertionError(f"{name} around {candidate.lr}: {tried}")


class Whole(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.losses = net, list[float]()
        self.strategy = OptimizerStrategy("adamw")

    def configure_optimizers(self) -> Any:
        return self.strategy.configure(self)

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss
