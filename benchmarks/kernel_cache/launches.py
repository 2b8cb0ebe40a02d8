"""The launches that `benchmarks.gpu` makes, made on CPU tensors while a stand-in for a GPU compiles them."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernel_checks
from benchmarks.contenders import SHARED, ours
from benchmarks.kernel_cache.driver import stand_in
from benchmarks.kernel_cache.entries import Entries
from benchmarks.problems import apply, build, gradients, make_params
from benchmarks.ranks import on_ranks
from benchmarks.shapes import tiny
from benchmarks.two_ranks import train_cases
from lightning_optim import AdamW
from lightning_optim.core.optimizer import OPTIMIZERS

CPU = torch.device("cpu")
STEPS = 8  # by when RAdam has changed its form
# Like those of GPT-2: matrices that are kept in codes at 8 bits, and vectors that are not.
LIST = ((500, 768), (64, 128), (768,), (1000,))
MANY_TILES = ((50257, 768), *LIST)  # for an optimizer whose sums over so many may take kernels of their own


def jobs(names: Sequence[str]) -> list[tuple[str, str]]:
    """All that has to be launched, most telling first: what, and the optimizer."""
    raced = [name for name in kernel_checks.RACED if name in names]
    others = [name for name in names if name not in kernel_checks.RACED]
    found = [(what, name) for what in ("race", "steps") for name in raced]
    found += [("checks", name) for name in raced] + [("ranks", "")]
    return found + [(what, name) for name in others for what in ("steps", "checks")]


def compiled(what: str, name: str) -> tuple[Entries, float, list[str]]:
    """Do a job in a process of its own.

    Returns:
        The entries that it asked for, the seconds it took, and what failed. A failure leaves out some entries.
    """
    begin = time.perf_counter()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entries = Entries() if what == "ranks" else stand_in()
    with torch.no_grad():
        failed = [
            why for label, call in CALLS[what](name, entries) if (why := _failure(f"{what} {name} {label}", call))
        ]
    return entries, time.perf_counter() - begin, failed


def _failure(label: str, call: Callable[[], Any]) -> str:
    """How a call failed; empty where it did not. The other cases are compiled all the same."""
    try:
        call()
    except Exception as error:
        return f"{label}: {type(error).__name__}: {str(error)[:200]}"
    return ""


Calls = list[tuple[str, Callable[[], Any]]]


def _race(name: str, _: Entries) -> Calls:
    """Contenders of races; those of AdamW also with parameters in bfloat16, and as they are replayed from a graph."""
    makes: dict[str, Callable[..., Any]] = {one.label: one.make for one in ours(name)} if name in SHARED else {}
    shapes = MANY_TILES if name == "lamb" else LIST
    found: Calls = [(label, functools.partial(_steps_on_list, make, shapes=shapes)) for label, make in makes.items()]
    if name == "adamw":
        for label, make in makes.items():
            found.append((f"{label}, bfloat16", functools.partial(_steps_on_list, make, torch.bfloat16)))
        for bits, capturable in itertools.product((32, 8), (False, True)):
            make = functools.partial(AdamW, lr=1e-4, engine="triton", state_bits=bits, capturable=capturable)
            found.append((f"{bits} bits, capturable={capturable}", functools.partial(_steps_on_list, make)))
    return found


def _steps_on_list(
    make: Callable[..., Any], dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = LIST
) -> None:
    params: list[Tensor] = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=CPU)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = make(params)
    for _ in range(STEPS):
        optimizer.step()


def _steps(name: str, _: Entries) -> Calls:
    """Steps with the options by default, also under `capturable`, and with a loss on the device where it is read."""
    capturable = (False, True) if "capturable" in OPTIMIZERS[name].options else (False,)
    return [
        (f"{bits} bits, capturable={there}", functools.partial(_default_steps, name, bits, there))
        for bits, there in itertools.product((32, 8), capturable)
    ]


def _default_steps(name: str, bits: int, capturable: bool) -> None:
    params: list[Tensor] = [torch.nn.Parameter(p.detach()) for p in make_params(tiny(), torch.float32)]
    options: dict[str, Any] = {"capturable": True} if capturable else {}
    try:
        optimizer = build(name, params, state_bits=bits, engine="triton", **options)
        apply(optimizer, params, [torch.ones_like(p) for p in params])
    except ValueError:  # nothing to keep in 8 bits, or not served by this engine, or not under capturable
        return
    optimizer = build(name, params, state_bits=bits, engine="triton", **options)
    for grads in gradients(STEPS, [tuple(p.shape) for p in params], torch.float32):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        if optimizer.inputs:
            optimizer.set_loss(torch.ones((), dtype=torch.float32, device=CPU))
        optimizer.step()


def _checks(name: str, _: Entries) -> Calls:
    def check() -> None:
        failed = kernel_checks.check_optimizer(name, str(CPU)).get("failed", {})  # nothing runs, so all differs
        broken = [f"{case}: {why[0]}" for case, why in failed.items() if "Error" in why[0]]
        if broken:
            raise RuntimeError("; ".join(broken))

    return [("", check)]


def _ranks(_: str, entries: Entries) -> Calls:
    return [("two ranks", lambda: entries.add([on_ranks(2, entries_of_a_rank)]))]


def entries_of_a_rank() -> Entries:
    """What the training of `benchmarks.two_ranks` asks for."""
    entries = stand_in()
    with torch.enable_grad(), tempfile.TemporaryDirectory() as folder:
        train_cases("cpu", "triton", 0, math.inf, Path(folder, "found"))
    return entries


CALLS: dict[str, Callable[[str, Entries], Calls]] = {"race": _race, "steps": _steps, "checks": _checks, "ranks": _ranks}
