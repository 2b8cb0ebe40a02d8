"""Ranks that do not exist: torch.distributed with a number of ranks, without processes and without messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from lightning_optim.errors import OptionError


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """Inside, torch.distributed says that this process is one of `ranks`. Messages go nowhere and bring nothing.

    Raises:
        OptionError: in a process that has a process group, and where torch was built without torch.distributed.
    """
    if not dist.is_available():
        raise OptionError("estimate_memory: this torch was built without torch.distributed, which sharding needs.")
    if dist.is_initialized():
        raise OptionError(
            "estimate_memory counts on ranks that do not exist, and this process is one of a process group already. "
            "Call it in a process of its own, or before the process group is initialized."
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which registers the backend "fake"

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Clear what DTensor has cached: meshes of other ranks that look the same, with this rank's place in them."""
    from torch.distributed.tensor import debug

    clear = getattr(debug, "_clear_sharding_prop_cache", None)
    if clear is not None:
        clear()


@contextmanager
def meta_as_accelerator(devices: int) -> Iterator[torch.device]:
    """The meta device, inside as a device that FSDP1 takes for an accelerator: it asks `torch.<type>` about it.

    Args:
        devices: Number of devices of a node.
    """
    device = torch.device("meta")
    torch_: Any = torch
    if hasattr(torch_, "meta"):
        yield device
        return
    torch_.meta = SimpleNamespace(current_device=lambda: device, device_count=lambda: devices)
    try:
        yield device
    finally:
        del torch_.meta
