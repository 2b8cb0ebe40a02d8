"""Steps on a GPU: what the kernels compute, where the gradients may lie, and what the host does not wait for."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.reports.memory import state_memory
from tests.harness.gpu import DEVICE, furthest, give, made, on_gpu, parameters, same_bits, stream, take, values, waiting
from tests.harness.problems import build

pytestmark = on_gpu

NAMES = ("adamw", "adan", "lion", "lamb", "lars", "radam", "sgdw", "adafactor", "koala_v", "moment_estimation_sgd")
EIGHT = ("adamw", "lion", "lamb", "adan")


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_reference(name: str) -> None:
    """Apart from the last places of roots and sums."""
    optimizer, params = made(name)
    reference, others = made(name, engine="reference")
    take(optimizer, params, 3)
    take(reference, others, 3)
    assert furthest(params, others) < 1e-5


@pytest.mark.parametrize("name", EIGHT)
def test_steps_with_codes_are_those_of_the_reference(name: str) -> None:
    """One code more or less, where a value lies between two, moves an element by a part of the learning rate."""
    optimizer, params = made(name, state_bits=8)
    reference, others = made(name, state_bits=8, engine="reference")
    take(optimizer, params, 4)
    take(reference, others, 4)
    assert furthest(params, others) < 1e-3
    away = sum(int(((p - q).abs() > 1e-5).sum()) for p, q in zip(params, others, strict=True))
    assert away <= sum(p.numel() for p in params) // 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    optimizer, params = made("adamw", dtype)
    reference, others = made("adamw", dtype, engine="reference")
    take(optimizer, params, 3)
    take(reference, others, 3)
    assert furthest(params, others) <= 4 * torch.finfo(dtype).eps


def test_auto_is_triton_here() -> None:
    optimizer, params = made("adamw", engine="auto")
    take(optimizer, params, 1)
    (engine,) = {engine.name for engine in optimizer._runner.cached["update"].engines.values()}
    assert engine == "triton"


@pytest.mark.parametrize("bits", [32, 8])
def test_gradients_in_buckets(bits: int) -> None:
    """As DDP has them: views of one buffer, few of them at multiples of 16 bytes."""
    optimizer, params = made("adamw", state_bits=bits)
    twin, others = made("adamw", state_bits=bits)
    bucket = torch.zeros(sum(p.numel() for p in params) + len(params), dtype=torch.float32, device=DEVICE)
    start = 1
    for p in params:
        p.grad = bucket[start : start + p.numel()].view(p.shape)
        start += p.numel() + 1
    take(optimizer, params, 3)
    take(twin, others, 3)
    assert same_bits(params, others)


@pytest.mark.parametrize("bits", [32, 8])
def test_channels_last(bits: int) -> None:
    shape = (16, 32, 3, 3)
    plain = torch.nn.Parameter(torch.randn(shape, device=DEVICE))
    turned = torch.nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    for p in (plain, turned):
        reference = torch.nn.Parameter(p.detach().clone())
        one = build("adamw", [p], state_bits=bits, engine="triton")
        other = build("adamw", [reference], state_bits=bits, engine="reference")
        for step in range(3):
            (grad,) = values([plain], step)
            p.grad = grad.to(memory_format=torch.channels_last if p is turned else torch.contiguous_format)
            reference.grad = p.grad.clone()
            one.step()
            other.step()
        assert p.stride() == reference.stride()
        assert furthest([p], [reference]) < (1e-5 if bits == 32 else 1e-3)
    if bits == 32:
        assert furthest([plain], [turned]) < 1e-6


def test_everything_is_made_where_the_default_device_is_cuda() -> None:
    with torch.device(DEVICE):
        params = [torch.nn.Parameter(torch.ones(70, 64)), torch.nn.Parameter(torch.ones(7))]
        optimizers = [build(name, params, engine="triton") for name in ("adamw", "lamb", "adafactor")]
        for optimizer in optimizers:
            take(optimizer, params, 2)
            take(optimizer, params, 2, moving=True)
    assert all(torch.isfinite(p).all() for p in params)


WAITS: dict[str, Any] = {"adamw": {}, "lamb": {}, "adafactor": {}, "radam": {}, "adan": {"state_bits": 8}, "nadam": {}}
WAITS |= {"koala_v": {}, "koala_m": {}, "scalar_rmsprop": {}, "moment_estimation_sgd": {"scope": "tensor"}}


@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits_for_nothing(name: str) -> None:
    optimizer, params = made(name, **WAITS[name])
    take(optimizer, params, 8)
    moved = [values(params, step) for step in range(2)]
    loss = torch.ones((), device=DEVICE)
    with waiting("error"):
        for grads in moved:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            if optimizer.inputs:
                optimizer.set_loss(loss)
            optimizer.step()


def test_a_side_stream() -> None:
    """Steps go into the stream of the moment; tables that a step has made serve the next on another."""
    optimizer, params = made("lamb")
    twin, others = made("lamb")
    take(twin, others, 6)
    streams = [stream(), torch.cuda.current_stream(), stream()]
    for step in range(6):
        chosen = streams[step % 3]
        for other in streams:
            chosen.wait_stream(other)
        with torch.cuda.stream(chosen):
            take(optimizer, params, 1, first=step, moving=step > 3)
    torch.cuda.synchronize()
    assert same_bits(params, others)


def bytes_of_state(bits: int) -> int:
    params = parameters(shapes=((1024, 1024),))
    optimizer = build("adamw", params, state_bits=bits, engine="triton")
    give(params, 0)
    gc.collect()  # what tests before have left, which could be freed meanwhile
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    reported = sum(entry.bytes for entry in state_memory(optimizer) if entry.slot != "step")
    taken = torch.cuda.memory_allocated() - before
    assert abs(taken - reported) < 64 * 1024  # tables are small
    return taken


def test_eight_bits_take_a_quarter_of_the_memory() -> None:
    assert bytes_of_state(8) < 0.27 * bytes_of_state(32)


@pytest.mark.parametrize(("name", "options"), [("adamw", {}), ("adamw", {"state_bits": 8}), ("koala_v", {})])
def test_a_state_dict_travels_between_devices(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    """Through a file, to a CPU and back: training goes on bit for bit."""
    optimizer, params = made(name, **options)
    take(optimizer, params, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    on_cpu = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    there = build(name, on_cpu, **options)
    there.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu"))
    torch.save(there.state_dict(), tmp_path / "back.pt")
    again = [torch.nn.Parameter(p.detach().to(DEVICE)) for p in on_cpu]
    back = build(name, again, engine="triton", **options)
    back.load_state_dict(torch.load(tmp_path / "back.pt", map_location="cpu"))
    take(optimizer, params, 2, first=3)
    take(back, again, 2, first=3)
    assert same_bits(params, again)


def test_parameters_on_two_devices() -> None:
    """A CPU and a GPU in one optimizer: each is served where it is."""
    params: list[Tensor] = [*parameters(shapes=((40, 40),)), torch.nn.Parameter(torch.ones(5))]
    optimizer = OPTIMIZERS["adamw"](params)
    take(optimizer, params, 3)
    assert all(torch.isfinite(p).all() for p in params)
