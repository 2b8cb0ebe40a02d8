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

from lightning_optim import Adan, OptionError
from lightning_optim.callbacks import IterateAveraging, LookaheadSync
from tests.callbacks.toys import Make, Run, Toy, batches, samples, slot, vector
from tests.ranks import run_ranks

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


@pytest.mark.parametrize(
    ("options", "words"),
    [
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
