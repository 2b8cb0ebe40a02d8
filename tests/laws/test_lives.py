"""What must hold for every callback of the package, whatever happens to the fit that it takes part in.

A fit ends as it would without the finder, the exception or the earlier fit, and nothing of it outlives it. A callback
falls under these laws by being in `lightning_optim.callbacks.__all__`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

import lightning_optim.callbacks
from lightning_optim.core.optimizer import Optimizer
from tests.harness.data import samples
from tests.harness.lives import Make, Module, every_callback, fit
from tests.harness.modules import vector
from tests.harness.trainers import trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is smaller than the logging interval",
    "ignore:.*does not have many workers",
    "ignore:.*your dataloader is not resumable",
    "ignore:.*callbacks used to create the checkpoint",
)


class Repeats(Module):
    """All batches are alike, since a loader starts again when a run resumes in the middle of an epoch."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(ConcatDataset([samples(8)] * 4), batch_size=8)


class Fails(Callback):
    """The last callback refuses the fit when it begins."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        raise ArithmeticError("refused")


@functools.cache
def usual(make: Make, optimizer: Any, epochs: int = 2) -> Module:
    """The module after a fit without anything unusual, with a fresh callback."""
    return fit(optimizer, make(), max_epochs=epochs)[1]


def same(one: Module, other: Module, last: int | None = None) -> bool:
    """Whether two modules trained, were validated and ended with the same weights, bit for bit."""
    pairs = [*zip(one.trained[-(last or 0) :], other.trained[-(last or 0) :], strict=True)]
    if last is None:
        pairs += zip(one.validated, other.validated, strict=True)
    buffers = zip(one.buffers(), other.buffers(), strict=True)
    return all(torch.equal(a, b) for a, b in (*pairs, (vector(one), vector(other)), *buffers))


def marks(fitting: Trainer, module: Module) -> dict[str, Any]:
    """What a callback might leave on the objects of a fit."""
    connector: Any = vars(fitting)["_checkpoint_connector"]
    loops: list[Any] = [fitting.fit_loop, fitting.fit_loop.epoch_loop, fitting.validate_loop, fitting.test_loop]
    found: dict[str, Any] = {"module": set(vars(module)), "training": [part.training for part in module.modules()]}
    for owner in (fitting, fitting.strategy, connector, *loops):
        found[type(owner).__name__] = {k for k, v in vars(owner).items() if v is not None}
    for part in module.modules():
        found.setdefault("hooks", []).append(sum(len(v) for k, v in vars(part).items() if k.endswith("hooks")))
    found["requires_grad"] = [p.requires_grad for p in module.parameters()]
    for optimizer in fitting.optimizers:
        names = {name for name in vars(optimizer) if name not in ("_parameters", "model_order", "_lent", "_most_dims")}
        counts = {name: len(value) for name, value in vars(optimizer).items() if name.endswith("hooks")}
        found["optimizer"] = (names, counts, len(getattr(optimizer, "stages", [])), optimizer.param_groups[0]["lr"])
        found["schedulers"] = [type(config.scheduler).__name__ for config in fitting.lr_scheduler_configs]
    return found


ENDS: dict[str, tuple[str, type[BaseException]] | None] = {
    "whole": None,
    "training": ("training_step", ArithmeticError),
    "validation": ("validation_step", ArithmeticError),
    "epoch": ("on_train_epoch_end", ArithmeticError),
    "interrupt": ("training_step", KeyboardInterrupt),
    "signal": ("validation_step", SIGTERMException),
    "start": ("on_fit_start", ArithmeticError),
    "teardown": ("teardown", ArithmeticError),
}


def end(optimizer: Any, how: str, *callbacks: Callback) -> tuple[Trainer, Module]:
    """A fit that ends in one of these ways."""
    fails = ENDS[how]
    module = Module(optimizer, fails)
    fitting = trainer(*callbacks, *([Fails()] if how == "start" else []), max_epochs=2)
    if fails is None:
        fitting.fit(module)
    else:
        ending: Any = SystemExit if fails[1] is KeyboardInterrupt else fails[1]
        with pytest.raises(ending):
            fitting.fit(module)
    return fitting, module


@contextlib.contextmanager
def lacking() -> Iterator[None]:
    """A fit without any callback of ours, which a Schedule-Free optimizer misses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*runs in a Trainer without the callback EvaluationWeights")
        yield


@functools.cache
def usual_marks(optimizer: Any, how: str) -> dict[str, Any]:
    """Those of a fit that ends in this way without any callback of ours."""
    with lacking():
        return marks(*end(optimizer, how))


FULL = ("training", "epoch", "signal")


@every_callback
@pytest.mark.parametrize("how", [pytest.param(how, marks=[pytest.mark.full] if how in FULL else []) for how in ENDS])
def test_nothing_of_a_fit_outlives_it(make: Make, optimizer: Any, how: str) -> None:
    """However it ended: no trace on any object, nothing alive but the callback, and the next fit is as the first."""
    callback = make()
    fitting, module = end(optimizer, how, callback)
    assert marks(fitting, module) == usual_marks(optimizer, how)
    watched = [weakref.ref(thing) for thing in (fitting, module, *module.parameters(), *fitting.optimizers)]
    del fitting, module
    gc.collect()
    assert not [thing() for thing in watched if thing() is not None]
    assert same(fit(optimizer, callback)[1], usual(make, optimizer))


@every_callback
@pytest.mark.parametrize("how", ["validation", "epoch"])
def test_an_exception_leaves_the_weights_of_training(make: Make, optimizer: Any, how: str) -> None:
    """In the model, or where the optimizer keeps them while it is in evaluation mode."""
    fitting, failed = end(optimizer, how, make())
    for made in fitting.optimizers:
        if isinstance(made, Optimizer):
            made.train()
    assert torch.equal(vector(failed), usual(make, optimizer, 3).trained[len(failed.trained)])


class Finds(Callback):
    """Runs a finder at the start of the second epoch. It loads a checkpoint of the moment before when it is done."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch != 1:
            return
        before, noted = vector(pl_module), (list(pl_module.trained), list(pl_module.validated))
        if self.what == "lr":
            LearningRateFinder(num_training_steps=3, update_attr=False).lr_find(trainer, pl_module)
        else:
            BatchSizeFinder(init_val=8, max_trials=1, steps_per_trial=2).scale_batch_size(trainer, pl_module)
        pl_module.trained, pl_module.validated = noted
        assert torch.equal(vector(pl_module), before)


@every_callback
@pytest.mark.parametrize("finds", ["lr", "batch size"])
def test_a_finder_in_the_middle_of_a_fit(make: Make, optimizer: Any, finds: str, tmp_path: Path) -> None:
    """Every batch has the weights that it has without the finder. (After one for batch sizes it ends.)"""
    callbacks = [Finds(finds), make()] if finds == "lr" else [make(), Finds(finds)]
    found, whole = fit(optimizer, *callbacks, default_root_dir=tmp_path, max_epochs=3)[1], usual(make, optimizer, 3)
    assert finds != "lr" or same(found, whole)


@every_callback
def test_finders_before_a_fit(make: Make, optimizer: Any, tmp_path: Path) -> None:
    """Both of the tuner and then, once more, a finder among the callbacks: the fit is as without them."""
    module = Module(optimizer)
    fitting = trainer(make(), max_epochs=2, num_sanity_val_steps=1, default_root_dir=tmp_path)
    Tuner(fitting).lr_find(module, num_training=3, update_attr=False)
    Tuner(fitting).scale_batch_size(module, init_val=8, max_trials=1)
    module.trained.clear()
    module.validated.clear()
    fitting.fit(module)
    assert same(module, usual(make, optimizer))


@every_callback
@pytest.mark.parametrize("first", [True, False])
def test_a_finder_among_the_callbacks(make: Make, optimizer: Any, first: bool, tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=3, update_attr=False)
    callbacks = [finder, make()] if first else [make(), finder]
    found, whole = fit(optimizer, *callbacks, default_root_dir=tmp_path)[1], usual(make, optimizer)
    found.trained = found.trained[-len(whole.trained) :]
    found.validated = found.validated[-len(whole.validated) :]
    assert same(found, whole)


@every_callback
def test_a_run_resumes_where_it_stopped(make: Make, optimizer: Any, tmp_path: Path) -> None:
    """At the end of an epoch, in the middle of one, and when it is finished; with one callback object for all fits."""
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    callback = make()
    _, whole = fit(optimizer, callback, saving, kind=Repeats)
    for step in (4, 6, 8):
        fitting, rest = fit(optimizer, callback, kind=Repeats, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(vector(rest), vector(whole)), step
        assert all(map(torch.equal, rest.buffers(), whole.buffers())), step
        assert all(map(torch.equal, rest.trained, whole.trained[step:])), step
        fitting.save_checkpoint(tmp_path / "again.ckpt")
        saved = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
        assert all(map(torch.equal, saved.values(), whole.state_dict().values())), step


@every_callback
def test_evaluation_alone_changes_nothing(make: Make, optimizer: Any) -> None:
    """Before a fit, and after it, when what is tested is what was left in the model."""
    callback, module = make(), Module(optimizer)
    fitting = trainer(callback, max_epochs=1)
    for again in (False, True):
        weights, found = vector(module), marks(fitting, module)
        fitting.validate(module, verbose=False)
        fitting.test(module, verbose=False)
        predicted: Any = fitting.predict(module)
        seen = [*module.validated[-2:], *module.tested[-2:], *predicted]
        assert all(torch.equal(each, weights) for each in seen)
        assert torch.equal(vector(module), weights)
        if again:
            assert marks(fitting, module)["optimizer"] == found["optimizer"]
            assert marks(fitting, module)["hooks"] == found["hooks"]
        else:
            fitting.fit(module)


@every_callback
@pytest.mark.parametrize("options", [{"fast_dev_run": 2}, {"max_steps": 0}, {"limit_train_batches": 0}])
def test_short_fits(make: Make, optimizer: Any, options: dict[str, Any]) -> None:
    fitting, module = fit(optimizer, make(), **options)
    with lacking():
        assert marks(fitting, module) == marks(*fit(optimizer, **options))
    if "fast_dev_run" not in options and not isinstance(make(), lightning_optim.callbacks.GradInit):
        assert torch.equal(vector(module), vector(Module(optimizer)))


@every_callback
def test_more_fits_of_one_trainer(make: Make, optimizer: Any) -> None:
    """A second fit of a Trainer goes on; its callback and a fresh one do the same in it."""

    def twice(callback: Callback, again: Callback) -> Module:
        fitting, module = fit(optimizer, callback)
        fitting.fit_loop.max_epochs = 4
        everything: Any = fitting
        everything.callbacks = [again if other is callback else other for other in everything.callbacks]
        fitting.fit(module)
        return module

    callback = make()
    if isinstance(callback, lightning_optim.callbacks.GradInit):
        pytest.skip("a fresh one scales the weights again")
    assert same(twice(callback, callback), twice(make(), make()))


class Steps(DummyLogger):
    """Notes what is logged between the start and the end of an epoch of training."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.found = False, set[str]()

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.inside:
            self.found |= set(metrics)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return super().__getattr__(name)


class Inside(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.logger.inside = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.logger.inside = False


@every_callback
def test_no_step_is_logged_where_none_shall_be(make: Make, optimizer: Any) -> None:
    logger: Logger = Steps()
    fit(optimizer, Inside(), make(), logger=logger, log_every_n_steps=0, limit_val_batches=0)
    assert not logger.found  # type: ignore[attr-defined]


class ByHand(Module):
    """Two optimizers under manual optimization; the second takes every second step."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.other = nn.Linear(4, 2)

    def training_step(self, batch: Sequence[Tensor], index: int) -> Any:
        self.trained.append(vector(self))
        every: Any = self.optimizers()
        for optimizer, part, turn in zip(every, (self.net, self.other), (1, 2), strict=True):
            if index % turn == turn - 1:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(part(batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.make(list(part.parameters())) for part in (self.net, self.other)]


KINDS: list[tuple[type[Module], dict[str, Any]]] = [
    (Module, {"accumulate_grad_batches": 2, "val_check_interval": 2, "gradient_clip_val": 0.5}),
    (ByHand, {"check_val_every_n_epoch": None, "val_check_interval": 3}),
]


@every_callback
@pytest.mark.filterwarnings("ignore:.*training_step returns no loss", "ignore:GradientNoiseScale measures nothing")
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=["accumulated", "by hand"])
def test_other_kinds_of_training(make: Make, optimizer: Any, kind: type[Module], options: Any, tmp_path: Path) -> None:
    """Several validations in an epoch: one callback in two fits, and in one that resumes the second."""
    callback = make()
    if kind is ByHand and isinstance(callback, lightning_optim.callbacks.GradInit):
        pytest.skip("it needs a training_step that returns the loss")
    first = fit(optimizer, callback, kind=kind, **options)
    saving = ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    second = fit(optimizer, callback, saving, kind=kind, **options)
    assert same(first[1], second[1])
    assert marks(*first) == usual_kind(optimizer, [each for each, _ in KINDS].index(kind))
    _, rest = fit(optimizer, callback, kind=kind, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert all(map(torch.equal, rest.trained, second[1].trained[4:]))
    assert torch.equal(vector(rest), vector(second[1]))


@functools.cache
def usual_kind(optimizer: Any, number: int) -> dict[str, Any]:
    kind, options = KINDS[number]
    with lacking():
        return marks(*fit(optimizer, kind=kind, **options))
