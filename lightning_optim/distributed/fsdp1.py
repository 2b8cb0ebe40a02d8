"""FSDP1's flat parameters: which flat parameter a parameter lies in, and where."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.distributed.shard import Shard


def is_flattened(p: Tensor) -> bool:
    """Whether FSDP1 made the parameter part of a flat parameter, or it is a flat parameter itself."""
    return getattr(p, "_fsdp_flattened", False)


def is_flat_parameter(p: Tensor) -> bool:
    """Whether the parameter is one of FSDP1's flat parameters, which concatenate several tensors."""
    return is_flattened(p) and flattened(p).shard.is_flat_parameter


@dataclass(frozen=True)
class Flattened:
    """A parameter that FSDP1 flattened: its shard, and the handle that owns the flat parameter."""

    shard: Shard
    handle: weakref.ref[Any]


_flattened = WeakTensorKeyDictionary()


def flattened(p: Tensor) -> Flattened:
    """Look up a parameter that FSDP1 flattened.

    A parameter carries a flag, but no reference to its FSDP module, and that module is not at hand where a user
    writes `LAMB(self.parameters())`. So the handles are searched for among all living objects, once for a model
    (0.2 s). The attributes read here are those that FSDP1's own checkpoints read.

    Raises:
        RuntimeError: where no flat parameter of it is found.
    """
    if p not in _flattened:
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        for thing in gc.get_objects():
            if issubclass(type(thing), FlatParamHandle):  # isinstance would ask proxies for their class; some warn
                _register(thing)
    if p not in _flattened:
        raise RuntimeError(
            f"FSDP1 flattened a parameter of shape {tuple(p.shape)}, and its flat parameter is not found. Was the "
            "model copied or wrapped again after the optimizer was built, or gc.freeze() called? Build the optimizer "
            "in configure_optimizers."
        )
    return _flattened[p]  # type: ignore[no-any-return]


def _register(handle: Any) -> None:
    """Store the shards of all parameters of one flat parameter."""
    flat, reference = handle.flat_param, weakref.ref(handle)
    split = (0, handle.process_group)
    if not handle._use_orig_params:
        numel = torch.Size([sum(flat._numels)])
        splits, rank = ((split,), handle.rank) if handle.uses_sharded_strategy else ((), 0)
        shard = Shard(numel, numel, (rank * flat.numel(),), (flat.numel(),), splits, is_flat_parameter=True)
        _flattened[flat] = Flattened(shard, reference)
        return
    for p, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
        shard = Shard.whole(shape)
        if handle.uses_sharded_strategy:
            start, size = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
            shard = Shard(shape, torch.Size([shape.numel()]), (start,), (size,), (split,))
        _flattened[p] = Flattened(shard, reference)
