"""A look that fails says why once, leaves no trace either, and training goes on."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim.callbacks import CurvatureMonitor, GradientNoiseScale, LocalGeometry, StationarityMonitor
from tests.harness.data import batches, samples
from tests.harness.modules import Made
from tests.harness.trainers import trainer


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


class Random(Made):
    def __init__(self) -> None:
        super().__init__(lambda params: torch.optim.SGD(params, lr=0.1), net)


class Sparse(Random):
    """An embedding whose gradient is sparse, which few functions take."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4, sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(self.words((inputs[:, 0] > 0).long()))


class Direct(Random):
    """Goes backward by itself, so that the loss that it returns has no graph any more."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> Tensor:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss


class Training(Random):
    """Raises in another mode than that of training."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        if not self.net.training:
            raise KeyError("mode")
        return super().training_step(batch, index)


class Frozen(Random):
    """Has no parameter to train, and no loss."""

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        return None

    def configure_optimizers(self) -> Any:
        return super(Random, self.requires_grad_(False)).configure_optimizers()


def looks() -> list[Callback]:
    curvature = [CurvatureMonitor(every_n_steps=2, steps=3), LocalGeometry(every_n_steps=2, probes=2)]
    return [*curvature, StationarityMonitor(window=64, batches=8), GradientNoiseScale(every=1)]


def run(kind: type[Random], loader: DataLoader[Any], callbacks: list[Callback]) -> tuple[list[Any], list[str]]:
    torch.manual_seed(1)
    random.seed(1)
    module = kind()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(*callbacks, max_epochs=2, limit_val_batches=0).fit(module, loader)
    names = tuple(type(callback).__name__ for callback in callbacks)
    said = [str(w.message) for w in caught if any(name in str(w.message) for name in names)]
    return [*module.state_dict().values(), torch.rand(3), torch.tensor(random.random())], said


@pytest.mark.parametrize(
    ("kind", "loader", "words"),
    [
        (Sparse, batches(shuffle=True), []),
        (Direct, batches(shuffle=True), ["self.manual_backward(loss)"] * 3 + ["one batch size only"]),
        (Training, batches(shuffle=True), ["cannot look at step 0: KeyError: 'mode'. Training goes on."] * 2),
        (Frozen, batches(), ["no parameter is trained"] * 3 + ["no loss with a gradient"]),
        (Random, DataLoader(samples(4), batch_size=2, shuffle=True), ["half of a batch cannot be run. ValueError"]),
    ],
)
def test_a_failed_look_is_said_once_and_leaves_no_trace(
    kind: type[Random], loader: DataLoader[Any], words: list[str]
) -> None:
    (with_it, said), (without, _) = run(kind, loader, looks()), run(kind, loader, [])
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert all(word in one for word, one in zip(words, sorted(said, key=_order), strict=True)), said


def _order(said: str) -> bool:
    return "GradientNoiseScale" in said
