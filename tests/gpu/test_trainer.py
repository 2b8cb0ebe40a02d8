"""A Trainer on a GPU: mixed precision with a gradient scaler, and the report of memory."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import AdamW
from lightning_optim.core.optimizer import Optimizer
from tests.harness.gpu import DEVICE, on_gpu, waiting

pytestmark = on_gpu
QUIET: dict[str, Any] = {
    **{"accelerator": "gpu", "devices": 1, "max_steps": 6, "logger": False, "enable_checkpointing": False},
    **{"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
}


class Net(LightningModule):
    def __init__(self, bits: int = 32, spoiled: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8))
        self.bits, self.spoiled = bits, spoiled

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[0][:, :8])
        return loss * torch.inf if number == self.spoiled else loss

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), lr=0.01, state_bits=self.bits)  # type: ignore[arg-type]


def fit(module: Net, *callbacks: Any, **options: Any) -> Trainer:
    x = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(callbacks=list(callbacks), **{**QUIET, **options})
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=16))
    return trainer


def callback(name: str) -> Any:
    """A callback of the package, which needs what its tables are printed with."""
    pytest.importorskip("rich")
    return getattr(importlib.import_module("lightning_optim.callbacks"), name)()


def optimizer_of(trainer: Trainer) -> Any:
    return trainer.optimizers[0]


@pytest.mark.parametrize("bits", [32, 8])
def test_a_step_that_the_scaler_skips_does_not_count(bits: int) -> None:
    module = Net(bits, spoiled=2)
    trainer = fit(module, precision="16-mixed", gradient_clip_val=1.0)
    counts = {float(state["step"]) for state in optimizer_of(trainer).state.values()}
    assert counts == {5.0}
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_scaler_waits_once_in_a_step() -> None:
    """For whether a gradient overflowed; the step of the optimizer waits for nothing."""
    p = nn.Parameter(torch.ones(4096, device=DEVICE))
    optimizer, scaler = AdamW([p], engine="triton"), torch.amp.GradScaler("cuda")
    waits: list[int] = []
    for step in range(4):
        p.grad = None
        loss: Any = scaler.scale(p.square().sum())
        loss.backward()
        with waiting("warn" if step == 3 else "default") as seen:
            scaler.step(optimizer)
            scaler.update()
        waits.append(sum("synchronizing" in str(one.message) for one in seen))
    assert waits[-1] == 1


@pytest.mark.parametrize("name", ["GradientNoise", "IterateAveraging"])
def test_stages_run_in_the_same_pass(name: str) -> None:
    module = Net()
    trainer = fit(module, callback(name))
    assert {float(state["step"]) for state in optimizer_of(trainer).state.values()} == {6.0}
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_the_report_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Net(8), callback("OptimizerStateMemory"))
    assert "peak of the device" in " ".join(capsys.readouterr().out.split())
