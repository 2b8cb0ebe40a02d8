"""A callback that joins a training which has begun counts its steps, and serves parameters that join later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn

from lightning_optim import SGDW, AdamW
from lightning_optim.callbacks import (
    GradientNoise,
    IterateAveraging,
    LookaheadSync,
    WarmupFreeSchedule,
)
from tests.harness.data import batches
from tests.harness.modules import Pair, Toy, vector
from tests.harness.trainers import Run, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:The lr scheduler dict", "ignore:.*callbacks used to create", "ignore:.*starts fresh"
)
STEPS = 32  # of 40; an epoch has 4


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02)


def ours(params: Any) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.02)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.02)


def joined(make: Any, callback: Any, tmp_path: Path, module: Any = None) -> Run:
    """The end of a training of 40 steps, of which the first 32 had no callback."""
    before = Run(make, max_epochs=8, module=module and module())
    before.trainer.save_checkpoint(tmp_path / "before.ckpt")
    return Run(make, callback, max_epochs=10, ckpt_path=tmp_path / "before.ckpt", module=module and module())


@pytest.mark.parametrize("make", [torchs, ours, sgd])
@pytest.mark.parametrize(
    ("options", "collected"),
    [
        ({}, 2),  # epochs 9 and 10
        ({"every": 1}, 8),  # from step 30 on
        ({"kind": "ema", "start": 36}, 5),
        ({"every": "epoch", "start": 37}, 1),
        ({"every": 3, "start": 1}, 3),  # steps 34, 37 and 40
    ],
)
def test_an_average_counts_from_the_beginning(make: Any, options: Any, collected: int, tmp_path: Path) -> None:
    run = joined(make, averaging := IterateAveraging(**options), tmp_path)
    assert averaging.state_dict()["counts"] == [collected]
    assert averaging.state_dict()["steps"] == [40]
    if options == {}:
        assert torch.allclose(vector(run.module), torch.stack([run.walk.weights[i] for i in (-5, -1)]).mean(0))


@pytest.mark.parametrize("make", [torchs, ours, sgd])
def test_lookahead_syncs_in_the_steps_of_a_whole_run(make: Any, tmp_path: Path) -> None:
    """The slow weights are not evaluated before the first sync, in step 35."""
    run = joined(make, lookahead := LookaheadSync(k=7, evaluate="slow"), tmp_path)
    assert lookahead.state_dict() == {"steps": [40], "syncs": [1], "swapped": True}
    at_35 = run.walk.weights[34 - STEPS - len(run.walk.weights[: -(40 - STEPS)])]
    assert torch.equal(vector(run.module), at_35)


@pytest.mark.parametrize("make", [torchs, ours, sgd])
def test_noise_is_that_of_the_step(make: Any, tmp_path: Path) -> None:
    class Look(GradientNoise):
        sigmas: list[float]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.sigmas = [*getattr(self, "sigmas", []), self._stages[0].sigma]

    joined(make, noise := Look(eta=1.0, gamma=1.0), tmp_path)
    assert noise.sigmas == pytest.approx([(1 + t) ** -0.5 for t in range(STEPS, 40)])


def test_a_decay_goes_on(tmp_path: Path) -> None:
    joined(ours, schedule := WarmupFreeSchedule("none", decay="linear"), tmp_path)
    assert schedule.state_dict()["steps"] == [40]


@pytest.mark.parametrize("make", [ours, sgd])
def test_two_optimizers_by_hand(make: Any, tmp_path: Path) -> None:
    """Each has its own counter where it keeps one. Otherwise only the sum of their steps is known, and is halved."""
    joined(make, averaging := IterateAveraging("ema"), tmp_path, lambda: Pair(make))
    assert averaging.state_dict()["steps"] == ([40, 20] if make is ours else [32, 28])


class Grows(Toy):
    """Its first layer joins the optimizer after two epochs."""

    def __init__(self, make: Any) -> None:
        torch.manual_seed(0)
        super().__init__(make)
        layers: Any = self.net
        self.backbone = layers[0]
        self.walk: list[Tensor] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.walk.append(self.backbone.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return self.make([p for p in self.parameters() if p.requires_grad])


def grown(make: Any, *callbacks: Callback) -> Grows:
    module = Grows(make)
    growing = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=0.05, verbose=False)
    trainer(growing, *callbacks, max_epochs=4).fit(module, batches(), batches(batch_size=16))
    return module


def plain(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def plain_ours(params: Any) -> torch.optim.Optimizer:
    return SGDW(params, lr=0.1)


@pytest.mark.parametrize("make", [torchs, ours, plain, plain_ours])
def test_the_average_of_a_layer_that_joins(make: Any) -> None:
    module = grown(make, IterateAveraging("mean", start=0, every=1))
    assert not torch.equal(module.walk[0], module.walk[-1])
    assert torch.allclose(module.backbone.weight, torch.stack(module.walk).mean(0), atol=1e-6)


@pytest.mark.parametrize("make", [torchs, ours, plain, plain_ours])
def test_the_slow_weights_of_a_layer_that_joins(make: Any) -> None:
    """They begin at the weights before its first step, and the first sync goes back towards these."""
    fast = grown(make).walk
    slow = grown(make, LookaheadSync(k=10, alpha=0.25)).walk  # it joins after 8 steps
    assert torch.equal(slow[8], fast[8])
    assert torch.allclose(slow[9], fast[7] + 0.25 * (fast[9] - fast[7]), atol=1e-6)


@pytest.mark.parametrize("make", [torchs, ours, plain, plain_ours])
@pytest.mark.parametrize("options", [{}, {"kind": "moments"}, {"clipping": "after"}])
def test_noise_on_a_layer_that_joins(make: Any, options: Any) -> None:
    still, noisy = (grown(make, *noise).walk for noise in ([], [GradientNoise(eta=1.0, gamma=0.0, **options)]))
    assert torch.equal(still[7], noisy[7])
    assert nn.functional.mse_loss(still[-1], noisy[-1]) > 0
