"""Compares every kernel with the reference engine on its device, one step at a time.

Both engines start each step from the same bits, those of the reference. So the comparison covers one step, and not the
growth of errors. On a GPU, torch contracts products and sums in its own kernels, and exponentials and logarithms differ
in the last digit. So kernels cannot match bit for bit there; tests on the CPU require it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import apply, build, gradients, make_params
from lightning_optim import OptionError, engines, storage
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.stages import Average, Lookahead
from lightning_optim.storage import Quantized

SHAPES = ((0,), (1,), (7,), (255,), (257,), (64, 64), (5000,), (3, 1400), (20, 30))  # the last one turned
SMALL = ((0,), (7,), (257,), (3, 1400))
STORAGES = ((32, "log"), (16, "log"), (8, "log"), (8, "dynamic"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS = 3
FLIPPED = 0.01  # share of codes that may be rounded to the neighbour, or drawn otherwise where a logarithm differs


@dataclass(frozen=True)
class Case:
    """One kernel."""

    optimizer: str
    bits: int
    form: str
    dtype: torch.dtype
    staged: bool

    def __str__(self) -> str:
        kept = f"{self.bits} bits, {self.form}" if self.bits == 8 else f"{self.bits} bits"
        stages = ", with stages" if self.staged else ""
        return f"{self.optimizer}, {kept}, {str(self.dtype).removeprefix('torch.')}{stages}"


def cases(name: str, quick: bool = False) -> list[Case]:
    """The kernels of an optimizer: all types and storages, and each storage with stages in the same pass."""
    cls = OPTIMIZERS[name]
    quantized = any(storage.can_be_quantized(slot) for slot in cls.slots.values())
    found = []
    for i, (bits, form) in enumerate(STORAGES):
        if bits == 8 and not quantized:
            continue
        plain = [Case(name, bits, form, dtype, staged=False) for dtype in DTYPES]
        found += [plain[i % len(plain)]] if quick else plain
        found += [] if quick and bits != 8 else [Case(name, bits, form, torch.bfloat16, staged=True)]
    return found


def check_optimizer(name: str, device: str, quick: bool = False) -> dict[str, Any]:
    """What came of all cases of an optimizer: how many, how many seconds, and what failed."""
    begin = time.perf_counter()
    failed: dict[str, list[str]] = {}
    done = cases(name, quick)
    for case in done:
        try:
            problems = list(check(case, torch.device(device), SMALL if quick else SHAPES))
        except OptionError as error:
            programs = _build(case, _params(case, ((3, 4),), device), "auto").first_programs()
            if engines.ENGINES["triton"].refusal(programs, []):
                return {"not served": str(error)}
            problems = [str(error)]
        except Exception as error:
            problems = [f"{type(error).__name__}: {str(error)[:500]}"]
        if problems:
            failed[str(case)] = problems[:5]
    return {"cases": len(done), "failed": failed, "seconds": round(time.perf_counter() - begin, 1)}


def check(case: Case, device: torch.device, shapes: Sequence[tuple[int, ...]]) -> Iterator[str]:
    """What differs by more than it may, in words."""
    params, twins = _params(case, shapes, device), _params(case, shapes, device)
    by_reference, by_kernel = _build(case, params, "reference"), _build(case, twins, "triton")
    sizes = [tuple(p.shape) for p in params]
    for step, grads in enumerate(gradients(STEPS, sizes, case.dtype)):
        before = [p.detach().clone() for p in params]
        moved = [grad.to(device) for grad in grads]
        apply(by_reference, params, moved, step)
        apply(by_kernel, twins, moved, step)
        for p, twin, old in zip(params, twins, before, strict=True):
            one, other = by_reference.state[p], by_kernel.state[twin]
            for problem in (*_parameter(p, twin, old), *_slots(one, other)):
                yield f"step {step + 1}, shape {tuple(p.shape)}: {problem}"
            with torch.no_grad():
                twin.copy_(p)
            _equalize(one, other)
        for slot, value in by_reference.shared_slots().items():
            own = by_kernel.shared_slots()[slot]
            if not torch.allclose(value, own, rtol=1e-9, atol=0):
                yield f"step {step + 1}: {slot} is {own.item()}, not {value.item()}"
            own.copy_(value)


def _params(case: Case, shapes: Sequence[tuple[int, ...]], device: torch.device | str) -> list[Tensor]:
    params: list[Tensor] = [torch.nn.Parameter(p.detach().to(device)) for p in make_params(shapes, case.dtype)]
    turned = params[-1].detach().t().contiguous().t()  # not contiguous
    buffer = torch.zeros(1001, device=device, dtype=case.dtype)
    shifted = buffer[1:].copy_(torch.linspace(-1, 1, 1000))  # begins between multiples of 16 bytes
    return [*params[:-1], torch.nn.Parameter(turned), torch.nn.Parameter(shifted)]


def _build(case: Case, params: Sequence[Tensor], engine: str) -> Optimizer:
    options: dict[str, Any] = {"state_bits": case.bits, "state_format": case.form, "engine": engine}
    if "weight_decay" in OPTIMIZERS[case.optimizer].options:
        options["weight_decay"] = 0.1
    optimizer = build(case.optimizer, params, **options)
    if case.staged:
        optimizer.append(Average())
        optimizer.append(Lookahead(k=2))
    return optimizer


def _parameter(p: Tensor, twin: Tensor, old: Tensor) -> Iterator[str]:
    """A step differs by some units in the last place of the values that it is made of."""
    if not p.numel():
        return
    new, own, old = (x.detach().double() for x in (p, twin, old))
    unit = torch.finfo(p.dtype).eps if p.dtype != torch.float32 else 4 * torch.finfo(torch.float32).eps
    bound = unit * new.abs() + 1e-5 * (new - old).abs().max()
    if not ((new - own).abs() <= bound).all():
        yield f"the parameter differs by {(new - own).abs().max():.1e}, of a step of {(new - old).abs().max():.1e}"


def _slots(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    flipped: dict[str, Tensor] = {}
    for name in sorted(one, key=lambda name: isinstance(one[name], Quantized) and one[name].format.partner is not None):
        value, own = one[name], other[name]
        if isinstance(value, Quantized):
            yield from _codes(name, value, own, flipped)
            continue
        value, own = value.double().cpu(), own.double().cpu()
        if not value.numel():
            continue
        unit = torch.finfo(one[name].dtype).eps if one[name].dtype == torch.bfloat16 else 1e-5
        if not ((value - own).abs() <= unit * value.abs() + 1e-6 * value.abs().max()).all():
            yield f"{name} differs by {(value - own).abs().max():.1e}, of {value.abs().max():.1e}"


def _codes(name: str, value: Quantized, own: Quantized, flipped: dict[str, Tensor]) -> Iterator[str]:
    """Codes may be neighbours, in few elements; a ratio to a root that was drawn otherwise may be any."""
    if not value.codes.numel():
        return
    apart = (value.codes.int() - own.codes.int()).abs()
    flipped[name] = apart > 0
    if value.format.partner is not None:
        apart = torch.where(flipped[value.format.partner], 0, apart)
    share = (apart > 0).double().mean().item()
    if apart.max() > 1 or share > FLIPPED:
        yield f"codes of {name} differ by up to {int(apart.max())}, {100 * share:.2f} % of them"
    # The scale of a ratio has eight bits, so the last of them may differ.
    unit = 2.0**-7 if value.format.partner is not None else 1e-5
    if not ((value.scales - own.scales).abs() <= unit * value.scales.abs()).all():
        yield f"scales of {name} differ by {(value.scales - own.scales).abs().max():.1e}"


def _equalize(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Give the state of one optimizer to the other, in place."""
    for name, value in one.items():
        if isinstance(value, Quantized):
            other[name].codes.copy_(value.codes)
            other[name].scales.copy_(value.scales)
        else:
            other[name].copy_(value)
