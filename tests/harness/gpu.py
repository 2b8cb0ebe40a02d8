"""What tests on a GPU share: parameters there, gradients in memory that moves or stays, and steps in a graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.core.optimizer import Optimizer
from tests.harness.problems import build, loss_of

DEVICE = torch.device("cuda")
SHAPES = ((64, 70), (5000,), (7,), (0,), (3, 5, 7))
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # what drivers and other versions say is no matter here
]


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Parameters on the GPU, always the same."""
    generator = torch.Generator("cpu").manual_seed(1)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, device="cpu").to(DEVICE, dtype)) for shape in shapes
    ]


def values(params: Sequence[Tensor], step: int) -> list[Tensor]:
    """The gradients of a step."""
    generator = torch.Generator("cpu").manual_seed(100 + step)
    return [(torch.randn(p.shape, generator=generator, device="cpu") * (1 + step % 3)).to(p) for p in params]


def give(params: Sequence[Tensor], step: int, moving: bool = False) -> None:
    """Set gradients, in the memory of those before or in new one."""
    for p, value in zip(params, values(params, step), strict=True):
        if p.grad is None or moving:
            p.grad = value
        else:
            p.grad.copy_(value)


def take(optimizer: Optimizer, params: Sequence[Tensor], steps: int, first: int = 0, moving: bool = False) -> None:
    """Some steps."""
    for step in range(first, first + steps):
        give(params, step, moving)
        if optimizer.inputs:
            optimizer.set_loss(torch.full((), loss_of(step)[0], device=DEVICE))
        optimizer.step()


def made(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Optimizer, list[Tensor]]:
    """An optimizer and its parameters."""
    params = parameters(dtype)
    return build(name, params, **{"engine": "triton", **options}), params


def stream() -> Any:
    """A stream beside the default one."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of what a function does on the device. Nothing of it is done before the first replay."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph


@contextlib.contextmanager
def waiting(mode: str) -> Iterator[list[warnings.WarningMessage]]:
    """What makes the host wait for the device is an error under the mode "error", and recorded under "warn"."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)
        seen.clear()
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def furthest(params: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest distance of two elements."""
    pairs = zip(params, others, strict=True)
    return max(float((p.detach().double() - q.detach().double()).abs().max()) for p, q in pairs if p.numel())


def same_bits(params: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether parameters are equal."""
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
