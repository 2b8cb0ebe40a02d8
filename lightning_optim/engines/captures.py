"""What outlives a step on a GPU: what the replays of a captured step read, and tables that several streams read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.step import Batch

REBUILT = (
    "a CUDA graph is being captured, and tables that its kernels read would have to be made on the host, which replays "
    "leave out: {}. Take one step as it will be captured, and capture the next."
)
OTHER_GRADIENTS = "a gradient has another dtype, or lies otherwise in memory, than in the step before"
NO_TABLES = "there are none yet, or a tensor lies so in memory that it is copied in each step"
CHANGED = "it is the first step of a parameter, or a parameter, slot, counter or option has changed since the last one"


def capturing() -> bool:
    """Whether operations are being captured in a CUDA graph instead of run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def kept(batches: Iterable[Batch]) -> list[dict[Any, Any]]:
    """What a captured step over some batches reads besides parameters and slots.

    It must live as long as the graph, while the batches go on with other tables.
    """
    caches = [batch.cache.copy() for batch in batches]
    return [*caches, *(dict(vars(launch)) for cache in caches for launch in _launches(cache))]


def follow_stream(batches: Iterable[Batch], stream: Any) -> None:
    """Let memory that steps on several streams have read be used anew only when all of them have passed it.

    Torch's allocator knows only the stream on which a tensor was made. What a graph reads is kept in any case.
    """
    if capturing():
        return
    for batch in batches:
        streams = batch.cache.setdefault("streams", set())
        streams.add(stream.cuda_stream)
        if len(streams) > 1:
            for tensor in _tensors(batch.cache):
                tensor.record_stream(stream)


def _launches(cache: dict[Any, Any]) -> Iterator[Any]:
    return (launch for value in cache.values() if isinstance(value, tuple) for launch in value[1])


def _tensors(cache: dict[Any, Any]) -> Iterator[Tensor]:
    """The tensors on the device that a cache keeps for kernels."""
    values = [*cache.values()]
    for launch in _launches(cache):
        values += [*vars(launch).values(), *launch.levels]
        values += [x for of in launch.kernels.values() for chunk in of.get("chunks", ()) for x in vars(chunk).values()]
    return (x for x in values if isinstance(x, Tensor) and x.device.type != "cpu")
