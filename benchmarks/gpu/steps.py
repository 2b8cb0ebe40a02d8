"""Whether steps make the host wait for the device, and whether a CUDA graph replays them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setting import Result, Setting
from benchmarks.problems import apply, build, gradients, make_params
from benchmarks.shapes import tiny
from benchmarks.timing import random_params, side_by_side
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer

RECTIFIED = 7  # steps after which RAdam has changed its form


def steps(setting: Setting, name: str) -> Result:
    """Both, for one optimizer: in words what is wrong at each state precision, empty where nothing is."""
    if not setting.on_gpu:
        return {"skipped": "needs a GPU"}
    waits, replays = {}, {}
    for bits, optimizer, params in _at_each_precision(name, setting):
        waits[f"{name}, {bits} bits"] = _said(lambda o=optimizer, p=params: _waits(o, p))
    for bits, _, params in _at_each_precision(name, setting):
        replays[f"{name}, {bits} bits"] = _said(lambda b=bits, p=params: _replayed(name, b, p))
    return {"waits": waits, "replays": replays}


def _said(check: Any) -> str:
    try:
        found: str = check()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    return found


def _at_each_precision(name: str, setting: Setting) -> Iterator[tuple[int, Optimizer, list[Tensor]]]:
    for bits in (32, 8):
        params: list[Tensor] = [
            torch.nn.Parameter(p.detach().to(setting.device)) for p in make_params(tiny(), torch.float32)
        ]
        try:
            optimizer = build(name, params, state_bits=bits, engine="triton")
            apply(optimizer, params, [torch.ones_like(p) for p in params])
        except ValueError:  # nothing to keep in 8 bits, or not served by this engine
            continue
        yield bits, build(name, params, state_bits=bits, engine="triton"), params


def _waits(optimizer: Optimizer, params: Sequence[Tensor]) -> str:
    shapes = [tuple(p.shape) for p in params]
    sets = [[grad.to(params[0].device) for grad in grads] for grads in gradients(2, shapes, torch.float32)]
    loss = torch.ones((), device=params[0].device, dtype=torch.float32)
    try:
        for step in range(RECTIFIED + 2):
            for p, grad in zip(params, sets[step % 2], strict=True):  # gradients move, as they do in training
                p.grad = grad
            if optimizer.inputs:
                optimizer.set_loss(loss)
            if step == RECTIFIED:
                torch.cuda.set_sync_debug_mode("error")
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _replayed(name: str, bits: int, params: Sequence[Tensor], replays: int = 4) -> str:
    """How replayed steps differ from the same steps outside a graph, in any bit, and from those without capturable."""
    lists = [params, *([p.detach().clone().requires_grad_() for p in params] for _ in range(2))]
    try:
        captured, eager = (build(name, ps, capturable=True, state_bits=bits, engine="triton") for ps in lists[:2])
    except ValueError as error:
        return f"refused: {error}"
    plain = build(name, lists[2], state_bits=bits, engine="triton")
    loss = torch.ones((), device=params[0].device, dtype=torch.float32)
    for p in itertools.chain(*lists):
        p.grad = torch.zeros_like(p)

    def step(optimizer: Optimizer) -> None:
        if optimizer.inputs:
            optimizer.set_loss(loss)
        optimizer.step()

    graph = torch.cuda.CUDAGraph()
    for k, grads in enumerate(gradients(RECTIFIED + replays, [tuple(p.shape) for p in params], torch.float32)):
        for ps in lists:
            for p, grad in zip(ps, grads, strict=True):
                assert p.grad is not None
                p.grad.copy_(grad)
        step(plain)
        step(eager)
        if k < RECTIFIED:
            beside(lambda: step(captured))
            continue
        if k == RECTIFIED:
            with torch.cuda.graph(graph):
                step(captured)
        graph.replay()
    torch.cuda.synchronize()
    same, close = (_difference(params, ps) for ps in lists[1:])
    if same:
        return f"parameters differ by {same:.1e} from the same steps outside a graph, after {replays} replays"
    return "" if close <= 1e-5 else f"parameters differ by {close:.1e} from those without capturable"


def beside(call: Callable[[], Any]) -> None:
    """Call a function on a stream beside the current one, as torch asks for before a capture."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)


def _difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(((p - q).abs().max().item() for p, q in zip(one, other, strict=True) if p.numel()), default=0.0)


def replay_times(setting: Setting, which: str) -> Result:
    """Times of steps as they are called and as a graph replays them, side by side on one list of tensors."""
    if not setting.on_gpu:
        return {"skipped": "needs a GPU"}
    params = random_params(setting.lists[which](), torch.float32, setting.device)
    calls: dict[str, Callable[[], Any]] = {}
    for label, options in (
        ("ours, 32 bits", {"engine": "triton"}),
        ("ours, 8 bits", {"engine": "triton", "state_bits": 8}),
        ("torch AdamW fused", {}),
    ):
        make: Any = OPTIMIZERS["adamw"] if options else functools.partial(torch.optim.AdamW, fused=True)
        calls[label] = make(params, lr=1e-4, **options).step
        captured = make(params, lr=1e-4, capturable=True, **options)
        for _ in range(3):
            beside(captured.step)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        calls[f"{label}, replayed"] = graph.replay
    times = side_by_side(calls, setting.device, setting.rounds)
    return {"rows": {label: measured.summary() for label, measured in times.items()}}
