"""Lookahead against a plain loop over any optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_optim import SGDW, Adan, OptionError
from lightning_optim.callbacks import IterateAveraging, LookaheadSync
from lightning_optim.core.foreign_stages import attach
from lightning_optim.stages import Lookahead
from tests.harness.data import batches, samples
from tests.harness.journeys import JOURNEYS, journey
from tests.harness.modules import Make, Pair, Toy, slot, vector
from tests.harness.ranks import run_ranks
from tests.harness.trainers import Run

ROUNDING = 1e-13


def adan(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Adan(params, lr=0.02)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02)


def plain_loop(make: Make, k: int, alpha: float, epochs: int = 3) -> list[Tensor]:
    """The weights after each step, in float64."""
    seed_everything(0, verbose=False)
    module = Toy(make).double()
    params = list(module.parameters())
    optimizer = make(params)
    slow = [p.detach().clone() for p in params]
    walk: list[Tensor] = []
    for batch in list(batches()) * epochs:
        optimizer.zero_grad()
        torch.autograd.backward(module.loss([part.double() for part in batch]))
        optimizer.step()
        if (len(walk) + 1) % k == 0:
            for p, s in zip(params, slow, strict=True):
                s += alpha * (p.detach() - s)
                p.data.copy_(s)
        walk.append(vector(module))
    return walk


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (1, 0.3), (4, 0.8), (12, 0.5), (3, 1.0)])
@pytest.mark.parametrize("make", [adan, sgd, adamw])
def test_it_is_the_plain_loop(make: Make, k: int, alpha: float) -> None:
    run = Run(make, LookaheadSync(k, alpha), precision="64-true")
    expected = plain_loop(make, k, alpha)
    assert len(run.walk.weights) == len(expected) == 12
    for step, (mine, theirs) in enumerate(zip(run.walk.weights, expected, strict=True), start=1):
        assert (mine - theirs).abs().max() <= ROUNDING, f"step {step}"
    alone = vector(Run(make, precision="64-true").module)
    assert ((vector(run.module) - alone).abs().max() > 1e-3) == (alpha < 1)


def test_validation_sees_the_fast_weights() -> None:
    run = Run(adan, LookaheadSync(5, 0.5), precision="64-true")
    for epoch in range(3):
        assert torch.equal(run.module.validated[2 * epoch], run.walk.weights[4 * epoch + 3])


def test_steps_are_counted_not_batches() -> None:
    run = Run(adan, LookaheadSync(2, 0.5), precision="64-true", accumulate_grad_batches=2, watch="slow")
    assert len(run.walk.weights) == 6
    synced = [torch.equal(w, s) for w, s in zip(run.walk.weights, run.walk.slots, strict=True)]
    assert synced == [False, True, False, True, False, True]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("step", [2, 4])  # in the middle of an epoch and of a round, and at the end of an epoch
@pytest.mark.parametrize("make", [adan, sgd, adamw])
def test_a_resumed_run_is_the_same_run(make: Make, step: int, precision: str, tmp_path: Path) -> None:
    def saving(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)

    class Rest:
        """A loader that goes on where a run of `step` steps left it."""

        def __init__(self, done: int = 0) -> None:
            self.done = done

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            found = list(batches())[self.done :]
            self.done = 0
            return iter(found)

        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.done = step % 4

    whole = Run(make, LookaheadSync(3, 0.5), saving(tmp_path), train=Rest(), precision=precision)  # type: ignore[arg-type]
    again = saving(tmp_path / "again")
    path = tmp_path / f"step={step}.ckpt"
    rest = Run(make, LookaheadSync(3, 0.5), again, train=Rest(), ckpt_path=path, precision=precision)  # type: ignore[arg-type]
    assert [w.tolist() for w in rest.walk.weights] == [w.tolist() for w in whole.walk.weights[step:]]
    assert torch.equal(slot(rest.trainer.optimizers[0], "slow"), slot(whole.trainer.optimizers[0], "slow"))


def test_averaging_collects_the_synced_weights() -> None:
    run = Run(adan, LookaheadSync(3, 0.5), IterateAveraging(start=3, every=3), precision="64-true")
    synced = torch.stack(run.walk.weights[2::3]).mean(0)
    assert (vector(run.module) - synced).abs().max() <= ROUNDING
    expected = plain_loop(adan, 3, 0.5)
    assert (run.walk.weights[-1] - expected[-1]).abs().max() <= ROUNDING


def test_the_callback_leaves_the_optimizer_as_it_was() -> None:
    for make in (adan, sgd):
        run = Run(make, LookaheadSync(), max_epochs=1)
        optimizer = run.trainer.optimizers[0]
        for _ in range(5):  # after the 4 of the fit, the first of these would be a sync
            for p in run.module.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            assert not torch.equal(vector(run.module), slot(optimizer, "slow"))


TABLE = {  # f(x) = (x1^2 + 4 x2^2) / 2 from (1, 1), k = 2, alpha = 0.5: x and momentum after steps 2, 4, 6 and 8
    "none": [
        (0.86, 0.5, 1.8, 6.0),
        (0.5938, -0.155, 2.844, 5.7),
        (0.280304, -0.46225, 3.11652, 1.635),
        (-0.01137668, -0.3414875, 2.7484416, -2.03775),
    ],
    "reset": [
        (0.86, 0.5, 0.0, 0.0),
        (0.7396, 0.25, 0.0, 0.0),
        (0.636056, 0.125, 0.0, 0.0),
        (0.54700816, 0.0625, 0.0, 0.0),
    ],
    "pullback": [
        (0.86, 0.5, 0.9, 3.0),
        (0.6667, 0.0475, 1.548, 3.675),
        (0.447974, -0.2243125, 1.93131, 2.806875),
        (0.22882153, -0.3016203125, 2.0641032, 1.362046875),
    ],
}


@pytest.mark.parametrize("momentum", TABLE)
@pytest.mark.parametrize("which", ["torch", "reference", "blocked", "auto"])
def test_worked_examples(which: str, momentum: Any) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    if which == "torch":
        optimizer: torch.optim.Optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    else:
        optimizer = SGDW([p], lr=0.1, momentum=0.9, engine=which)
    attach(Lookahead(2, 0.5, momentum, ["momentum_buffer"]), optimizer)
    for step in range(1, 9):
        p.grad = torch.tensor([1.0, 4.0], dtype=torch.float64) * p.detach()
        optimizer.step()
        if step % 2 == 0:
            found = [*p.tolist(), *optimizer.state[p]["momentum_buffer"].tolist()]
            assert found == pytest.approx(TABLE[momentum][step // 2 - 1], abs=1e-12)


@pytest.mark.parametrize("momentum", ["reset", "pullback"])
def test_all_moments_of_an_optimizer_are_treated_and_nothing_else(momentum: Any) -> None:
    """Adan has two, and a previous gradient; also a parameter without a gradient at the sync; also in 8 bits."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(5000, generator=generator)) for _ in range(2)]
    optimizer = Adan(params, lr=0.01, state_bits=8)
    attach(Lookahead(2, 0.5, momentum, ["exp_avg", "exp_avg_diff"]), optimizer)
    for p in params:
        p.grad = torch.randn(5000, generator=generator)
    optimizer.step()
    before = optimizer.state_dict()["state"][1]
    params[0].grad, params[1].grad = torch.randn(5000, generator=generator), None
    optimizer.step()
    after = optimizer.state_dict()["state"]
    for name in ("exp_avg", "exp_avg_diff"):
        if momentum == "reset":
            assert not after[0][name].any()
            assert not after[1][name].any()
        else:  # the slow ones begin at zero; codes of 8 bits are off by a percent of the largest
            size = before[name].abs().max()
            assert (after[1][f"slow_{name}"] - before[name] / 2).abs().max() <= 1e-6 * size
            assert (after[1][name] - before[name] / 2).abs().max() <= 0.02 * size
    for name in ("exp_avg_sq", "prev_grad"):
        assert torch.equal(after[1][name], before[name])
        assert after[0][name].any()


@pytest.mark.parametrize("momentum", ["reset", "pullback"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("make", [adan, sgd, adamw])
def test_moments_and_slow_evaluation_resume(make: Make, precision: Any, momentum: Any, tmp_path: Path) -> None:
    def callbacks(folder: Path) -> Any:
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        return LookaheadSync(3, 0.5, momentum, evaluate="slow"), saving

    whole = Run(make, *callbacks(tmp_path), precision=precision)
    path = tmp_path / "step=4.ckpt"
    rest = Run(make, *callbacks(tmp_path / "again"), ckpt_path=path, precision=precision)
    assert [w.tolist() for w in rest.walk.weights] == [w.tolist() for w in whole.walk.weights[4:]]
    assert torch.equal(vector(rest.module), vector(whole.module))
    fast = Run(make, LookaheadSync(3, 0.5, momentum), precision=precision)
    assert [w.tolist() for w in fast.walk.weights] == [w.tolist() for w in whole.walk.weights]


@pytest.mark.parametrize("weights_only", [False, True])
def test_slow_weights_are_evaluated_and_saved(weights_only: bool, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only)
    run = Run(
        adan, LookaheadSync(5, 0.5, evaluate="slow"), saving, val_check_interval=1, precision="64-true", watch="slow"
    )
    shown = [run.walk.weights[i] if i < 4 else run.walk.slots[i] for i in range(12)]  # the first sync is the fifth step
    for step, expected in enumerate(shown, start=1):
        assert torch.equal(run.module.validated[2 * step - 1], expected)
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(torch.cat([value.reshape(-1) for value in saved.values()]), expected)
    assert torch.equal(vector(run.module), shown[-1])
    assert not torch.equal(run.walk.weights[-1], shown[-1])


@pytest.mark.parametrize("make", [adan, sgd])
def test_an_optimizer_without_a_sync_yet_is_evaluated_as_it_is(make: Make) -> None:
    """Its slow weights are those that the fit began with, which nobody wants to see."""

    def pair(make: Make) -> Pair:
        torch.manual_seed(0)
        return Pair(make, second=4)

    plain, slow = (Run(make, *callbacks, module=pair(make)) for callbacks in ((), (LookaheadSync(5, evaluate="slow"),)))
    own = len(vector(plain.module.net))
    assert torch.equal(vector(slow.module)[own:], vector(plain.module)[own:])
    assert not torch.equal(vector(slow.module)[:own], vector(plain.module)[:own])
    assert torch.equal(slow.module.validated[-1], vector(slow.module))


def test_two_that_choose_what_is_evaluated_are_refused() -> None:
    for callbacks in (
        [LookaheadSync(evaluate="slow"), IterateAveraging()],
        [IterateAveraging(), LookaheadSync(evaluate="slow")],
    ):
        with pytest.raises(OptionError, match=r"both choose the weights.*LookaheadSync\(evaluate='fast'\)"):
            Run(adan, *callbacks)
    for make in (adan, sgd):
        optimizer = make([nn.Parameter(torch.ones(2))])
        attach(Lookahead(), optimizer)
        with pytest.raises(OptionError, match="has a stage named 'lookahead' already"):
            attach(Lookahead(3), optimizer)


def test_moments_that_are_not_there_are_refused() -> None:
    for make in (
        lambda params: torch.optim.SGD(params, lr=0.1),
        lambda params: SGDW(params, lr=0.1, momentum=0.0),
    ):
        with pytest.raises(OptionError, match=r"momentum='reset' finds no first moments in SGDW?"):
            Run(make, LookaheadSync(momentum="reset"))


def test_it_lowers_the_variance_as_the_theory_says() -> None:
    """On x^2 a / 2 with a noisy optimum: the paper's stationary variance, and a fast start without noise beside it."""
    a, s2, lr, k, alpha = 1.3, 0.7, 0.4, 5, 0.5
    r = 1 - lr * a
    sgd_variance = lr**2 * a**2 * s2 / (1 - r**2)
    top = alpha**2 * (1 - r ** (2 * k))
    expected = sgd_variance * top / (top + 2 * alpha * (1 - alpha) * (1 - r**k))
    assert expected == pytest.approx(0.083362875696)
    p = nn.Parameter(torch.zeros(40_000, dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=lr)
    attach(Lookahead(k, alpha), optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20 * k):
        p.grad = a * (p.detach() - s2**0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        optimizer.step()
    assert float(p.detach().var()) == pytest.approx(expected, rel=4 * (2 / len(p)) ** 0.5)  # four standard errors


def test_what_a_person_would_look_at(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    run = Run(adan, LookaheadSync(3), logger=logger, log_every_n_steps=4, precision="64-true", watch="slow")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("lookahead_sync/distance")}
    fast, slow = run.walk.weights, run.walk.slots
    assert found == pytest.approx({s: float((fast[s - 1] - slow[s - 1]).norm() / fast[s - 1].norm()) for s in (5, 11)})


def slow_lookahead() -> LookaheadSync:
    return LookaheadSync(3, 0.5, "pullback", evaluate="slow")


@pytest.mark.parametrize("kind", JOURNEYS)
@pytest.mark.parametrize("make", [adan, sgd])
def test_every_strategy_evaluates_saves_and_resumes_slow_weights(kind: str, make: Make, tmp_path: Path) -> None:
    """To the rounding of float32 in a dozen steps; within one strategy the test of the best is its validation."""
    alone = journey("single", make, slow_lookahead, tmp_path / "alone")
    both = run_ranks(journey, kind, make, slow_lookahead, tmp_path / "whole")
    for whole in both:
        for key in ("train", "val", "test"):
            assert whole[key] == pytest.approx(alone[key], rel=1e-4), key
        assert sum(whole["test"]) / 2 == pytest.approx(whole["best"], rel=1e-6)
    saved = tmp_path / "whole" / "step=4.ckpt"
    for whole, rest in zip(
        both, run_ranks(journey, kind, make, slow_lookahead, tmp_path / "rest", resume=saved), strict=True
    ):
        assert rest["train"] == whole["train"][4:]
        assert rest["val"] == whole["val"][2:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": "halve"}, "momentum='halve' must be 'none', 'reset' or 'pullback'"),
        ({"evaluate": "both"}, "evaluate='both' must be 'fast' or 'slow'"),
        ({"k": 0}, "k=0 must be an integer of at least 1"),
        ({"k": 2.5}, "k=2.5 must be an integer of at least 1"),
        ({"alpha": 0.0}, r"alpha=0.0 must be in \(0, 1\]"),
        ({"alpha": 1.5}, r"alpha=1.5 must be in \(0, 1\]"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"LookaheadSync: {words}"):
        LookaheadSync(**options)


def on_ranks(world_size: int) -> Tensor:
    data = samples()
    sampler: Any = DistributedSampler(data, world_size, 0, shuffle=False)  # every rank sees the same half
    loader: DataLoader[Any] = DataLoader(data, batch_size=4, sampler=sampler)
    strategy: dict[str, Any] = {"strategy": "ddp", "devices": world_size}
    return vector(Run(adan, LookaheadSync(3), train=loader, precision="64-true", **strategy).module)


def test_two_processes_that_see_the_same_stay_the_same() -> None:
    first, second = run_ranks(on_ranks, 2)
    assert torch.equal(first, second)
    data = samples()
    half: Any = DistributedSampler(data, 2, 0, shuffle=False)
    alone = Run(adan, LookaheadSync(3), train=DataLoader(data, 4, sampler=half), precision="64-true")
    assert (vector(alone.module) - first).abs().max() <= ROUNDING
