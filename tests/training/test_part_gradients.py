"""What hooks see of each rank's own gradient, on every way to spread a model, against gradients by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lightning_optim.training.gradient_parts import over_ranks
from lightning_optim.training.part_gradients import PartGradients
from tests.harness.nets import Odd
from tests.harness.ranks import run_ranks
from tests.harness.worlds import World, batches, spread

WORLDS: list[World] = ["ddp", "fsdp1", "fsdp1 fused", "fsdp2", "hybrid fsdp1", "tensor fsdp2"]
STEPS = 2


def loss_of(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    outputs: torch.Tensor = model(batch[0])
    return (outputs - batch[1]).square().mean()


def by_hand(ranks: int) -> tuple[float, float]:
    """The sum of the squared norms over ranks and batches, and the squared norm of the mean."""
    model, gradients = Odd(), []
    params = [p for p in model.parameters() if p.requires_grad]
    for rank in range(ranks):
        found = batches(torch.float64, rank, ranks)
        for _ in range(STEPS):
            grads = torch.autograd.grad(loss_of(model, next(found)), params, allow_unused=True)
            gradients.append(torch.cat([g.reshape(-1) for g in grads if g is not None]))
    return float(sum(g.square().sum() for g in gradients)), float((sum(gradients) / ranks).square().sum())  # type: ignore[union-attr]


def seen(world: World) -> tuple[float, float, int, str]:
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    model = spread(Odd(), world)
    params = [p for p in model.parameters() if p.requires_grad]
    parts = PartGradients(model, fresh=False)
    found = batches(torch.float64, dist.get_rank(), size)
    for _ in range(STEPS):
        loss_of(model, next(found)).backward()  # type: ignore[no-untyped-call]
    measured = over_ranks(parts, params, [2] * STEPS, 1.0, 1.0)
    parts.detach()
    return measured.small, measured.square, measured.parts, measured.refusal


@pytest.mark.parametrize("world", ["hybrid fsdp2", *(pytest.param(world, marks=pytest.mark.full) for world in WORLDS)])
def test_sums_are_those_of_all_ranks(world: World) -> None:
    ranks = 4 if "hybrid" in world or "tensor" in world else 2
    for small, square, parts, refusal in run_ranks(seen, world, world_size=ranks):
        if world == "tensor fsdp2":
            assert "tensor parallel" in refusal
            continue
        assert not refusal
        assert parts == ranks * STEPS
        exact_small, exact_square = by_hand(ranks)
        assert small == pytest.approx(exact_small, rel=1e-9)
        assert square == pytest.approx(exact_square, rel=1e-9)
