"""Lightning's averaging callbacks beside ours: every row of the table in docs/iterate_averaging.md.

What they do right is done alike; what they do wrong in Lightning 2.6 is shown, so that the table is corrected when a
later Lightning does it right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_optim import Adan
from lightning_optim.callbacks import IterateAveraging
from tests.harness.data import batches
from tests.harness.journeys import journey
from tests.harness.modules import Toy, vector
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.trainers import Run, Walk, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*was called without a model",
    "ignore:.*there is no last checkpoint",
    "ignore:.*Swapping scheduler",
    "ignore:.*a model that overrides the configure_model callback",
)

DECAY = 0.8


def adan(params: Any) -> torch.optim.Optimizer:
    return Adan(params, lr=0.02)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def ema() -> IterateAveraging:
    return IterateAveraging("ema", decay=DECAY)


def their_ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=DECAY)


def their_swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2, annealing_epochs=1)


def weights_in(path: Path, key: str = "state_dict") -> Tensor:
    saved = torch.load(path, weights_only=True)[key]
    return torch.cat([value.reshape(-1) for value in saved.values()])


def plain_ema(weights: Sequence[Tensor]) -> Tensor:
    average = weights[0]
    for newer in weights[1:]:
        average = DECAY * average + (1 - DECAY) * newer
    return average


def near(one: Tensor, other: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((one.double() - other.double()).abs().max() <= tolerance)


# ---------------------------------------------------------------- what is done alike


def test_the_same_average_is_evaluated_saved_and_left_in_the_model(tmp_path: Path) -> None:
    for averaging in (ema(), their_ema()):
        saving = ModelCheckpoint(tmp_path / type(averaging).__name__, "{step}", every_n_epochs=1, save_top_k=-1)
        run = Run(adan, averaging, saving)
        for epoch in (1, 2, 3):
            expected = plain_ema(run.walk.weights[: 4 * epoch])
            assert near(run.module.validated[2 * epoch - 1], expected)
            assert near(weights_in(tmp_path / type(averaging).__name__ / f"step={4 * epoch}.ckpt"), expected)
        assert near(vector(run.module), expected)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"update_starting_at_step": 5}, {"start": 5 + 1}),
        ({"update_every_n_steps": 3}, {"every": 3, "start": 1}),
        ({"update_every_n_steps": 4, "update_starting_at_step": 4}, {"every": 4, "start": 4 + 1}),
        ({"update_every_n_steps": 3, "update_starting_at_step": 4}, {"every": 3, "start": 3 * math.ceil(4 / 3) + 1}),
    ],
)
def test_their_numbers_are_translated_as_the_docs_say(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    one, other = (
        Run(adan, averaging)
        for averaging in (EMAWeightAveraging(decay=DECAY, **theirs), IterateAveraging("ema", DECAY, **ours))
    )
    assert near(vector(one.module), vector(other.module))
    assert near(one.module.validated[-1], other.module.validated[-1])
    assert not near(vector(one.module), plain_ema(one.walk.weights), 1e-4)


def test_both_resume_exactly(tmp_path: Path) -> None:
    for make in (ema, their_ema):
        folder = tmp_path / make.__name__
        saving = [ModelCheckpoint(folder / str(i), "{step}", every_n_train_steps=4, save_top_k=-1) for i in range(2)]
        whole = Run(adan, make(), saving[0])
        rest = Run(adan, make(), saving[1], ckpt_path=folder / "0" / "step=4.ckpt")
        assert torch.equal(vector(rest.module), vector(whole.module))


# ---------------------------------------------------------------- what is kept


def test_ours_keeps_a_slot_and_theirs_a_copy_of_the_module() -> None:
    """A module with more than parameters, of which a second copy is no use."""

    class Heavy(Toy):
        def __init__(self) -> None:
            super().__init__(adan)
            self.register_buffer("table", torch.zeros(1000))

    seen: list[int] = []

    class Count(Walk):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            copies = [c._average_model for c in trainer.callbacks if isinstance(c, WeightAveraging)]
            theirs = sum(x.numel() for c in copies if c is not None for x in (*c.parameters(), *c.buffers()))
            states = trainer.optimizers[0].state.values()
            seen.append(theirs + sum(state["average"].numel() for state in states if "average" in state))

    for averaging in (ema(), their_ema()):
        Run(adan, Count(), averaging, module=Heavy(), max_epochs=1)
    size = sum(p.numel() for p in Toy(adan).parameters())
    assert seen[0] == size
    assert seen[1] > size + 1000


# ---------------------------------------------------------------- quiet defects


def test_files_of_weights_only(tmp_path: Path) -> None:
    for averaging, has in ((ema(), True), (their_ema(), False)):
        folder = tmp_path / type(averaging).__name__
        run = Run(adan, averaging, ModelCheckpoint(folder, "{step}", every_n_epochs=1, save_weights_only=True))
        saved = weights_in(folder / "step=12.ckpt")
        assert near(saved, plain_ema(run.walk.weights)) == has
        assert near(saved, run.walk.weights[-1]) != has


class Unlucky(Toy):
    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        super().validation_step(batch, index)
        if len(self.validated) == 4:
            raise ArithmeticError("the metric is undefined")


def test_a_crash_in_validation(tmp_path: Path) -> None:
    for averaging, right in ((ema(), True), (their_ema(), False)):
        torch.manual_seed(0)
        module, walk, folder = Unlucky(adan), Walk(), tmp_path / type(averaging).__name__
        fitting = trainer(walk, averaging, OnExceptionCheckpoint(folder, "last"))
        with pytest.raises(ArithmeticError):
            fitting.fit(module, batches(), batches(batch_size=16))
        assert near(weights_in(folder / "last.ckpt"), plain_ema(walk.weights)) == right
        assert near(vector(module), walk.weights[-1]) == right
        if not right:  # what the file calls the current weights is the average, and the other way round
            assert near(weights_in(folder / "last.ckpt", "current_model_state"), plain_ema(walk.weights))


def test_weights_of_16_bits_do_not_round_the_average() -> None:
    class Last(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            for callback in trainer.callbacks:
                if isinstance(callback, WeightAveraging):
                    assert callback._average_model is not None
                    found.append(vector(callback._average_model))
            states = trainer.optimizers[0].state.values()
            found.extend(state["average"].reshape(-1).clone() for state in states if "average" in state)

    for make, same in ((ema, True), (their_ema, False)):
        ends = []
        for interval in (1, 4):  # only in how often it is validated these differ
            found: list[Tensor] = []
            Run(adan, Last(), make(), precision="bf16-true", max_epochs=2, val_check_interval=interval)
            ends.append(torch.cat([x.float() for x in found]))
        assert torch.equal(*ends) == same


def test_a_delayed_start_does_not_evaluate_untrained_weights() -> None:
    runs = [
        Run(adan, averaging)
        for averaging in (
            IterateAveraging("ema", DECAY, start=9),
            EMAWeightAveraging(decay=DECAY, update_starting_at_step=8),
        )
    ]
    ours, theirs = (run.module.validated for run in runs)
    weights = runs[0].walk.weights
    assert torch.equal(ours[1], weights[3])
    assert not near(theirs[1], weights[3], 1e-3)
    assert torch.equal(theirs[1], theirs[3])  # the copy made before training, twice
    assert near(ours[-1], theirs[-1])


def test_a_start_in_epochs() -> None:
    ours = Run(adan, IterateAveraging("ema", DECAY, start=9))
    theirs = Run(adan, EMAWeightAveraging(decay=DECAY, update_starting_at_epoch=2))
    assert near(vector(ours.module), plain_ema(ours.walk.weights[8:]))
    assert not near(vector(theirs.module), plain_ema(theirs.walk.weights[8:]), 1e-4)  # it averages from step 0 on


def test_the_last_epoch_counts() -> None:
    """From the second epoch on, of three: SWA collects when an epoch begins, so it has the first and not the last."""
    ours = Run(sgd, IterateAveraging("mean", start=5, every="epoch"))
    theirs = Run(sgd, their_swa())
    ends = ours.walk.weights[3::4]
    assert near(vector(ours.module), torch.stack(ends[1:]).mean(0))
    ends = theirs.walk.weights[3::4]
    assert near(vector(theirs.module), torch.stack(ends[:2]).mean(0))


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def test_batch_norm_of_the_average() -> None:
    """The statistics of the averaged network: ours and SWA pass over the data; WeightAveraging averages statistics."""
    inputs: Tensor = batches().dataset.tensors[0]  # type: ignore[attr-defined]
    shown = {}
    for name, averaging in {
        "ours": IterateAveraging("mean", start=1, every="epoch"),
        "theirs": their_ema(),
        "swa": their_swa(),
    }.items():
        run = Run(sgd, averaging, net=norm_net, num_sanity_val_steps=0)
        net: Any = run.module.net
        shown[name] = near(net[1].running_mean, net[0](inputs).mean(0), 1e-5)
    assert shown == {"ours": True, "theirs": False, "swa": True}


def test_counters_are_not_averaged() -> None:
    counts = {}
    for averaging in (IterateAveraging("ema", DECAY, batch_norm="keep"), their_ema()):
        run = Run(adan, averaging, net=norm_net)
        net: Any = run.module.net
        counts[type(averaging).__name__] = int(net[1].num_batches_tracked)
    assert counts["IterateAveraging"] == 12
    assert counts["EMAWeightAveraging"] < 12


class Overflow(Toy):
    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * torch.inf if len(self.losses) % 2 else loss


def test_skipped_steps_are_not_averaged() -> None:
    for averaging, right in ((ema(), True), (their_ema(), False)):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        run = Run(adan, averaging, module=Overflow(adan), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        real = run.walk.weights[1::2]  # every other step was skipped
        assert torch.equal(run.walk.weights[2], real[0])
        assert near(vector(run.module), plain_ema(real)) == right


@pytest.mark.parametrize(
    ("kind", "callback", "words"),
    [
        ("fsdp1 full", their_ema, r"size of tensor a .* must match"),
        ("fsdp2 full", their_ema, r"does not support deepcopy"),
        ("fsdp1 full", their_swa, r"SWA does not currently support sharded models"),
    ],
)
def test_sharded(kind: str, callback: Any, words: str, tmp_path: Path) -> None:
    """Ours is shown under every strategy by test_every_strategy_evaluates_saves_and_resumes_the_average."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(journey, kind, adan, callback, tmp_path)
    assert re.search(words, str(caught.value))


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_file_is_tested_as_it_was_validated_also_without_the_callback(tmp_path: Path) -> None:
    run = Run(adan, ema(), ModelCheckpoint(tmp_path, "{step}", every_n_epochs=1))
    module = Toy(adan)
    trainer().test(module, batches(batch_size=16), ckpt_path=tmp_path / "step=12.ckpt", verbose=False)
    assert torch.equal(module.tested[0], run.module.validated[-1])
