"""Iterate averaging against plain loops over the weights that training really had."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from examples.digits.digits import GlobalBatches, Loader
from lightning_optim import SGDW, Adan, OptionError
from lightning_optim.callbacks import IterateAveraging
from lightning_optim.stages import Average
from tests.harness.data import BATCH, batches, samples
from tests.harness.journeys import JOURNEYS, journey
from tests.harness.modules import Make, Pair, Toy, slot, vector
from tests.harness.ranks import run_ranks
from tests.harness.trainers import Run, Walk, trainer

ROUNDING = 1e-13  # of a dozen additions in float64


def adan(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Adan(params, lr=0.02)


def adan16(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Adan(params, lr=0.02, state_bits=16)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02)


def plain_mean(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(weights)).double().mean(0)


def plain_ema(weights: Sequence[Tensor], decay: float) -> Tensor:
    average = weights[0].double()
    for newer in weights[1:]:
        average = decay * average + (1 - decay) * newer.double()
    return average


def picked(run: Run, steps: Sequence[int]) -> list[Tensor]:
    """The weights after the given steps, 1 being the first."""
    return [run.walk.weights[step - 1] for step in steps]


def close(actual: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> bool:
    return bool((actual.double() - expected.double()).abs().max() <= tolerance)


# ---------------------------------------------------------------- what is averaged


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [12]),  # the last quarter, at the ends of epochs: a quarter of 12 steps holds one
        ({"start": 0.5}, [8, 12]),
        ({"start": 0.5, "every": 1}, range(6, 13)),
        ({"start": 0, "every": 1}, range(1, 13)),
        ({"start": 1, "every": 1}, range(1, 13)),
        ({"start": 5, "every": 3}, [5, 8, 11]),
        ({"start": 0}, [4, 8, 12]),
        ({"start": 5}, [8, 12]),
        ({"start": 12, "every": 5}, [12]),
    ],
)
@pytest.mark.parametrize("make", [adan, sgd, adamw])
def test_the_mean_of_the_collected_iterates(make: Make, options: dict[str, Any], steps: Sequence[int]) -> None:
    run = Run(make, IterateAveraging("mean", **options), precision="64-true")
    assert len(run.walk.weights) == 12
    assert close(vector(run.module), plain_mean(picked(run, steps)))
    assert len(steps) == 1 or not close(vector(run.module), run.walk.weights[-1], 1e-4)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({}, range(1, 13)), ({"start": 4, "every": 2}, range(4, 13, 2)), ({"every": "epoch"}, [4, 8, 12])],
)
@pytest.mark.parametrize("make", [adan, sgd])
def test_the_exponential_mean_begins_as_a_copy(make: Make, options: dict[str, Any], steps: Sequence[int]) -> None:
    run = Run(make, IterateAveraging("ema", decay=0.8, **options), precision="64-true")
    assert close(vector(run.module), plain_ema(picked(run, steps), 0.8))


@pytest.mark.parametrize("make", [adan, sgd])
def test_a_debiased_mean_forgets_the_first_iterate_like_the_others(make: Make) -> None:
    run = Run(make, IterateAveraging("ema_debiased", decay=0.8), precision="64-true")
    weights = [0.8 ** (11 - i) for i in range(12)]
    expected = sum(w * x.double() for w, x in zip(weights, run.walk.weights, strict=True)) / sum(weights)
    assert close(vector(run.module), expected)  # type: ignore[arg-type]


def test_a_ramp_shortens_the_memory_at_first() -> None:
    run = Run(adan, IterateAveraging("ema", decay=0.5, ramp=True), precision="64-true")
    average = run.walk.weights[0].double()
    for n, newer in enumerate(run.walk.weights[1:], start=1):
        d = min(0.5, (1 + n) / (10 + n))
        average = d * average + (1 - d) * newer.double()
    assert close(vector(run.module), average)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 20])
@pytest.mark.parametrize("make", [adan, sgd])
def test_a_window_holds_the_last_collections(make: Make, window: int) -> None:
    """After each of 12 collections: all while there are fewer, then the last `window` to 2 * `window` - 1."""
    run = Run(make, IterateAveraging(start=1, every=1, window=window), precision="64-true", watch="average")
    for n, average in enumerate(run.walk.slots, start=1):
        held = n if n < window else window + n % window
        assert close(average, plain_mean(run.walk.weights[n - held : n])), n


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (Average("mean"), 0.198047919685),
        (Average("ema", 0.9), 0.451075901511),
        (Average("ema_debiased", 0.9), 0.074235828000),
        (Average("ema", 0.9, ramp=True), -0.658111947254),
    ],
)
def test_worked_numbers(stage: Average, expected: float) -> None:
    """The average of sin(0.7 n + 0.2) for n = 1 to 6."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SGDW([p], lr=1.0, momentum=0.0)
    optimizer.append(stage)
    for n in range(1, 7):
        p.grad = p.detach() - math.sin(0.7 * n + 0.2)
        optimizer.step()
    assert float(optimizer.state[p]["average"]) == pytest.approx(expected, abs=1e-12)


def test_steps_are_counted_not_batches() -> None:
    run = Run(adan, IterateAveraging(start=0), precision="64-true", accumulate_grad_batches=3)  # steps at 3 and 4 of 4
    assert len(run.walk.weights) == 6
    assert close(vector(run.module), plain_mean(picked(run, [2, 4, 6])))


class Epochs(Callback):
    """The weights that training has at the end of each epoch."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append(vector(pl_module))


class Bad(Toy):
    """The first batch of all has no loss, or overflows; and so has a whole epoch, if that is asked for."""

    def __init__(self, make: Make, overflow: bool = False, epoch: int | None = None) -> None:
        super().__init__(make)
        self.overflow, self.epoch = overflow, epoch

    def training_step(self, batch: Sequence[Tensor], index: int) -> Any:
        loss = super().training_step(batch, index)
        if len(self.losses) == 1 or self.current_epoch == self.epoch:
            return loss * torch.inf if self.overflow else None
        return loss


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(samples())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`", "ignore:Detected call of")
@pytest.mark.parametrize(
    ("module", "options", "accumulate", "all_epochs", "last_quarter"),
    [
        (Bad, {}, {}, [0, 1, 2, 3], [2, 3]),
        (lambda make: Bad(make, overflow=True), {"plugins": True}, {}, [0, 1, 2, 3], [2, 3]),
        (lambda make: Bad(make, epoch=3), {}, {}, [0, 1, 2], [2]),  # the last epoch moved nothing
        (Toy, {}, {0: 1, 1: 2, 3: 4}, [0, 1, 2, 3], [2, 3]),
        (Toy, {}, {0: 4, 1: 2, 3: 1}, [0, 1, 2, 3], [2, 3]),
        (Toy, {"train": True}, {}, [0, 1, 2, 3], [2, 3]),
        (Toy, {"max_steps": 14, "max_epochs": -1}, {}, [0, 1, 2], [2]),  # ends in the middle of an epoch
    ],
)
@pytest.mark.parametrize("make", [adan, sgd])
def test_every_epoch_counts_whatever_its_steps(
    make: Make,
    module: Callable[[Make], Toy],
    options: dict[str, Any],
    accumulate: dict[int, int],
    all_epochs: list[int],
    last_quarter: list[int],
) -> None:
    """The last one too, where steps were skipped, accumulation changes, or nobody knows how long an epoch is."""
    options = {"max_epochs": 4, **options}
    if "train" in options:
        options["train"] = DataLoader(Stream(), batch_size=BATCH)
    if "plugins" in options:
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]
    for start, expected in ((0, all_epochs), (0.75, last_quarter)):
        epochs, averaging = Epochs(), IterateAveraging(start=start)
        changing = [GradientAccumulationScheduler(accumulate)] if accumulate else []
        torch.manual_seed(0)
        run = Run(make, epochs, averaging, *changing, module=module(make), **options)
        assert close(vector(run.module), plain_mean([epochs.weights[i] for i in expected]), 1e-6)
        assert averaging.state_dict()["counts"] == [len(expected)]


@pytest.mark.parametrize("make", [adan, sgd])
def test_two_optimizers_by_hand_with_steps_of_their_own(make: Make) -> None:
    epochs, averaging = Epochs(), IterateAveraging(start=0.5)
    run = Run(make, epochs, averaging, module=Pair(make), precision="64-true")
    assert averaging.state_dict()["steps"] == [12, 6]
    assert close(vector(run.module), plain_mean(epochs.weights[1:]))
    with pytest.raises(OptionError, match=r"start=0.5 is a fraction of training, and in manual.*or every='epoch'"):
        Run(make, IterateAveraging(start=0.5, every=1), module=Pair(make))


@pytest.mark.parametrize("make", [adan, sgd])
def test_an_optimizer_that_has_collected_nothing_keeps_its_weights(make: Make) -> None:
    """Its slot holds the weights that the fit began with, and nobody wants to evaluate those."""
    averaging, epochs = IterateAveraging("ema", decay=0.5, start=12), Epochs()
    run = Run(make, averaging, epochs, module=Pair(make, 4))
    assert [averaging.state_dict()[name] for name in ("steps", "counts")] == [[12, 3], [1, 0]]
    assert torch.equal(vector(run.module), epochs.weights[-1])


def test_a_length_that_nobody_knows() -> None:
    stream: Any = DataLoader(Stream(), batch_size=BATCH)
    run = Run(adan, IterateAveraging("ema", decay=0.8), train=stream, precision="64-true")
    assert close(vector(run.module), plain_ema(run.walk.weights, 0.8))
    averagings = (IterateAveraging(start=0.5), IterateAveraging(start=0.5, every=1))
    for averaging, train in (*((each, None) for each in averagings), (averagings[1], stream)):
        epochs = 3 if train is stream else -1
        with pytest.raises(OptionError, match=r"start=0.5 is a fraction of training, whose length is unknown"):
            Run(adan, averaging, train=train, max_epochs=epochs)


@pytest.mark.parametrize(("steps", "start"), [(3, 0), (10, 0.9), (6, 5)])
def test_a_training_in_which_no_epoch_ends_late_enough_is_warned_of(steps: int, start: float) -> None:
    with pytest.warns(UserWarning, match=f"collects nothing, for max_steps={steps} ends training before an epoch"):
        run = Run(adan, IterateAveraging(start=start), max_steps=steps, max_epochs=-1)
    assert torch.equal(vector(run.module), run.walk.weights[-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "median"}, "kind='median' must be 'mean', 'ema' or 'ema_debiased'"),
        ({"window": 0}, "window=0 must be an integer of at least 1, with kind='mean'"),
        ({"kind": "ema", "window": 3}, "window=3 must be an integer of at least 1, with kind='mean'"),
        ({"ramp": True}, "ramp=True must be False, except with kind='ema'"),
        ({"kind": "ema", "decay": 1.0}, r"decay=1.0 must be in \(0, 1\)"),
        ({"kind": "ema", "decay": 0}, r"decay=0 must be in \(0, 1\)"),
        ({"start": -1}, "start=-1 must be a step, or a fraction of training below 1"),
        ({"start": 2.5}, "start=2.5 must be a step, or a fraction of training below 1"),
        ({"start": math.inf}, "start=inf must be a step"),
        ({"start": math.nan}, "start=nan must be a step, or a fraction of training below 1"),
        ({"every": 0}, "every=0 must be an integer of at least 1, or 'epoch'"),
        ({"every": "step"}, "every='step' must be an integer of at least 1, or 'epoch'"),
        ({"every": 1.5}, "every=1.5 must be an integer of at least 1, or 'epoch'"),
        ({"batch_norm": "drop"}, "batch_norm='drop' must be 'recompute' or 'keep'"),
        ({"batch_norm_batches": 0}, "batch_norm_batches=0 must be an integer of at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"IterateAveraging: {words}"):
        IterateAveraging(**options)


# ---------------------------------------------------------------- who sees the average


@pytest.mark.parametrize("make", [adan, adan16, sgd, adamw])
def test_evaluation_and_checkpoints_see_the_average_and_training_does_not(make: Make, tmp_path: Path) -> None:
    alone = Run(make, precision="64-true")
    run = Run(
        make,
        IterateAveraging(start=2, every=2),
        ModelCheckpoint(tmp_path / "full", "{step}", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(tmp_path / "weights", "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=True),
        ModelCheckpoint(tmp_path / "epochs", "{step}", every_n_epochs=1, save_top_k=-1),
        val_check_interval=2,
        precision="64-true",
    )
    assert [w.tolist() for w in run.walk.weights] == [w.tolist() for w in alone.walk.weights]

    def expected(step: int) -> Tensor:
        return plain_mean(picked(run, range(2, step + 1, 2)))

    assert len(run.module.validated) == 6 * 2  # every two steps, two batches
    for i, seen in enumerate(run.module.validated):
        assert close(seen, expected(2 * (i // 2) + 2))
    for name, steps in (("full", [3, 6, 9, 12]), ("weights", range(2, 13)), ("epochs", [4, 8, 12])):
        for step in steps:
            saved = torch.load(tmp_path / name / f"step={step}.ckpt", weights_only=True)
            weights = torch.cat([value.reshape(-1) for value in saved["state_dict"].values()])
            assert close(weights, expected(step)), (name, step)
            if name != "weights":
                state = saved["optimizer_states"][0]["state"]
                raw = torch.cat([state[i]["average"].reshape(-1) for i in sorted(state)])
                assert torch.equal(raw, run.walk.weights[step - 1])
    first = torch.load(tmp_path / "weights" / "step=1.ckpt", weights_only=True)  # nothing is collected yet
    assert torch.equal(torch.cat([v.reshape(-1) for v in first["state_dict"].values()]), run.walk.weights[0])

    run.trainer.test(run.module, batches(), verbose=False)
    assert close(run.module.tested[-1], expected(12))
    assert torch.equal(run.module.tested[-1], vector(run.module))


def test_before_the_first_collection_the_raw_weights_are_evaluated() -> None:
    run = Run(adan, IterateAveraging("ema", decay=0.5, start=9), num_sanity_val_steps=1)
    fresh = vector(untrained(run))
    assert torch.equal(run.module.validated[0], fresh)  # the sanity check
    for epoch in (1, 2):
        assert torch.equal(run.module.validated[2 * epoch - 1], run.walk.weights[4 * epoch - 1])
    assert close(run.module.validated[-1], plain_ema(picked(run, range(9, 13)), 0.5), 1e-6)


def untrained(run: Run) -> Toy:
    torch.manual_seed(0)
    return Toy(run.module.make)


class Unlucky(Toy):
    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        super().validation_step(batch, index)
        if len(self.validated) == 4:
            raise ArithmeticError("the metric is undefined")


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint")
def test_an_exception_in_validation_leaves_the_raw_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, walk = Unlucky(adan), Walk()
    callbacks = (walk, IterateAveraging(start=1, every=1), OnExceptionCheckpoint(tmp_path, "last"))
    with pytest.raises(ArithmeticError, match="undefined"):
        trainer(*callbacks, precision="64-true").fit(module, batches(), batches(batch_size=16))
    assert close(module.validated[-1], plain_mean(walk.weights))
    assert torch.equal(vector(module), walk.weights[-1])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert close(torch.cat([v.reshape(-1) for v in saved["state_dict"].values()]), plain_mean(walk.weights))


# ---------------------------------------------------------------- resume


def checkpoints(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, **when)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}])
@pytest.mark.parametrize("make", [adan, adan16, sgd, adamw])
def test_a_resumed_run_is_the_same_run(make: Make, when: dict[str, int], precision: str, tmp_path: Path) -> None:
    def averaging() -> IterateAveraging:
        return IterateAveraging("mean", start=3, every=1)

    whole = Run(make, averaging(), checkpoints(tmp_path, **when), precision=precision)
    again = checkpoints(tmp_path / "again", **when)
    rest = Run(make, averaging(), again, ckpt_path=tmp_path / "step=4.ckpt", precision=precision)
    assert len(rest.walk.weights) == 8
    assert [w.tolist() for w in rest.walk.weights] == [w.tolist() for w in whole.walk.weights[4:]]
    assert torch.equal(vector(rest.module), vector(whole.module))
    assert torch.equal(slot(rest.trainer.optimizers[0], "average"), slot(whole.trainer.optimizers[0], "average"))


@pytest.mark.parametrize("make", [adan, sgd])
def test_a_window_resumes(make: Make, tmp_path: Path) -> None:
    def averaging() -> IterateAveraging:
        return IterateAveraging(start=1, every=1, window=3)

    whole = Run(make, averaging(), checkpoints(tmp_path, every_n_train_steps=4))
    again = checkpoints(tmp_path / "again", every_n_train_steps=4)
    rest = Run(make, averaging(), again, ckpt_path=tmp_path / "step=4.ckpt")
    assert torch.equal(vector(rest.module), vector(whole.module))
    with pytest.raises(OptionError, match="average with window=3 and this run has window=None"):
        Run(make, IterateAveraging(start=1, every=1), again, ckpt_path=tmp_path / "step=4.ckpt")


def test_another_kind_of_average_does_not_resume(tmp_path: Path) -> None:
    Run(adan, IterateAveraging("mean"), checkpoints(tmp_path), max_epochs=1)
    other, saved = IterateAveraging("ema"), tmp_path / "step=4.ckpt"
    with pytest.raises(OptionError, match="holds an average of kind 'mean' and this run has 'ema'"):
        Run(adan, other, checkpoints(tmp_path), ckpt_path=saved)


# ---------------------------------------------------------------- 16 bits


def test_validating_does_not_change_a_bf16_average() -> None:
    validating: tuple[dict[str, Any], ...] = ({"limit_val_batches": 0}, {"val_check_interval": 1})
    quiet, busy = (
        Run(adan, IterateAveraging(start=1, every=1), precision="bf16-true", watch="average", **options)
        for options in validating
    )
    assert len(busy.module.validated) == 24
    assert [s.tolist() for s in quiet.walk.slots] == [s.tolist() for s in busy.walk.slots]
    assert quiet.walk.slots[0].dtype == torch.float32
    assert torch.equal(vector(quiet.module), vector(busy.module))
    # The step averages what it computed, before that is rounded to the weight: by up to 2^-9 of its size.
    rounding = 2**-9 * torch.stack(busy.walk.weights).abs().double().mean(0)
    off = (busy.walk.slots[-1].double() - plain_mean(busy.walk.weights)).abs()
    assert bool((off <= rounding + 1e-6).all())


# ---------------------------------------------------------------- batch normalisation


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def by_hand(net: nn.Sequential, batch_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of what enters the normalisation, averaged over batches by their size."""
    inputs = samples().tensors[0].double()
    entering = [net[0](part) for part in torch.split(inputs[: sum(batch_sizes)], list(batch_sizes))]
    shares = [len(part) / sum(batch_sizes) for part in entering]
    means = torch.stack([share * part.mean(0) for share, part in zip(shares, entering, strict=True)])
    variances = torch.stack([share * part.var(0) for share, part in zip(shares, entering, strict=True)])
    return means.sum(0), variances.sum(0)


@pytest.mark.parametrize(
    ("batch_size", "limit", "batch_sizes"), [(8, None, [8] * 4), (8, 2, [8] * 2), (12, None, [12, 12, 8])]
)
def test_batch_norm_statistics_belong_to_the_average(
    batch_size: int, limit: int | None, batch_sizes: Sequence[int]
) -> None:
    averaging = IterateAveraging(start=0, every=1, batch_norm_batches=limit)
    run = Run(adan, averaging, net=norm_net, train=batches(batch_size=batch_size), precision="64-true")
    net: Any = run.module.net
    mean, variance = by_hand(net, batch_sizes)
    assert close(net[2].running_mean, mean)
    assert close(net[2].running_var, variance)
    assert net[2].num_batches_tracked == len(batch_sizes)
    assert net[2].momentum == 0.1


def test_batch_norm_statistics_can_be_kept() -> None:
    alone = Run(adan, net=norm_net)
    kept = Run(adan, IterateAveraging(start=0, every=1, batch_norm="keep"), net=norm_net)
    for one, other in zip(alone.module.buffers(), kept.module.buffers(), strict=True):
        assert torch.equal(one, other)


class Buffers(Walk):
    """Also the statistics that training has after each step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(torch.cat([vector(pl_module), *(b.reshape(-1) for b in pl_module.buffers())]))


def test_recomputing_statistics_does_not_touch_training() -> None:
    """Dropout, the order of the samples and the raw statistics stay those of a run without the callback."""

    def walk(*callbacks: IterateAveraging) -> list[list[float]]:
        shuffled = batches(shuffle=True, generator=torch.Generator().manual_seed(3))
        buffers = Buffers()
        Run(adan, buffers, *callbacks, net=norm_net, train=shuffled, val_check_interval=2)
        return [weights.tolist() for weights in buffers.weights]

    assert walk() == walk(IterateAveraging(start=1, every=1))


class OneIterator(DataLoader[Any]):
    """Uses one iterator for ever, as a DataLoader with persistent workers does."""

    def __iter__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._get_iterator()
        else:
            self._iterator._reset(self)
        return self._iterator


def test_recomputing_statistics_does_not_restart_the_iterator_of_training() -> None:
    alone = Run(adan, net=norm_net, train=OneIterator(samples(), 8), val_check_interval=2)
    averaging = IterateAveraging(start=1, every=1)
    run = Run(adan, averaging, net=norm_net, train=OneIterator(samples(), 8), val_check_interval=2)
    assert run.module.losses == alone.module.losses


class Resumable(LightningDataModule):
    def train_dataloader(self) -> Loader:
        return Loader(samples(), sampler=GlobalBatches(32, 8, 0, 1, seed=0), batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        return batches()


def test_recomputing_statistics_does_not_move_a_loader_that_knows_its_place(tmp_path: Path) -> None:
    def run(*callbacks: Callback, path: Path | None = None) -> list[float]:
        seed_everything(0, verbose=False)
        module = Toy(adan, norm_net)
        trainer(*callbacks, val_check_interval=2).fit(module, datamodule=Resumable(), ckpt_path=path)
        return module.losses

    def averaging() -> IterateAveraging:
        return IterateAveraging(start=1, every=1)

    alone = run()
    assert len(set(alone)) == 12
    assert run(averaging(), checkpoints(tmp_path, every_n_train_steps=3)) == alone
    with pytest.raises(OptionError, match=r"no other. Give the Trainer a LightningDataModule.*batch_norm='keep'"):
        Run(adan, averaging(), net=norm_net, train=Resumable().train_dataloader())


def test_the_modes_of_a_half_frozen_network_stay(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        found = norm_net()
        found[1].eval()
        return found

    modes: list[list[bool]] = []

    class Modes(Walk):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            modes.append([part.training for part in pl_module.modules()])

    saving = checkpoints(tmp_path, every_n_train_steps=1)  # statistics are needed between two steps
    with pytest.warns(UserWarning, match="in eval mode"):
        Run(adan, Modes(), IterateAveraging(start=1, every=1), saving, net=net)
    assert len({tuple(mode) for mode in modes}) == 1


@pytest.mark.parametrize("when", [{"every_n_train_steps": 4}, {"every_n_epochs": 1}])
def test_raw_statistics_resume_too(when: dict[str, int], tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    whole, rest = Buffers(), Buffers()
    for walk, path in ((whole, None), (rest, tmp_path / "step=4.ckpt")):
        saving = checkpoints(tmp_path, **when) if path is None else checkpoints(tmp_path / "again", **when)
        Run(adan, walk, IterateAveraging(start=1, every=1), saving, net=net, ckpt_path=path)
    assert [w.tolist() for w in rest.weights] == [w.tolist() for w in whole.weights[4:]]


# ---------------------------------------------------------------- two processes


def on_ranks(kind: str) -> dict[str, Any]:
    data = samples()
    sampler: Any = DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False)
    run = Run(
        adan,
        IterateAveraging(kind, decay=0.8, start=2, every=1),  # type: ignore[arg-type]
        net=norm_net,
        train=DataLoader(data, batch_size=4, sampler=sampler),
        strategy="ddp",
        devices=2,
        precision="64-true",
    )
    net: Any = run.module.net
    return {
        "average": vector(run.module),
        "walk": run.walk.weights,
        "mean": net[2].running_mean,
        "entering": net[0](data.tensors[0][list(sampler)].double()).mean(0),
    }


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_two_processes_average_alike(kind: str) -> None:
    first, second = run_ranks(on_ranks, kind)
    expected = plain_mean(first["walk"][1:]) if kind == "mean" else plain_ema(first["walk"][1:], 0.8)
    assert torch.equal(first["average"], second["average"])
    assert close(first["average"], expected)
    assert torch.equal(first["mean"], second["mean"])
    assert not torch.equal(first["entering"], second["entering"])
    assert close(first["mean"], (first["entering"] + second["entering"]) / 2)


def uneven(_: int) -> dict[str, Any]:
    """One rank has twice as many samples as the other."""
    rank = int(os.environ["RANK"])
    data = torch.utils.data.Subset(samples(), range(24) if rank else range(24, 32))
    train = DataLoader(data, batch_size=4 + 8 * rank)
    run = Run(adan, IterateAveraging(start=1, every=1), net=norm_net, train=train, strategy="ddp", devices=2)
    net: Any = run.module.net
    return {"mean": net[2].running_mean, "all": net[0](samples().tensors[0]).mean(0)}


def test_statistics_of_ranks_count_by_their_samples() -> None:
    for found in run_ranks(uneven, 0):
        assert close(found["mean"], found["all"], 1e-6)


def averaging_from_the_first_step() -> IterateAveraging:
    return IterateAveraging("ema", decay=0.7)


def averaging_at_the_end_of_epochs() -> IterateAveraging:
    return IterateAveraging("ema", decay=0.7, every="epoch")


@pytest.mark.parametrize("kind", JOURNEYS)
@pytest.mark.parametrize("with_norm", [False, True])
def test_every_strategy_evaluates_saves_and_resumes_the_average(kind: str, with_norm: bool, tmp_path: Path) -> None:
    """To the rounding of float32 in a dozen steps; within one strategy the test of the best is its validation."""
    averaging = averaging_at_the_end_of_epochs if with_norm else averaging_from_the_first_step
    alone = journey("single", adan, averaging, tmp_path / "alone", with_norm)
    both = run_ranks(journey, kind, adan, averaging, tmp_path / "whole", with_norm)
    for whole in both:
        for key in ("train", "val", "test"):
            assert whole[key] == pytest.approx(alone[key], rel=1e-4), key
        assert sum(whole["test"]) / 2 == pytest.approx(whole["best"], rel=1e-6)
        assert len(set(whole["val"])) == 6
    saved = tmp_path / "whole" / "step=4.ckpt"
    resumed = run_ranks(journey, kind, adan, averaging, tmp_path / "rest", with_norm, saved)
    for whole, rest in zip(both, resumed, strict=True):
        assert rest["train"] == whole["train"][4:]
        assert rest["val"] == whole["val"][2:]


@pytest.mark.parametrize("options", [{}, {"limit_val_batches": 0}])
def test_what_a_person_would_look_at(options: dict[str, Any], tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 4, "precision": "64-true", **options}
    run = Run(adan, IterateAveraging(start=1, every=1), **options)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    collected = {event.step: event.value for event in events.Scalars("iterate_averaging/collected")}
    assert collected == {4: 4.0, 8: 8.0, 12: 12.0}
    last = run.walk.weights[7]
    expected = float((last - plain_mean(run.walk.weights[:8])).norm() / last.norm())
    assert events.Scalars("iterate_averaging/distance")[1].value == pytest.approx(expected, rel=1e-6)
