"""Steps that a CUDA graph captures and replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim import AdamW
from tests.harness.gpu import DEVICE, captured, give, made, on_gpu, same_bits, stream, take
from tests.harness.problems import loss_of

pytestmark = on_gpu

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adamw-8": ("adamw", {"state_bits": 8}),
    "lamb": ("lamb", {}),
    "lars": ("lars", {}),
    "radam": ("radam", {}),
    "adafactor": ("adafactor", {}),
    "koala_m": ("koala_m", {}),
    "scheduled": ("schedule_free_adamw", {"warmup_steps": 4}),
    "prodigy": ("prodigy", {}),
}


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moved"])
@pytest.mark.parametrize("case", CASES)
def test_replays_go_on_bit_for_bit(case: str, moving: bool) -> None:
    """With another learning rate each time, and with steps outside the graph in between."""
    name, options = CASES[case]
    optimizer, params = made(name, capturable=True, **options)
    twin, others = made(name, capturable=True, **options)
    rates = []
    for one in (optimizer, twin):
        rates.append(torch.tensor(0.01, dtype=torch.float64, device=DEVICE))
        one.param_groups[0]["lr"] = rates[-1]
    take(optimizer, params, 3)
    take(twin, others, 3)
    loss = torch.zeros((), device=DEVICE)
    if optimizer.inputs:
        optimizer.set_loss(loss)
    if moving:
        for p in params:
            p.grad = torch.empty_like(p)
    graph = captured(optimizer.step)
    grads = [p.grad for p in params]
    for step in range(3, 11):
        for rate in rates:
            rate.fill_(0.01 * (1 + step % 3))
        if step == 7:  # outside the graph, with gradients elsewhere
            take(optimizer, params, 1, first=step, moving=True)
        else:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            give(params, step)
            loss.fill_(loss_of(step)[0])
            graph.replay()
        take(twin, others, 1, first=step)
    torch.cuda.synchronize()
    assert same_bits(params, others)
    assert all(float(optimizer.state[p]["step"]) == 11 for p in params)


def test_a_whole_training_step_in_a_graph() -> None:
    """As torch's own page on graphs has it: warm up on a side stream, capture with gradients of None, replay."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 8)).to(DEVICE)
    optimizer = AdamW(model.parameters(), lr=0.01, capturable=True)
    x, y = torch.randn(32, 64, device=DEVICE), torch.randn(32, 8, device=DEVICE)

    def train() -> Any:
        optimizer.zero_grad()
        loss: Any = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    side = stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss = train()
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.clone())
    assert float(losses[-1]) < 0.8 * float(losses[0])


def test_a_graph_survives_what_comes_after_it() -> None:
    """Steps with other options, for which all tables are made anew, and memory that others fill."""
    optimizer, params = made("adamw", capturable=True)
    twin, others = made("adamw", capturable=True)
    for one, them in ((optimizer, params), (twin, others)):
        take(one, them, 2)
    graph = captured(optimizer.step)
    for one, them in ((optimizer, params), (twin, others)):
        usual, one.param_groups[0]["betas"] = one.param_groups[0]["betas"], (0.8, 0.9)
        take(one, them, 2, first=2)
        one.param_groups[0]["betas"] = usual
    filler = [torch.full((1 << k,), 7, device=DEVICE) for k in range(4, 16) for _ in range(8)]
    for step in (4, 5):
        give(params, step)
        graph.replay()
        take(twin, others, 1, first=step)
    torch.cuda.synchronize()
    assert same_bits(params, others)
    assert {float(optimizer.state[p]["step"]) for p in params} == {6.0}
    del filler


@pytest.mark.parametrize("options", [{"capturable": True}, {}], ids=["first", "host"])
def test_what_cannot_be_captured_says_so(options: dict[str, Any]) -> None:
    """The first step, and one of an optimizer that counts on the host. The optimizer goes on outside."""
    optimizer, params = made("adamw", **options)
    take(optimizer, params, 0 if options else 2)
    give(params, 2)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        captured(optimizer.step)
    torch.cuda.synchronize()
    take(optimizer, params, 2, first=3)
    assert all(torch.isfinite(p).all() for p in params)
