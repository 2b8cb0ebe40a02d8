"""Step times of several optimizers on one device, measured in alternation."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines import native
from lightning_optim.errors import EngineError

VISIT = 0.03  # seconds that one visit to a contender should last


@dataclass(frozen=True)
class Times:
    """Times of steps in milliseconds: as the device sees them, and how long the host takes to ask for one."""

    device: list[float]
    host: list[float]

    def summary(self) -> dict[str, float]:
        ordered = sorted(self.device)
        return {
            "ms": statistics.median(ordered),
            "ms_10": ordered[len(ordered) // 10],
            "ms_90": ordered[(9 * len(ordered)) // 10],
            "host_ms": statistics.median(self.host),
            "steps": len(ordered),
        }


def as_after_many_steps() -> None:
    """Let steps of this package look at tensors as they do on a machine that has taken many."""
    with contextlib.suppress(EngineError):  # no compiler, or no header files
        native.load()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def side_by_side(calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, Times]:
    """Times of calls that alternate: in each round every call is visited for some steps.

    The first step of a visit is not counted, since it finds the caches as another call left them. On a GPU a step lasts
    from one event to the next, so it is the longer of what the device does and what the host needs to ask for it.
    """
    as_after_many_steps()
    times = {label: Times([], []) for label in calls}
    lengths: dict[str, int] = {}
    for _ in range(rounds):
        for label, call in calls.items():
            if label not in lengths:
                lengths[label] = max(2, min(50, round(VISIT / max(_once(call, device), 1e-5))))
            device_ms, host_ms = visit(call, device, lengths[label])
            times[label].device.extend(device_ms)
            times[label].host.extend(host_ms)
    return times


def _once(call: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def visit(call: Callable[[], Any], device: torch.device, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of some steps in a row, on the device and on the host, after one that is not counted."""
    host: list[float] = []
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    synchronize(device)
    call()
    mark()
    for _ in range(steps):
        begin = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - begin))
        mark()
    synchronize(device)
    pairs = list(itertools.pairwise(marks))
    return [a.elapsed_time(b) if device.type == "cuda" else 1e3 * (b - a) for a, b in pairs], host


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of copies of `size` bytes of random numbers from device to device."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = side_by_side({"copy": lambda: target.copy_(source)}, device, rounds=10)["copy"]
    return 2 * size / (1e-3 * statistics.median(times.device))


def launches(call: Callable[[], Any], device: torch.device, calls: int = 5) -> dict[str, Any]:
    """What a call starts on a GPU, by torch's profiler; nothing elsewhere.

    Returns:
        The number of kernels and of copies of the last of some calls, the median over them of the milliseconds that
        kernels and copies run, and the names of the kernels with the milliseconds of each in the last call.
    """
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    call()
    synchronize(device)
    spent: list[float] = []
    events: list[Any] = []
    for _ in range(calls):
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
            synchronize(device)
        events = [event for event in found.events() or () if event.device_type.name == "CUDA"]
        spent.append(sum(1e-3 * event.time_range.elapsed_us() for event in events))
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in events)
    kernels: dict[str, float] = {}
    for event in events:
        kernels[event.name[:80]] = kernels.get(event.name[:80], 0.0) + 1e-3 * event.time_range.elapsed_us()
    return {
        "launches": {"kernels": len(events) - copies, "copies": copies},
        "kernel_ms": statistics.median(spent),
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])[:6]),
    }


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """The bytes that the body has at most beyond those before it, and those that it leaves; nothing off a GPU."""
    found: dict[str, int] = {}
    if device.type != "cuda":
        yield found
        return
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    synchronize(device)
    found["peak"] = torch.cuda.max_memory_allocated(device) - before
    found["left"] = torch.cuda.memory_allocated(device) - before


def random_params(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Parameters with gradients, of random numbers as large as those of a network."""
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: tuple[int, ...], scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    params: list[Tensor] = [torch.nn.Parameter(random(shape, 0.02)) for shape in shapes]
    for p in params:
        p.grad = random(tuple(p.shape), 1e-3)
    return params
