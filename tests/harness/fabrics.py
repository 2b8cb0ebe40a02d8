"""Lightning Fabric on CPUs under every strategy, by the words of `tests.harness.strategies`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning.fabric.strategies.fsdp as fabric_fsdp
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.harness.cpu_fsdp import full_states_in_place
from tests.harness.strategies import Kind, shard, world_size


class FabricCPUFSDP(FSDPStrategy):
    """Fabric's `FSDPStrategy` on CPUs, for the reasons that `tests.harness.cpu_fsdp.CPUFSDP` gives."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        kwargs = {**self._fsdp_kwargs, "device_id": torch.device("cpu")}
        whole = FullyShardedDataParallel(module, sharding_strategy=self.sharding_strategy, **kwargs)
        self._fsdp_kwargs.pop("auto_wrap_policy", None)
        return super().setup_module(whole)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _gathering_in_place():
            super().save_checkpoint(*args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with _gathering_in_place():
            return super().load_checkpoint(*args, **kwargs)


@contextmanager
def _gathering_in_place() -> Iterator[None]:
    with mock.patch.object(fabric_fsdp, "_get_full_state_dict_context", full_states_in_place):
        yield


def fabric_of(kind: Kind, unit: type[nn.Module] = nn.Linear) -> Fabric:
    """A Fabric on all ranks; layers of the type `unit` are sharded each by itself."""
    form: Any = kind.split()[-1]
    strategy: Strategy | str = "ddp" if kind == "ddp" else "auto"
    if kind.startswith("fsdp1"):
        strategy = FabricCPUFSDP(state_dict_type=form, auto_wrap_policy={unit})
    elif kind.startswith("fsdp2"):

        def parallelize(module: nn.Module, mesh: Any) -> nn.Module:
            shard(module, unit, mesh["data_parallel"])
            return module

        sharded = form == "sharded"
        strategy = ModelParallelStrategy(parallelize, world_size(), 1, save_distributed_checkpoint=sharded)
    fabric = Fabric(accelerator="cpu", devices=world_size(), strategy=strategy)
    fabric.launch()
    return fabric
