"""Schedule-Free in real Trainers: what is validated, tested, saved and resumed, against the averages by definition."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_optim import OptimizerStrategy, OptionError, ScheduleFreeAdamW, ScheduleFreeRAdam, ScheduleFreeSGD
from lightning_optim.callbacks import (
    Communication,
    EvaluationWeights,
    IterateAveraging,
    LookaheadSync,
    NonFiniteGuard,
    WarmupFreeSchedule,
)
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.reports.memory import state_memory
from tests.harness.data import batches, samples
from tests.harness.journeys import JOURNEYS, journey
from tests.harness.modules import Configured, Make, Pair, Toy, vector
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.strategies import strategy_of
from tests.harness.trainers import Run, Walk, trainer
from tests.harness.worlds import whole

ROUNDING = 1e-13  # of a division in float64


def adamw(params: list[nn.Parameter]) -> Optimizer:
    return ScheduleFreeAdamW(params, lr=0.02, warmup_steps=3)


def sgd(params: list[nn.Parameter]) -> Optimizer:
    return ScheduleFreeSGD(params, lr=0.5, weight_decay=0.01)


def radam(params: list[nn.Parameter]) -> Optimizer:
    return ScheduleFreeRAdam(params, lr=0.02, betas=(0.9, 0.9))


def eight(params: list[nn.Parameter]) -> Optimizer:
    return ScheduleFreeAdamW(params, lr=0.02, state_bits=8)


def averages(run: Run) -> list[Tensor]:
    """The average x after each step, by its definition from the points y and z that training had."""
    return [(y - 0.1 * z) / 0.9 for y, z in zip(run.walk.weights, run.walk.slots, strict=True)]


def weights_in(path: Path) -> Tensor:
    saved = torch.load(path, weights_only=True)
    return torch.cat([value.reshape(-1) for value in saved["state_dict"].values()])


def close(x: Tensor, y: Tensor, tolerance: float = ROUNDING) -> bool:
    return torch.allclose(x.double(), y.double(), rtol=0, atol=tolerance)


# ---------------------------------------------------------------- what is evaluated and saved


@pytest.mark.parametrize("make", [adamw, sgd, radam])
def test_everything_that_is_evaluated_and_saved_is_the_average(make: Make, tmp_path: Path) -> None:
    """Validation within and after epochs, whole checkpoints, weights alone, the model after the fit, its test."""
    saving = [
        ModelCheckpoint(tmp_path / "full", "{step}", save_top_k=-1, every_n_train_steps=3),
        ModelCheckpoint(tmp_path / "only", "{step}", save_top_k=-1, every_n_train_steps=1, save_weights_only=True),
        ModelCheckpoint(tmp_path / "epoch", "{step}", save_top_k=-1, every_n_epochs=1),
    ]
    options: dict[str, Any] = {"precision": "64-true", "val_check_interval": 2, "num_sanity_val_steps": 1}
    run = Run(make, EvaluationWeights(), *saving, watch="z", **options)
    with pytest.warns(UserWarning, match="without the callback EvaluationWeights, so what is validated and saved"):
        plain = Run(make, **options)
    assert all(map(torch.equal, run.walk.weights, plain.walk.weights))  # validations and saves leave no trace
    x = averages(run)
    torch.manual_seed(0)
    assert torch.equal(run.module.validated[0], vector(Toy(make).double()))  # the sanity check
    for i, seen in enumerate(run.module.validated[1:]):
        assert close(seen, x[2 * (i // 2) + 1])
    for folder, steps in (("full", [3, 6, 9, 12]), ("only", range(1, 13)), ("epoch", [4, 8, 12])):
        for step in steps:
            assert close(weights_in(tmp_path / folder / f"step={step}.ckpt"), x[step - 1]), (folder, step)
            if folder == "full":
                saved = torch.load(tmp_path / folder / f"step={step}.ckpt", weights_only=True)["optimizer_states"][0]
                assert not saved["param_groups"][0]["train_mode"]
                raw = torch.cat([state["raw"].reshape(-1) for state in saved["state"].values()])
                assert torch.equal(raw, run.walk.weights[step - 1])
    assert close(vector(run.module), x[-1])
    assert not any("raw" in state for state in plain.trainer.optimizers[0].state.values())
    run.trainer.test(run.module, batches(), verbose=False)
    assert torch.equal(run.module.tested[-1], vector(run.module))
    run.trainer.validate(run.module, batches(), verbose=False)
    assert torch.equal(run.module.validated[-1], vector(run.module))


def test_the_mixin_brings_the_callback_for_pages_that_evaluate_other_weights() -> None:
    """Nothing is asked of the user; the same model without validation ends with the same average."""
    ends = []
    for options in ({}, {"limit_val_batches": 0}):
        seed_everything(0, verbose=False)
        module = Configured({"name": "schedule_free_adamw", "lr": 0.02, "warmup_steps": 3})
        fitting: Any = trainer(precision="64-true", **options)
        fitting.fit(module, batches())
        assert [type(one).__name__ for one in fitting.callbacks if isinstance(one, EvaluationWeights)]
        assert not fitting.optimizers[0].is_training
        for p, state in fitting.optimizers[0].state.items():
            assert close(p, (state["raw"] - 0.1 * state["z"]) / 0.9)
        ends.append(vector(module))
    assert torch.equal(*ends)
    module = Configured("adamw")
    fitting = trainer()
    fitting.fit(module, batches())
    assert not any(isinstance(one, EvaluationWeights) for one in fitting.callbacks)


@pytest.mark.parametrize("kind", JOURNEYS)
def test_every_strategy_evaluates_saves_and_resumes_the_average(kind: str, tmp_path: Path) -> None:
    """To the rounding of float32 in a dozen steps; what resumes goes on bit for bit."""
    alone = journey("single", adamw, EvaluationWeights, tmp_path / "alone")
    both = run_ranks(journey, kind, adamw, EvaluationWeights, tmp_path / "whole")
    for full in both:
        for key in ("train", "val", "test"):
            assert full[key] == pytest.approx(alone[key], rel=1e-4), key
        assert sum(full["test"]) / 2 == pytest.approx(full["best"], rel=1e-6)
        assert len(set(full["val"])) == 6
    saved = tmp_path / "whole" / "step=4.ckpt"
    resumed = run_ranks(journey, kind, adamw, EvaluationWeights, tmp_path / "rest", False, saved)
    for full, rest in zip(both, resumed, strict=True):
        assert rest["train"] == full["train"][4:]
        assert rest["val"] == full["val"][2:]


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("kind", "other"), [("fsdp2 full", "single"), ("single", "fsdp2 sharded"), ("fsdp1 full", "fsdp2 full")]
)
def test_a_run_goes_on_under_another_strategy(kind: Any, other: Any, tmp_path: Path) -> None:
    ranks = {"single": 1}
    run_ranks(journey, kind, adamw, EvaluationWeights, tmp_path / "saved", world_size=ranks.get(kind, 2))
    alone = journey("single", adamw, EvaluationWeights, tmp_path / "alone")
    saved = tmp_path / "saved" / "step=4.ckpt"
    size = ranks.get(other, 2)
    for rest in run_ranks(journey, other, adamw, EvaluationWeights, tmp_path / "rest", False, saved, world_size=size):
        for key, skip in (("train", 4), ("val", 2)):
            assert rest[key] == pytest.approx(alone[key][skip:], rel=1e-4), key


def unaware() -> Callback:
    """In place of the callback, so that a checkpoint has the points of training."""
    warnings.simplefilter("ignore")
    return Callback()


def test_fsdp2_goes_on_from_a_checkpoint_of_training_mode(tmp_path: Path) -> None:
    """It asks every file for `raw`, which this one lacks."""
    with warnings.catch_warnings():
        before = journey("single", adamw, unaware, tmp_path / "saved")
    saved = tmp_path / "saved" / "step=4.ckpt"
    for rest in run_ranks(resumed_by, saved, tmp_path / "rest"):
        assert rest["train"] == pytest.approx(before["train"][4:], rel=1e-4)


def resumed_by(saved: Path, folder: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return journey("fsdp2 full", adamw, EvaluationWeights, folder, False, saved)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}])
@pytest.mark.parametrize("make", [adamw, sgd, radam, eight])
def test_a_resumed_run_is_the_same_run(make: Make, when: dict[str, Any], precision: Any, tmp_path: Path) -> None:
    """From a checkpoint before the validation of an epoch, and from one after it."""

    def saving(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, **when)

    full = Run(make, EvaluationWeights(), saving("whole"), watch="z", precision=precision)
    step, file = 4, tmp_path / "whole" / "step=4.ckpt"
    rest = Run(make, EvaluationWeights(), saving("rest"), watch="z", ckpt_path=file, precision=precision)
    assert len(rest.walk.weights) == 12 - step
    assert all(map(torch.equal, rest.walk.weights, full.walk.weights[step:]))
    assert all(map(torch.equal, rest.walk.slots, full.walk.slots[step:]))
    assert torch.equal(vector(rest.module), vector(full.module))
    assert torch.equal(rest.module.validated[-1], full.module.validated[-1])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_goes_on_from_a_checkpoint_that_knows_nothing_of_the_callback(tmp_path: Path) -> None:
    """It was saved at the points of gradients, and says so."""
    with pytest.warns(UserWarning, match="without the callback EvaluationWeights"):
        full = Run(adamw, ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_epochs=1))
    rest = Run(adamw, EvaluationWeights(), ckpt_path=tmp_path / "step=4.ckpt")
    assert all(map(torch.equal, rest.walk.weights, full.walk.weights[4:]))


def test_a_second_fit_begins_with_the_average_and_ends_with_one() -> None:
    run = Run(adamw, EvaluationWeights(), watch="z")
    first = vector(run.module)
    run.walk.weights.clear()
    run.trainer.fit_loop.max_epochs = 5
    run.trainer.fit(run.module, batches(), batches(batch_size=16))
    assert run.trainer.optimizers[0].state  # of a new optimizer
    assert float(next(iter(run.trainer.optimizers[0].state.values()))["step"]) == 8.0
    assert not torch.equal(vector(run.module), first)
    for p, state in run.trainer.optimizers[0].state.items():
        assert close(p, (state["raw"] - 0.1 * state["z"]) / 0.9, 1e-6)


class Kept(Toy):
    """Its optimizer is made once, for all fits."""

    optimizer: Optimizer | None = None

    def configure_optimizers(self) -> Any:
        self.optimizer = self.optimizer or adamw(list(self.parameters()))
        return self.optimizer


def test_a_second_fit_with_the_same_optimizer_goes_on_where_training_was() -> None:
    """And not from the average that the first fit has left in the model."""
    torch.manual_seed(0)
    module = Kept(adamw)
    for _ in range(2):
        fitting = trainer(EvaluationWeights(), max_epochs=1)
        fitting.fit(module, batches(), batches(batch_size=16))
        assert not fitting.optimizers[0].is_training  # type: ignore[attr-defined]
    run = Run(adamw, EvaluationWeights(), max_epochs=2)
    assert torch.equal(vector(module), vector(run.module))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2 full"])
def test_statistics_resume_too(kind: str, tmp_path: Path) -> None:
    """Those of the weights of training are in the callback's state while the model has the others."""
    both = run_ranks(journey, kind, adamw, EvaluationWeights, tmp_path / "whole", True)
    resumed = run_ranks(
        journey, kind, adamw, EvaluationWeights, tmp_path / "rest", True, tmp_path / "whole" / "step=4.ckpt"
    )
    for full, rest in zip(both, resumed, strict=True):
        assert rest["train"] == full["train"][4:]
        assert rest["val"] == full["val"][2:]


def local(kind: Any) -> None:
    callbacks = [EvaluationWeights(), Communication(kind, period=2, start=2)]
    trainer(*callbacks, strategy=strategy_of("ddp")).fit(Toy(adamw), batches(), batches())


def test_local_steps_of_ranks_are_refused() -> None:
    with pytest.raises(RankFailure, match="'post_local_sgd' averages the parameters of ranks alone"):
        run_ranks(local, "post_local_sgd")


# ---------------------------------------------------------------- exceptions


class Start(Callback):
    """Notes the weights with which training begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = vector(pl_module)


class Unlucky(Toy):
    """Raises in its fourth validation batch, or in its sixth training batch."""

    when = "validation"

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        super().validation_step(batch, index)
        if self.when == "validation" and len(self.validated) == 4:
            raise ArithmeticError("the metric is undefined")

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        if self.when == "training" and len(self.losses) == 5:
            raise ArithmeticError("the loss is undefined")
        return super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*resum.*", "ignore:.*no last checkpoint")
@pytest.mark.parametrize("when", ["validation", "training"])
def test_an_exception_leaves_the_average_and_a_checkpoint_that_goes_on(when: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, walk = Unlucky(adamw), Walk("z")
    module.when = when
    fitting = trainer(walk, EvaluationWeights(), OnExceptionCheckpoint(tmp_path, "last"), precision="64-true")
    with pytest.raises(ArithmeticError, match="undefined"):
        fitting.fit(module, batches(), batches(batch_size=16))
    x = (walk.weights[-1] - 0.1 * walk.slots[-1]) / 0.9
    assert close(vector(module), x)
    assert close(weights_in(tmp_path / "last.ckpt"), x)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "kept.ckpt")  # the next run removes it
    fitting.test(module, batches(), verbose=False)
    assert close(module.tested[-1], x)
    fitting.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("kept", "after"):
        start = Start()
        Run(adamw, EvaluationWeights(), start, ckpt_path=tmp_path / f"{name}.ckpt", precision="64-true")
        assert torch.equal(start.weights, walk.weights[-1])


# ---------------------------------------------------------------- steps that are none, and finders


@pytest.mark.parametrize("make", [adamw, sgd])
def test_accumulated_gradients_are_one_step(make: Make) -> None:
    run = Run(make, EvaluationWeights(), accumulate_grad_batches=2, precision="64-true", watch="z")
    steps = [float(state["step"]) for state in run.trainer.optimizers[0].state.values()]
    assert steps == [6.0] * len(steps)
    assert close(vector(run.module), averages(run)[-1])


class Infinite(Toy):
    """Its third loss is not finite."""

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * torch.inf if len(self.losses) == 3 else loss


@pytest.mark.filterwarnings("ignore:NonFiniteGuard skips", "ignore:.*GradScaler is enabled")
@pytest.mark.parametrize("by", ["guard", "scaler"])
def test_a_skipped_step_is_no_step(by: str) -> None:
    """The counter, the sum of weights and the largest rate stay, so the average does too."""
    plugin = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))] if by == "scaler" else []
    guards: list[Callback] = [NonFiniteGuard()] if by == "guard" else []
    torch.manual_seed(0)
    run = Run(sgd, EvaluationWeights(), *guards, module=Infinite(sgd), plugins=plugin, watch="z")
    for state in run.trainer.optimizers[0].state.values():
        assert float(state["step"]) == 11.0
        assert float(state["weight_sum"]) == pytest.approx(11 * 0.25)
        assert float(state["lr_max"]) == 0.5
    assert torch.equal(run.walk.weights[2], run.walk.weights[1])
    assert close(vector(run.module), averages(run)[-1], 1e-5)


@pytest.mark.filterwarnings("ignore:.*lr_find", "ignore:.*does not have many workers")
def test_a_finder_of_learning_rates_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    """It trains, saves and restores before the fit goes on from the first step."""
    finder = LearningRateFinder(num_training_steps=6, update_attr=False)
    plain = Run(adamw, EvaluationWeights(), precision="64-true")
    found = Run(
        adamw, EvaluationWeights(), finder, module=WithRate(adamw), precision="64-true", default_root_dir=tmp_path
    )
    assert torch.equal(vector(found.module), vector(plain.module))
    assert close(found.walk.weights[-1], plain.walk.weights[-1], 0)


class WithRate(Toy):
    def __init__(self, make: Make) -> None:
        torch.manual_seed(0)
        super().__init__(make)
        self.lr = 0.02


# ---------------------------------------------------------------- batch normalization


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


class Statistics(Toy):
    """Notes the running means that each validation batch sees, and the batches' mean under the weights of then."""

    def __init__(self, make: Make) -> None:
        torch.manual_seed(0)
        super().__init__(make, norm_net)
        self.inputs = samples().tensors[0].double()
        self.means: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        net: Any = self.net
        self.means.append((net[1].running_mean.clone(), net[0](self.inputs).mean(0)))


@pytest.mark.parametrize("choice", ["recompute", "keep"])
def test_statistics_of_the_average_are_recomputed(choice: Any) -> None:
    module = Statistics(adamw)
    run = Run(adamw, EvaluationWeights(choice), module=module, precision="64-true")
    assert len(module.means) == 6
    same = [close(mean, features, 1e-9) for mean, features in module.means]
    assert all(same) if choice == "recompute" else not any(same)
    plain = Run(adamw, EvaluationWeights("keep"), module=Statistics(adamw), precision="64-true")
    assert all(map(torch.equal, run.walk.weights, plain.walk.weights))


# ---------------------------------------------------------------- who brings it, and who is told


def test_several_optimizers_of_which_some_evaluate_other_weights() -> None:
    """In manual optimization, with steps in turn."""

    class Two(Pair):
        def configure_optimizers(self) -> Any:
            other = torch.optim.AdamW(self.other.parameters(), lr=0.02)
            return [adamw(list(self.net.parameters())), other]

    torch.manual_seed(0)
    module = Two(adamw)
    fitting: Any = trainer(EvaluationWeights(), precision="64-true")
    fitting.fit(module, batches(), batches(batch_size=16))
    ours, theirs = fitting.optimizers
    for p, state in ours.state.items():
        assert close(p, (state["raw"] - 0.1 * state["z"]) / 0.9)
    assert not any("raw" in state for state in theirs.state.values())


def test_users_may_change_modes_themselves(tmp_path: Path) -> None:
    """As the README of schedulefree has it, beside the callback or without it."""

    class ByHand(Toy):
        def on_train_epoch_start(self) -> None:
            self.optimizers().train()  # type: ignore[union-attr]

        def on_validation_start(self) -> None:
            self.optimizers().eval()  # type: ignore[union-attr]

        def on_validation_end(self) -> None:
            self.optimizers().train()  # type: ignore[union-attr]

    plain = Run(adamw, EvaluationWeights(), precision="64-true")
    torch.manual_seed(0)
    both = Run(adamw, EvaluationWeights(), module=ByHand(adamw), precision="64-true")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="or let the module call train"):
        alone = Run(adamw, module=ByHand(adamw), precision="64-true")
    for run in (both, alone):
        assert all(map(torch.equal, run.walk.weights, plain.walk.weights))
        assert all(map(torch.equal, run.module.validated, plain.module.validated))


def test_it_says_once_where_it_has_nothing_to_do() -> None:
    """And leaves the weights to whoever else chooses them."""

    def plain(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.02)

    with pytest.warns(UserWarning, match="EvaluationWeights has nothing to do") as caught:
        both = Run(plain, EvaluationWeights(), IterateAveraging("ema"))
    said = [str(one.message) for one in caught if "EvaluationWeights" in str(one.message)]
    assert said == ["EvaluationWeights has nothing to do: AdamW evaluates the weights of training."]
    alone = Run(plain, IterateAveraging("ema"))
    assert all(map(torch.equal, both.module.validated, alone.module.validated))
    assert torch.equal(vector(both.module), vector(alone.module))


def test_a_missing_callback_is_said_once() -> None:
    """By who makes the optimizer, and not by its first step again."""

    class Own(Toy):
        def configure_optimizers(self) -> Any:
            return OptimizerStrategy.parse("schedule_free_adamw").configure(self)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Run(adamw, module=Own(adamw))
    assert sum("EvaluationWeights" in str(one.message) for one in caught) == 1


@pytest.mark.parametrize("with_it", [True, False])
@pytest.mark.parametrize(
    "other", [IterateAveraging("ema"), LookaheadSync(), LookaheadSync(evaluate="slow")], ids=["ema", "fast", "slow"]
)
@pytest.mark.parametrize("first", [True, False])
def test_other_averages_are_refused(other: Callback, with_it: bool, first: bool) -> None:
    own: list[Callback] = [EvaluationWeights()] if with_it else []
    callbacks = [other, *own] if first else [*own, other]
    words = "ScheduleFreeAdamW averages its weights itself, .* Leave (IterateAveraging|LookaheadSync) out|both choose"
    with pytest.raises(OptionError, match=words):
        Run(adamw, *callbacks)


def test_swa_of_lightning_is_warned_of() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Run(adamw, EvaluationWeights(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1))
    said = [str(one.message) for one in caught]
    assert any(
        "EvaluationWeights and StochasticWeightAveraging both put other weights into the model" in x for x in said
    )


@pytest.mark.parametrize(
    ("make", "callback", "words"),
    [
        (adamw, WarmupFreeSchedule("none", "cosine"), "averages its iterates instead of a decay, which decay='cosine'"),
        (adamw, WarmupFreeSchedule("linear"), "warms up itself, with warmup_steps=3, and two warm-ups would multiply"),
        (radam, WarmupFreeSchedule("linear"), "rectifies its steps itself, and a second warm-up would delay it"),
    ],
)
def test_second_warmups_and_decays_are_refused(make: Make, callback: Callback, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Run(make, EvaluationWeights(), callback)


@pytest.mark.parametrize("falling", [True, False])
def test_a_schedule_that_falls_is_followed_and_said_once(falling: bool) -> None:
    class Scheduled(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = ScheduleFreeSGD(self.parameters(), lr=0.5)
            factor = (lambda t: 0.8**t) if falling else (lambda t: min(1.0, (1 + t) / 4))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run(sgd, EvaluationWeights(), module=Scheduled(sgd))
    said = [
        str(one.message) for one in caught if "brings the learning rate of ScheduleFreeSGD down" in str(one.message)
    ]
    assert len(said) == int(falling)
    assert all(float(state["lr_max"]) == 0.5 for state in run.trainer.optimizers[0].state.values())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"schedule": "cosine"}, "averages its iterates instead of a schedule, and schedule 'cosine' would undo that"),
        ({"schedule": {"name": "linear", "final": 1.0}}, "schedule 'linear' would undo that. Leave schedule out"),
        (
            {"schedule": {"name": "constant", "warmup_steps": 5}, "warmup_steps": 3},
            "warmup_steps=3 and warmup_steps=5 of the schedule would multiply. Keep one of the two",
        ),
        (
            {"schedule": {"name": "constant", "warmup_steps": 5}, "groups": [{"params": "bias", "warmup_steps": 2}]},
            "warmup_steps=2 of group 'bias' and warmup_steps=5 of the schedule would multiply",
        ),
    ],
)
def test_schedules_of_a_config(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        OptimizerStrategy(name="schedule_free_adamw", **spec)


@pytest.mark.parametrize("schedule", [None, "constant", {"name": "constant", "warmup_steps": 5}])
def test_constant_schedules_are_served(schedule: Any) -> None:
    fitting = trainer()
    fitting.fit(Configured({"name": "schedule_free_radam", "schedule": schedule}), batches())


def test_memory_lists_the_weights_of_training_as_temporary() -> None:
    run = Run(adamw, EvaluationWeights())
    kinds = {entry.slot: entry.kind for entry in state_memory(run.trainer.optimizers[0])}
    assert kinds["raw"] == "temporary"
    assert kinds["z"] == "state"


class Points(Callback):
    """The whole points y after the last step, and the averages x that are left in the model."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.y = whole(self.model(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.x = whole(self.model(trainer))

    def model(self, trainer: Trainer) -> nn.Module:
        model = trainer.strategy.model
        assert model is not None
        return model


class Odd(Toy):
    """Seven rows and one, which two ranks cannot share evenly, or of which one has none."""

    def __init__(self, make: Make) -> None:
        super().__init__(make, lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1), nn.Linear(1, 2)))

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        """Its weights cannot be put in one row under FSDP2."""


def both_points(kind: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    points = Points()
    trainer(EvaluationWeights(), points, strategy=strategy_of(kind), max_epochs=2).fit(Odd(adamw), batches(), batches())
    return {f"{which}.{n}": value for which in "xy" for n, value in getattr(points, which).items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp1 full", "fsdp2 full"])
def test_points_and_averages_are_the_same_under_every_strategy(kind: str) -> None:
    alone = both_points("single")
    for found in run_ranks(both_points, kind):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
