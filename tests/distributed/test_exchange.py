"""Functions of whole matrices end where one process does, however the matrices are spread, and in few messages."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed import exchange
from lightning_optim.distributed.owners import Piece, assign, cost
from lightning_optim.language import Options, Slot, Slots, Value, View, ema, matrix_view, norm, whole
from tests.harness.nets import Odd
from tests.harness.ranks import run_ranks
from tests.harness.worlds import BATCH, World, batches, spread
from tests.harness.worlds import whole as weights

ENGINES = ("reference", "blocked", "compiled")


def product(x: Tensor, y: Tensor, *, share: float) -> Tensor:
    """Each element depends on all elements of both matrices."""
    return share * (x @ y.mT @ x) + y.flip(1)


def squared(x: Tensor) -> Tensor:
    return x @ x.mT @ x


class Spread(Optimizer):
    """A page with two cuts of one level and one behind both; vectors have a rule of their own."""

    lr: float = 0.1
    owners: bool = False

    exp_avg = Slot("m")

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        return matrix_view(shape, blocks={13: [5, 8], 332: 4}.get(shape[0], 1)) if len(shape) > 1 else None

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"matrix": len(shape) > 1}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.exp_avg = m = ema(s.exp_avg, g, 0.5)
        if not h.matrix:
            return p - h.lr * m
        one = whole(product, m, p, share=1.0 / (1.0 + norm(m)))
        other = whole(squared, g)
        return p - h.lr * (0.1 * whole(squared, one / (1.0 + norm(one)) + other) + m)


del OPTIMIZERS["spread"]  # no page of the package


def train(world: World, engine: str, steps: int = 3, **options: Any) -> dict[str, Tensor]:
    """The weights after some steps, two batches each."""
    model = spread(Odd(torch.float64), world)
    mine, size = (0, 1) if world == "single" else (dist.get_rank(), dist.get_world_size())
    optimizer = Spread(model.parameters(), engine=engine, **options)
    stream = batches(torch.float64, mine, size)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            x, y = next(stream)
            ((model(x) - y).square().sum() * size / BATCH / 2).backward()  # parts are not of equal size
        optimizer.step()
    return weights(model)


@functools.cache
def alone() -> dict[str, Tensor]:
    return train("single", "reference")


def everywhere(world: World, engines: tuple[str, ...], **options: Any) -> dict[str, dict[str, Tensor]]:
    dist.init_process_group("gloo")
    return {engine: train(world, engine, **options) for engine in engines}


WORLDS: list[tuple[World, int, dict[str, Any]]] = [
    ("fsdp2", 2, {}),
    ("fsdp2", 3, {}),
    ("fsdp1", 2, {}),
    ("fsdp1", 3, {}),
    ("ddp", 2, {}),
    ("ddp", 3, {"owners": True}),
]


@pytest.mark.parametrize(("world", "ranks", "options"), WORLDS)
def test_shards_end_where_one_process_does(world: World, ranks: int, options: dict[str, Any]) -> None:
    """With rows that do not divide, ranks without an element, a frozen matrix and a branch without gradients."""
    start = weights(Odd(torch.float64))
    for found in run_ranks(everywhere, world, ENGINES, world_size=ranks, **options):
        for engine, got in found.items():
            for name, value in alone().items():
                assert torch.equal(value, start[name]) == name.startswith(("frozen", "unused"))
                torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=f"{engine}, {name}")
