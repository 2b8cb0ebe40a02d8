"""FSDP1 (`FullyShardedDataParallel`) without a GPU, which Lightning and torch refuse as they are.

FSDP2 needs none of this: `ModelParallelStrategy` and `fully_shard` run on CPUs with gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import lightning.pytorch.strategies.fsdp as lightning_fsdp
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

_GATHER = "_get_full_state_dict_context"  # private: where a Lightning has none, there is nothing to replace


class CPUFSDP(FSDPStrategy):
    """`FSDPStrategy` on CPUs; takes the same arguments. Three things stand in the way:

    Lightning refuses the strategy by its exact type, which a subclass does not have. It passes the index of
    the device, which a CPU lacks, where FSDP wants the device: so the model is wrapped here. And to gather
    full states it asks for a copy on the CPU; of tensors that are there already, FSDP makes none and then
    frees the original, and the process crashes: so full states are gathered in place.
    """

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if not any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            model = FullyShardedDataParallel(
                model,
                cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=torch.device("cpu"),
                **self.kwargs,
            )
            self.kwargs.pop("auto_wrap_policy", None)  # done, and Lightning warns of it on a wrapped model
        return super()._setup_model(model)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with _gathering_in_place():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        with _gathering_in_place():
            return super().optimizer_state(optimizer)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with _gathering_in_place():
            return super().load_checkpoint(*args, **kwargs)


@contextmanager
def _gathering_in_place() -> Iterator[None]:
    if not hasattr(lightning_fsdp, _GATHER):
        yield
        return
    with mock.patch.object(lightning_fsdp, _GATHER, full_states_in_place):
        yield


def full_states_in_place(module: nn.Module, world_size: int, rank0_only: bool = True) -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )
    return context
