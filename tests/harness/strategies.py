"""Every way to spread a training over ranks, by a word."""

from __future__ import annotations

import functools
import os
from typing import Any, Literal

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.tensor import DTensor

from tests.harness.cpu_fsdp import CPUFSDP

# `full` and `sharded` say how checkpoints are written.
Kind = Literal["single", "ddp", "fsdp1 full", "fsdp1 sharded", "fsdp2 full", "fsdp2 sharded"]
KINDS: tuple[Kind, ...] = ("single", "ddp", "fsdp1 full", "fsdp1 sharded", "fsdp2 full", "fsdp2 sharded")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


@functools.cache  # Lightning takes it out of the environment when a fit is over
def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def strategy_of(kind: Kind, unit: type[nn.Module] = nn.Linear, **options: Any) -> Strategy | str:
    """The strategy on CPUs; layers of the type `unit` are sharded each by itself, and `options` are the strategy's.

    Under FSDP2 a module shards itself, in `configure_model`.
    """
    form: Any = kind.split()[-1]
    if kind == "single":
        return "auto"
    if kind == "ddp":
        return DDPStrategy(**options)
    if kind.startswith("fsdp1"):
        return CPUFSDP(state_dict_type=form, auto_wrap_policy={unit}, **options)
    return ModelParallelStrategy(world_size(), 1, save_distributed_checkpoint=form == "sharded", **options)


def shard(model: nn.Module, unit: type[nn.Module], mesh: Any) -> None:
    """Divide a model as FSDP2 does: each layer of the type by itself, and then the rest; a divided one stays."""
    from torch.distributed.fsdp import fully_shard  # from torch 2.6 on

    if any(isinstance(p, DTensor) and p.device_mesh == mesh for p in model.parameters()):
        return
    for layer in [layer for layer in model.modules() if isinstance(layer, unit)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
