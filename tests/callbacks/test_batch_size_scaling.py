"""The global batch and its factor against counts by hand; the factor is there once, whoever else is there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

import lightning_optim
from lightning_optim import OptionError, create_optimizer, list_optimizers
from lightning_optim.callbacks import BatchSizeScaling, WarmupFreeSchedule
from lightning_optim.cli import main
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.training.batch_scaling import rule_of
from tests.harness.data import BATCH, batches, samples, seeded_samples
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
    sgd,
    stored,
)
from tests.harness.strategies import strategy_of
from tests.harness.trainers import Run, trainer

SQRT, LINEAR = 2.0, 4.0  # of the toy's batch of 8 against one of 2


@pytest.mark.parametrize(
    ("make", "rule", "factor"),
    [
        (adan, "auto", SQRT),
        (adamw, "auto", SQRT),
        (sgd, "auto", LINEAR),
        (adan, "linear", LINEAR),
        (sgd, "sqrt", SQRT),
    ],
)
def test_training_is_the_plain_loop_at_this_rate(make: Make, rule: Any, factor: float) -> None:
    applied = Applied()
    run = Run(make, BatchSizeScaling(2, rule), applied, precision="64-true")
    assert applied.first == [LR * factor] * 12
    assert (vector(run.module) - plain_loop(make, [LR * factor] * 12)).abs().max() <= 1e-13  # sums in another order
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == LR  # as it was


@pytest.mark.parametrize(
    ("reference", "options", "factor"),
    [
        (8, {}, 1.0),
        (32, {}, 0.5),  # a smaller batch than the reference
        (2, {"accumulate_grad_batches": 2}, math.sqrt(8)),
        (2, {"accumulate_grad_batches": 4, "max_factor": 2.5}, 2.5),
        (2, {"batch_size": 50}, 5.0),
        (2, {"batch_size": 50, "accumulate_grad_batches": 4}, 10.0),
        (2, {"fast_dev_run": True}, 2.0),
    ],
)
def test_the_factor(reference: int, options: dict[str, Any], factor: float) -> None:
    mine = {key: options[key] for key in ("batch_size", "max_factor") if key in options}
    applied = Applied()
    rest = {key: value for key, value in options.items() if key not in mine}
    Run(adan, BatchSizeScaling(reference, **mine), applied, **rest)
    assert set(applied.first) == {LR * factor}


def test_the_worked_numbers() -> None:
    """A rate of 1e-3 found at 256, taken to 4096."""
    for rule, lr in (("linear", 0.016), ("sqrt", 0.004)):
        applied, callback = Applied(), BatchSizeScaling(256, rule, batch_size=4096)  # type: ignore[arg-type]
        Run(lambda params: torch.optim.Adam(params, lr=1e-3), callback, applied, fast_dev_run=True)
        assert applied.first == [pytest.approx(lr, rel=1e-15)]


@pytest.mark.parametrize("first", [True, False])
def test_accumulation_that_changes_between_epochs(first: bool, tmp_path: Path) -> None:
    both: list[Callback] = [BatchSizeScaling(2), GradientAccumulationScheduler({0: 1, 1: 4})]
    applied = Applied()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    Run(adan, *(both if first else both[::-1]), applied, logger=logger, log_every_n_steps=1)
    assert applied.first == [LR * 2] * 4 + [LR * 4] * 2
    assert logged(tmp_path)["batch_size_scaling/global_batch"] == {0: 8.0, 4: 32.0}


def test_what_is_printed_and_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    monitor, applied = LearningRateMonitor(), Applied()
    callbacks = [BatchSizeScaling(2), monitor, applied]
    Run(adamw, *callbacks, logger=logger, log_every_n_steps=1, accumulate_grad_batches=2)
    line = (
        "BatchSizeScaling: global batch 16 = 8 (loader) × 2 (accumulation) × 1 (ranks); learning rates of AdamW × "
        "2.82843 (sqrt rule, reference batch 2)\n"
    )
    assert capsys.readouterr().out == line
    found = logged(tmp_path)
    assert found["batch_size_scaling/global_batch"] == {0: 16.0}
    assert found["batch_size_scaling/factor"] == {0: np.float32(math.sqrt(8))}
    assert found["lr-AdamW"] == stored(applied.first)


# ---------------------------------------------------------------- once


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("make", [adan, sgd])
def test_a_schedulers_rates_are_multiplied_once(name: str, make: Make) -> None:
    factor = LINEAR if make is sgd else SQRT
    alone, scaled = Applied(), Applied()
    Run(make, alone, module=SCHEDULED[name](make))
    Run(make, BatchSizeScaling(2), scaled, module=SCHEDULED[name](make))
    assert scaled.first == [lr * factor for lr in alone.first]
    assert len(set(alone.first)) > 1


@pytest.mark.parametrize("name", [None, "lambda", "step", "one cycle"])
@pytest.mark.parametrize("reference", [2, 3])
def test_with_a_warmup_in_either_order(reference: int, name: str | None) -> None:
    found = []
    for first in (True, False):
        decay: Any = "constant" if name else "cosine"
        both: list[Callback] = [BatchSizeScaling(reference), WarmupFreeSchedule("linear", decay)]
        applied = Applied()
        module = Toy(adan) if name is None else SCHEDULED[name](adan)
        run = Run(adan, *(both if first else both[::-1]), applied, module=module)
        found.append((applied.first, vector(run.module).tolist()))
        if name is None:
            assert run.trainer.optimizers[0].param_groups[0]["lr"] == LR
    assert found[0] == found[1]
    warmed = Applied()
    module = Toy(adan) if name is None else SCHEDULED[name](adan)
    Run(adan, WarmupFreeSchedule("linear", decay), warmed, module=module)
    assert found[0][0] == pytest.approx([lr * math.sqrt(8 / reference) for lr in warmed.first], rel=1e-15)
    if name is None:
        assert warmed.first == pytest.approx(rates("linear", "cosine", 12, 12), rel=1e-12)


@pytest.mark.parametrize("step", [4, 5])  # the end of an epoch, and the middle of one
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("name", [None, "step", "cosine", "one cycle"])
def test_a_resumed_run_is_the_same_run(name: str | None, warmup: bool, step: int, tmp_path: Path) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Run, Applied]:
        applied = Applied()
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)
        module = Toy(adamw) if name is None else SCHEDULED[name](adamw)
        more = [WarmupFreeSchedule("linear")] if warmup else []
        train: Any = Rest(step)
        callbacks = [BatchSizeScaling(2, batch_size=7), *more, applied, saving]
        return Run(adamw, *callbacks, module=module, train=train, ckpt_path=ckpt_path), applied

    whole, before = run(tmp_path)
    rest, after = run(tmp_path / "again", tmp_path / f"step={step}.ckpt")
    assert after.first == before.first[step:]
    assert [w.tolist() for w in rest.walk.weights[-7:]] == [w.tolist() for w in whole.walk.weights[-7:]]


def test_a_run_that_resumes_with_another_batch(tmp_path: Path) -> None:
    """Of a chain of three runs with 8, 32 and again 8 samples, each has its own factor, once."""
    saving = {"dirpath": tmp_path, "filename": "{step}", "save_top_k": -1}
    firsts = []
    for run, parts in enumerate((1, 4, 1)):
        applied = Applied()
        path = None if run == 0 else max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        callbacks: list[Callback] = [BatchSizeScaling(2), applied, ModelCheckpoint(**saving)]  # type: ignore[arg-type]
        fit: dict[str, Any] = {"max_epochs": run + 1, "accumulate_grad_batches": parts, "ckpt_path": path}
        if run == 0:
            Run(adan, *callbacks, **fit)
        else:
            sizes = f"a global batch of {8 if run == 1 else 32}; now it is {32 if run == 1 else 8}"
            with pytest.warns(UserWarning, match=f"BatchSizeScaling: this run resumes one with {sizes}"):
                Run(adan, *callbacks, **fit)
        firsts.append(set(applied.first))
    assert firsts == [{LR * 2}, {LR * 4}, {LR * 2}]


def test_an_optimizer_that_outlives_a_fit() -> None:
    optimizers: list[torch.optim.Optimizer] = []

    def kept(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizers[:] = optimizers or [adamw(params)]
        return optimizers[0]

    module = Toy(kept)
    for _ in range(2):
        applied = Applied()
        Run(kept, BatchSizeScaling(2), applied, module=module, max_epochs=1)
        assert set(applied.first) == {LR * 2}


def test_whoever_else_changes_learning_rates_is_refused() -> None:
    with pytest.raises(OptionError, match=r"learning rates of AdamW are \[0.5\], and BatchSizeScaling had set \[0.1\]"):
        Run(adamw, BatchSizeScaling(2), Meddler())


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    applied = Applied()
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    Run(adan, BatchSizeScaling(2), applied, module=Manual(), logger=logger, log_every_n_steps=1)
    assert applied.rates[0] == [[LR * 2]] * 24
    assert applied.rates[1] == [[LR * 2 * 0.5**t] for t in range(6)]
    assert {tag for tag in logged(tmp_path) if "factor" in tag} == {f"batch_size_scaling/factor/{i}" for i in (0, 1)}


# ---------------------------------------------------------------- whose batch


class Stream(IterableDataset[Any]):
    """Samples one by one, or whole batches."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def __iter__(self) -> Iterator[Any]:
        return iter(list(batches()) if self.whole else samples())


class Loader:
    def __init__(self, **known: Any) -> None:
        self.__dict__.update(known)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        return iter(batches())


class Pair(Toy):
    def loss(self, batch: Any) -> Any:
        return super().loss(batch["a"]) + super().loss(batch["b"])


def test_loaders_that_say_their_batch_size() -> None:
    for loader in (DataLoader(Stream(False), batch_size=8), Loader(batch_size=8)):
        applied, callback = Applied(), BatchSizeScaling(2)
        Run(adan, callback, applied, train=loader, max_steps=4)  # type: ignore[arg-type]
        assert applied.first == [LR * 2] * 4
        assert callback.global_batch == 8


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        (lambda: DataLoader(samples(), batch_sampler=BatchSampler(RandomSampler(samples()), 8, False)), "DataLoader"),
        (lambda: DataLoader(Stream(True), batch_size=None), "DataLoader"),
        (lambda: Loader(), "Loader"),
        (lambda: Loader(batch_size="many"), "Loader"),
        (lambda: CombinedLoader({"a": batches(), "b": batches()}, "max_size"), "dict"),
    ],
)
def test_loaders_that_do_not(loader: Any, name: str) -> None:
    module = Pair(adan) if name == "dict" else Toy(adan)
    words = rf"the training loader \({name}\) does not say how many samples.*batch_sampler.*Set batch_size=\.\.\."
    with pytest.raises(OptionError, match=words):
        Run(adan, BatchSizeScaling(2), module=module, train=loader())
    assert module.losses == []
    applied = Applied()
    Run(adan, BatchSizeScaling(2, batch_size=18), applied, module=module, train=loader(), max_steps=4)
    assert applied.first == [LR * 3] * 4


# ---------------------------------------------------------------- which rule


LINEAR_ONES = {"schedule_free_sgd", "sgd", "sgdw", "pnm", "lars"}
UNKNOWN = {"padam", "koala_v", "koala_m", "prodigy"}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_rule_of_our_optimizers(name: str) -> None:
    assert set(list_optimizers()) > UNKNOWN | LINEAR_ONES
    optimizer = create_optimizer(name, [nn.Parameter(torch.ones(2))])
    expected = None if name in UNKNOWN else "linear" if name in LINEAR_ONES else "sqrt"
    assert rule_of(optimizer) == expected


def test_the_rule_of_torchs_optimizers() -> None:
    rules = {
        name: rule_of(cls([nn.Parameter(torch.ones(2, 2))], lr=0.1))  # type: ignore[call-arg]
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    assert {name for name, rule in rules.items() if rule == "linear"} == {"SGD", "ASGD"}
    assert {name for name, rule in rules.items() if rule is None} == {"LBFGS", "Rprop"}
    assert {"Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adafactor"} <= {n for n, r in rules.items() if r == "sqrt"}


class Foreign(torch.optim.Optimizer):
    """Gradient descent by somebody else."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": LR})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad
        return loss


class Mine(torch.optim.SGD):
    """Inherits its rule."""


def test_an_unknown_class_needs_a_rule() -> None:
    module = Toy(Foreign)
    words = "rule='auto' knows no rule for Foreign. Set rule='sqrt' if .*or rule='linear' if"
    with pytest.raises(OptionError, match=words):
        Run(Foreign, BatchSizeScaling(2), module=module)
    assert module.losses == []
    applied = Applied()
    Run(Foreign, BatchSizeScaling(2, "linear"), applied)
    assert set(applied.first) == {LR * 4}
    assert rule_of(Mine([nn.Parameter(torch.ones(1))], lr=0.1)) == "linear"
    assert rule_of(lightning_optim.SGDW([nn.Parameter(torch.ones(1))])) == "linear"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference_batch": 0}, "reference_batch=0 must be an integer of at least 1"),
        ({"reference_batch": 2.5}, "reference_batch=2.5 must be an integer of at least 1"),
        ({"reference_batch": 2, "rule": "cubic"}, "rule='cubic' must be 'sqrt', 'linear' or 'auto'"),
        ({"reference_batch": 2, "batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"reference_batch": 2, "max_factor": 0.0}, "max_factor=0.0 must be above 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"BatchSizeScaling: {words}"):
        BatchSizeScaling(**options)


# ---------------------------------------------------------------- config and ranks


def test_from_a_config(tmp_path: Path) -> None:
    callbacks: dict[str, Any] = {
        "lightning_optim.callbacks.BatchSizeScaling": {"reference_batch": 2, "rule": "linear"},
        "lightning_optim.callbacks.WarmupFreeSchedule": {"warmup": "none", "decay": "linear"},
        "tests.harness.rates.Note": {},
    }
    config = {
        "seed_everything": 0,
        "model": {"class_path": "tests.harness.modules.Configured"},
        "data": {"class_path": "tests.harness.data.Data"},
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False},
            **{"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path)},
            "callbacks": [{"class_path": path, "init_args": options} for path, options in callbacks.items()],
        },
    }
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(config))
    Note.kept.clear()
    main(["fit", "--config", str(tmp_path / "in.yaml")])
    assert Note.kept == pytest.approx([4e-3 * (1 - t / 4) for t in range(4)], rel=1e-12)


def on_ranks(kind: Any) -> tuple[list[float], int, str]:
    module, applied, scaling = Made(adan, seeded_net), Applied(), BatchSizeScaling(2)
    fit = trainer(
        scaling,
        WarmupFreeSchedule("none", "linear"),
        applied,
        strategy=strategy_of(kind),
        max_epochs=2,
        accumulate_grad_batches=2,
        use_distributed_sampler=True,
    )
    with redirect_stdout(StringIO()) as printed:
        fit.fit(module, DataLoader(seeded_samples(scale=1.0), batch_size=BATCH))
    return applied.first, scaling.global_batch, printed.getvalue()


@pytest.mark.parametrize("kind", ["ddp", "fsdp1 full", "fsdp2 full"])
def test_two_ranks(kind: str) -> None:
    """Of 32 samples, which are one step of 2 ranks with 2 batches of 8 each."""
    first, second = run_ranks(on_ranks, kind)
    assert first[:2] == second[:2] == ([LR * 4, LR * 4 * 0.5], 32)
    line = "BatchSizeScaling: global batch 32 = 8 (loader) × 2 (accumulation) × 2 (ranks); learning rates of Adan × 4 "
    assert first[2].startswith(line)
    assert "BatchSizeScaling" not in second[2]
