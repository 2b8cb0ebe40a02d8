"""One model, one stream of batches, and every way to spread them over ranks; what comes out must be the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_optim import OptimizerStrategy
from lightning_optim.core.optimizer import Optimizer

World = Literal["single", "ddp", "fsdp1", "fsdp1 fused", "fsdp2", "hybrid fsdp1", "hybrid fsdp2", "tensor fsdp2"]
STEPS = 5
BATCH = 8
WIDTH = 13  # no number of ranks here divides it


class Wide(nn.Linear):
    """A layer that is sharded by itself; the rest of the model, the tied weight included, is one unit."""


class Odd(nn.Module):
    """Sizes that do not divide, a frozen weight, a tied weight, a branch without gradients, pieces without elements."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inward = Wide(5, WIDTH)
        self.large = Wide(WIDTH, 332)  # 4316 elements: kept in 8 bits where asked for
        self.back = Wide(332, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.square = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.square.weight
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.unused = Wide(3, 2)
        self.out = Wide(WIDTH, 1)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.inward(x)))
        x = x + self.back(torch.relu(self.large(x))) + self.frozen(x)
        return self.out(torch.tanh(self.tied(torch.relu(self.square(x)))))  # type: ignore[no-any-return]


UNITS = ("inward", "large", "back", "unused", "out")


def batches(dtype: torch.dtype, rank: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of the same global batches."""
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64).to(dtype)
        y = x[:, :1].sin() + 0.1 * x[:, 1:2]
        yield x.chunk(size)[rank], y.chunk(size)[rank]


def spread(model: nn.Module, world: World) -> nn.Module:
    """The model as a strategy makes it."""
    if world == "single":
        return model
    size = dist.get_world_size()
    if world == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if "fsdp1" in world:
        mesh = (
            init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
            if "hybrid" in world
            else None
        )
        wrap = functools.partial(
            FullyShardedDataParallel,
            device_id=torch.device("cpu"),
            use_orig_params=world != "fsdp1 fused",
            device_mesh=mesh,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD if mesh is not None else ShardingStrategy.FULL_SHARD,
        )
        if world == "fsdp1 fused":  # it wants what is frozen in a unit of its own
            model.add_module("frozen", wrap(model.get_submodule("frozen")))
        for name in UNITS:
            model.add_module(name, wrap(model.get_submodule(name)))
        return wrap(model)
    if "tensor" in world:
        both = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, both["tensor"], {"large": ColwiseParallel(), "back": RowwiseParallel()})
        mesh = both["data"]
    elif "hybrid" in world:
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    for name in UNITS:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, in full."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {_plain(name): p.detach().clone() for name, p in model.named_parameters()}
    found = {_plain(name): p.detach() for name, p in model.named_parameters()}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for n, p in found.items()}


def _plain(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def train(
    world: World,
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
    accumulate: int = 1,
    watch: Callable[[Optimizer], None] | None = None,
) -> dict[str, Tensor]:
    """The parameters after some steps."""
    model = spread(Odd(dtype), world)
    rank, size = (0, 1) if world == "single" else (dist.get_rank(), dist.get_world_size())
    if world == "tensor fsdp2":  # two ranks share a batch
        rank, size = rank // 2, size // 2
    optimizer = OptimizerStrategy(name, **options).create(model)
    stream = batches(dtype, rank, size)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=dtype)
        for _ in range(accumulate):
            x, y = next(stream)
            loss = nn.functional.mse_loss(model(x), y) / accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        if optimizer.inputs:
            optimizer.set_loss(total)
        return total

    for _ in range(steps):
        optimizer.step(closure)
        if watch is not None:
            watch(optimizer)
    return whole(model)
