"""Steps under torch's gradient scaler, in a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_optim.core.optimizer import Optimizer
from tests.harness.problems import build


def make(name: str) -> tuple[Optimizer, nn.Parameter, torch.amp.GradScaler]:
    p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    return build(name, [p]), p, torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)


@pytest.mark.parametrize("name", ["adamw", "lamb", "koala_m", "schedule_free_adamw"])
def test_a_step_that_is_skipped_is_no_step(name: str) -> None:
    """Training goes on as if the batch whose gradient overflowed had not been there."""
    ends = []
    for batches in ((1.0, 2.0, float("inf"), 3.0), (1.0, 2.0, 3.0)):
        optimizer, p, scaler = make(name)
        for size in batches:
            optimizer.zero_grad()
            loss = (p * size).square().mean()
            torch.autograd.backward(scaler.scale(loss))
            if optimizer.inputs:
                optimizer.set_loss(loss)
            scaler.step(optimizer)
            scaler.update(8.0)
        assert optimizer.state[p]["step"] == 3
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_gradients_may_be_clipped_before_a_scaled_step() -> None:
    """Optimizers that unscale by themselves, as torch's fused ones do, would be given gradients of another size."""
    optimizer, p, scaler = make("sgd")
    torch.autograd.backward(scaler.scale((p * 100).sum()))
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_([p], 1.0)
    before = p.detach().clone()
    scaler.step(optimizer)
    assert float(norm) == pytest.approx(100 * 12**0.5)
    assert float((p - before).detach().norm()) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-4)
