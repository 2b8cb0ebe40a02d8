"""Small values over all ranks: means, flags, objects. In a single process each is the value itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a small tensor over all ranks.

    Ranks see different batches. So the loss that an update reads must be averaged, or replicas drift apart.
    """
    if is_alone() or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    there = values.to("cuda" if dist.get_backend() == "nccl" else values.device, copy=True)
    dist.all_reduce(there)
    return there.to(values.device) / dist.get_world_size()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. All ranks must call it."""
    return any(gathered(flag))


def gathered(value: T) -> list[T]:
    """The value of each rank, in rank order; any small picklable object. All ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


_alone: ContextVar[bool] = ContextVar("alone", default=False)  # each thread has its own


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, `mean_over_ranks` returns this rank's own value: the other ranks do not run this code."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def is_alone() -> bool:
    """Whether this is inside `alone`."""
    return _alone.get()
