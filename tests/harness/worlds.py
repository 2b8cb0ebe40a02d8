"""One model, one stream of batches, and every way to spread them over ranks; what comes out must be the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_optim import OptimizerStrategy
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.names import plain_name
from tests.harness.nets import Odd, Wide
from tests.harness.strategies import shard

World = Literal["single", "ddp", "fsdp1", "fsdp1 fused", "fsdp2", "hybrid fsdp1", "hybrid fsdp2", "tensor fsdp2"]
STEPS = 5
BATCH = 8


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
        for name, layer in [(name, layer) for name, layer in model.named_children() if isinstance(layer, Wide)]:
            model.add_module(name, wrap(layer))
        return wrap(model)
    if "tensor" in world:
        both = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, both["tensor"], {"large": ColwiseParallel(), "back": RowwiseParallel()})
        mesh = both["data"]
    elif "hybrid" in world:
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    shard(model, Wide, mesh)
    return model


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, in full."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {_plain(name): p.detach().clone() for name, p in model.named_parameters()}
    found = {_plain(name): p.detach() for name, p in model.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.clone() for n, p in found.items()}


def _plain(name: str) -> str:
    return plain_name(name).removeprefix("module.")


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
    mine, size = (0, 1) if world == "single" else (dist.get_rank(), dist.get_world_size())
    if world == "tensor fsdp2":  # two ranks share a batch
        mine, size = mine // 2, size // 2
    optimizer = OptimizerStrategy(name, **options).create(model)
    stream = batches(dtype, mine, size)

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
