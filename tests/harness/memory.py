"""Bytes of an optimizer's state by walking over what it keeps; shares nothing with the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lightning_optim import create_optimizer
from tests.harness.modules import Make


def ours(spec: Any) -> Make:
    return lambda params: create_optimizer(spec, params)


def by_hand(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that the optimizer keeps, whatever it is called."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    kept += [value for group in optimizer.param_groups for key, value in group.items() if key != "params"]
    tensors = [value for value in kept if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def storages(thing: Any) -> Iterator[torch.UntypedStorage]:
    """All memory behind an object, whatever it is made of. Shares nothing with the report."""
    if isinstance(thing, torch.Tensor):
        yield (thing.to_local() if isinstance(thing, DTensor) else thing).untyped_storage()
    elif isinstance(thing, Mapping):
        for item in thing.values():
            yield from storages(item)
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from storages(item)
    elif hasattr(thing, "__dict__"):
        yield from storages(vars(thing))


def by_walk(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the memory behind the optimizer's state, each piece once."""
    kept = [dict(optimizer.state), *({k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups)]
    found = {storage.data_ptr(): storage.nbytes() for thing in kept for storage in storages(thing)}
    return sum(size for place, size in found.items() if place)
