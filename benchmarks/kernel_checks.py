"""Compares every kernel with the reference engine on its device, one step at a time.

    python -m benchmarks.kernel_checks adamw radam --device cuda

Both engines start each step from the same bits, those of the reference. So the comparison covers one step, and not the
growth of errors. The steps are the first three, and the first of every other program that an optimizer turns to later
(RAdam rectifies from the sixth step on): step counters are set, so none is waited for. A program that exists and was
not run is a failure.

On a GPU, torch contracts products and sums in its own kernels, it multiplies by the reciprocal of a number where a
kernel divides, and exponentials and logarithms differ in the last digit. So kernels cannot match bit for bit there;
tests on the CPU require it. Functions of whole matrices are torch in both engines, and eigenvectors may turn their sign
or mix for a difference in the last digit of a matrix. So the kernels that compute their arguments are compared, and
both engines go on with one result (`benchmarks/same_matrices.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.comparison import OF_LARGEST, check_codes, check_parameter, check_values
from benchmarks.problems import apply, build, gradients, make_params
from benchmarks.same_matrices import SameMatrices
from lightning_optim import OptionError, engines, storage
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.language.program import Program, namespace
from lightning_optim.stages import Average, Lookahead, Noise
from lightning_optim.storage import Quantized

SHAPES = ((0,), (1,), (7,), (255,), (257,), (64, 64), (5000,), (3, 1400), (20, 30))  # the last one turned
SMALL = ((0,), (7,), (257,), (3, 1400))
STORAGES = ((32, "log"), (16, "log"), (8, "log"), (8, "dynamic"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RACED = ("adamw", "adan", "lion", "lamb", "radam", "sgdw", "adabelief")  # whose times are published
HORIZON = 300  # steps in which a page turns to all its programs
MOST = 40  # of steps that are compared
# Sums are taken in float64, of terms in float32 whose last digits may differ on a GPU, and where signs differ most of
# a sum may cancel. On a CPU only the order of the sum differs.
OF_SUMS = {"cpu": 1e-9, "cuda": 1e-5}
# The standard deviation of a gradient is the root of a difference of squares. Where these are nearly equal, and in the
# first step they are equal, the last digit of a square is a few 10000ths of the gradient. Other normal numbers would
# make a difference of a tenth of it.
OF_MOMENTS = 1e-3


@dataclass(frozen=True)
class Case:
    """What kernels are printed for.

    Attributes:
        optimizer: The name of the optimizer.
        bits: The option `state_bits`.
        form: The option `state_format`.
        dtype: The dtype of parameters and gradients.
        stages: "averages" and slow weights in the same pass, "noise", or noise by "moments" of gradients; or none.
    """

    optimizer: str
    bits: int
    form: str
    dtype: torch.dtype
    stages: str = ""

    def __str__(self) -> str:
        kept = f"{self.bits} bits, {self.form}" if self.bits == 8 else f"{self.bits} bits"
        stages = f", with {self.stages}" if self.stages else ""
        return f"{self.optimizer}, {kept}, {str(self.dtype).removeprefix('torch.')}{stages}"


def in_order(names: Sequence[str]) -> list[str]:
    """Optimizers in the order in which to check them: those first whose times are published."""
    return [*(name for name in RACED if name in names), *(name for name in names if name not in RACED)]


def cases(name: str, quick: bool = False) -> list[Case]:
    """The cases of an optimizer.

    All storages in float32 and bfloat16, and in float16, which differs from bfloat16 in how it is read and written,
    those in 32 and 8 bits. With stages in the same pass bfloat16 alone, in 32 and in 8 bits.
    """
    cls = OPTIMIZERS[name]
    quantized = any(storage.can_be_quantized(slot) for slot in cls.slots.values())
    found = []
    for i, (bits, form) in enumerate(STORAGES):
        if bits == 8 and not quantized:
            continue
        plain = [Case(name, bits, form, dtype) for dtype in DTYPES if dtype != torch.float16 or i % 2 == 0]
        found += [plain[i % len(plain)]] if quick else plain
        if i % 2 == 0 and not (quick and bits == 32):
            found.append(Case(name, bits, form, torch.bfloat16, "averages"))
            noise = (["noise", "moments"] if bits == 32 else ["noise"]) if name == "adamw" else []
            found += [Case(name, bits, form, torch.bfloat16, stages) for stages in noise]
    return found


def shapes_for(name: str, quick: bool = False) -> tuple[tuple[int, ...], ...]:
    """The shapes of parameters. Where matrices are factored, none has a long side, which would take the time."""
    shapes = SMALL if quick else SHAPES
    return tuple((60, 70) if shape == (3, 1400) else shape for shape in shapes) if name == "soap" else shapes


def check_optimizer(name: str, device: str, quick: bool = False) -> dict[str, Any]:
    """What came of all cases of an optimizer: how many, how many programs they ran, how many seconds, what failed."""
    begin = time.perf_counter()
    failed: dict[str, list[str]] = {}
    done, programs = cases(name, quick), 0
    for case in done:
        found = Check(case, torch.device(device), shapes_for(name, quick))
        try:
            problems = list(found.problems())
        except OptionError as error:
            first = build_for(case, params_of(case, ((3, 4),), torch.device(device)), "auto").first_programs()
            if engines.ENGINES["triton"].refusal(first, []):
                return {"not served": str(error)}
            problems = [str(error)]
        except Exception as error:
            problems = [f"{type(error).__name__}: {str(error)[:500]}"]
        programs += len(found.ran)
        if problems:
            failed[str(case)] = [f"{case}, {problem}" for problem in problems[:5]]
    seconds = round(time.perf_counter() - begin, 1)
    return {"cases": len(done), "programs": programs, "failed": failed, "seconds": seconds}


class Check:
    """The comparison of one case.

    Args:
        case: The case.
        device: Where it runs.
        shapes: The shapes of parameters. One more begins between multiples of 16 bytes.

    Attributes:
        ran: The programs that kernels have run.
        every: The programs that there are in any step.
    """

    def __init__(self, case: Case, device: torch.device, shapes: Sequence[tuple[int, ...]]) -> None:
        self.case, self.device = case, device
        self.params, self.twins = params_of(case, shapes, device), params_of(case, shapes, device)
        self.ran: set[Program] = set()
        self.every: set[Program] = set()

    def problems(self) -> Iterator[str]:
        """What differs by more than it may, and what was not compared, in words."""
        case, sizes = self.case, [tuple(p.shape) for p in self.params]
        self.by_reference = build_for(case, self.params, "reference")
        self.by_kernel = build_for(case, self.twins, "triton")
        steps = [1]
        for position, grads in enumerate(gradients(MOST, sizes, case.dtype)):
            if position == len(steps):
                break
            yield from self._step(steps[position], [grad.to(self.device) for grad in grads])
            steps += [] if position else further_steps(self.by_kernel)
        yield from self._evaluation(steps[-1])
        for program in self.every - self.ran:
            yield f"a program was not run: {', '.join(program.outputs)} of {len(program.symbols)} symbols"

    def _step(self, t: int, grads: Sequence[Tensor]) -> Iterator[str]:
        """Compare one step, and let the kernels go on from where the reference is."""
        before = [p.detach().clone() for p in self.params]
        same = SameMatrices()
        for optimizer, params in ((self.by_reference, self.params), (self.by_kernel, self.twins)):
            go_to(optimizer, t)
            # Even steps have gradients that lie in memory as their parameters do, odd ones such as are copied.
            laid = [torch.empty_like(p).copy_(grad) for p, grad in zip(params, grads, strict=True)]
            with same.recorded(optimizer) if optimizer is self.by_reference else same.replayed(optimizer):
                apply(optimizer, params, grads if t % 2 else laid, t)
        yield from (f"step {t}: {problem}" for problem in same.problems)
        self.ran |= {batch.program for kept in self.by_kernel._runner.cached.values() for batch in kept.batches}
        self.every |= programs_of(self.by_kernel)
        for p, twin, old in zip(self.params, self.twins, before, strict=True):
            state, state_of_twin = self.by_reference.state[p], self.by_kernel.state[twin]
            share = OF_MOMENTS if self.case.stages == "moments" else OF_LARGEST
            for problem in (*check_parameter(p, twin, old, share), *_slots(state, state_of_twin, share)):
                yield f"step {t}, shape {tuple(p.shape)}: {problem}"
            with torch.no_grad():
                twin.copy_(p)
            _equalize(state, state_of_twin)
        for slot, value in self.by_reference.shared_slots().items():
            other = self.by_kernel.shared_slots()[slot]
            if not torch.allclose(value, other, rtol=OF_SUMS[self.device.type], atol=0):
                yield f"step {t}: {slot} is {other.item()!r}, not {value.item()!r}"
            other.copy_(value)

    def _evaluation(self, t: int) -> Iterator[str]:
        """Compare the weights to evaluate, where they are others than those of training."""
        if not self.by_kernel.evaluates():
            return
        trained = [p.detach().clone() for p in self.twins]
        self.by_reference.eval()
        self.by_kernel.eval()
        for p, twin, old in zip(self.params, self.twins, trained, strict=True):
            for problem in check_parameter(p, twin, old):
                yield f"weights to evaluate after step {t}, shape {tuple(p.shape)}: {problem}"
        self.by_kernel.train()
        for twin, old in zip(self.twins, trained, strict=True):
            if not torch.equal(twin, old):
                yield f"weights to train on after an evaluation, shape {tuple(twin.shape)}: not the bits from before"


def first_steps(optimizer: Optimizer) -> list[int]:
    """The steps at which an optimizer that has taken some turns to a program that it has not had before."""
    seen: set[Program] = set()
    found = []
    for t in range(1, HORIZON + 1):
        programs = programs_at(optimizer, t)
        if programs - seen:
            found.append(t)
        seen |= programs
    return found


def further_steps(optimizer: Optimizer, least: int = 3) -> list[int]:
    """The steps in which an optimizer that has taken one runs all its programs. Each is set by `go_to`.

    Slow weights act in every other step, so with stages each program needs two.
    """
    turns = first_steps(optimizer)
    return [t for t in turns for _ in (1, 2)] if optimizer.stages else sorted({*range(2, least + 1), *turns} - {1})


def go_to(optimizer: Optimizer, t: int) -> None:
    """Let the next step be step `t`."""
    for state in optimizer.state.values():
        state["step"].fill_(t - 1)


def programs_at(optimizer: Optimizer, t: int) -> set[Program]:
    """The programs of its parameters in step `t`, where its stages do what they did in the last."""
    found = set()
    for batch in optimizer._runner.cached["update"].active:
        scalars = optimizer.scalars(namespace(batch.h), t)
        found.add(optimizer.program("update", {**batch.h, **scalars, "t": float(t)}))
    return found


def programs_of(optimizer: Optimizer) -> set[Program]:
    """The programs that there are in any step, where its stages do what they did in the last."""
    return {program for t in range(1, HORIZON + 1) for program in programs_at(optimizer, t)}


def params_of(case: Case, shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    """Parameters of these shapes, the last one turned, and one that begins between multiples of 16 bytes."""
    params: list[Tensor] = [torch.nn.Parameter(p.detach().to(device)) for p in make_params(shapes, case.dtype)]
    turned = params[-1].detach().t().contiguous().t()  # not contiguous
    params = [*params[:-1], torch.nn.Parameter(turned)]
    if case.stages or case.dtype == torch.float16:
        return params  # kernels of their own, which are compared in other cases
    buffer = torch.zeros(1001, device=device, dtype=case.dtype)
    shifted = buffer[1:].copy_(torch.linspace(-1, 1, 1000))  # begins between multiples of 16 bytes
    return [*params, torch.nn.Parameter(shifted)]


def build_for(case: Case, params: Sequence[Tensor], engine: str) -> Optimizer:
    """The optimizer of a case."""
    options: dict[str, Any] = {"state_bits": case.bits, "state_format": case.form, "engine": engine}
    if "weight_decay" in OPTIMIZERS[case.optimizer].options:
        options["weight_decay"] = 0.1
    optimizer = build(case.optimizer, params, **options)
    if case.stages == "averages":
        optimizer.append(Average())
        optimizer.append(Lookahead(k=2))
    if case.stages in ("noise", "moments"):
        kind: Literal["isotropic", "moments"] = "moments" if case.stages == "moments" else "isotropic"
        optimizer.append(Noise(global_indices([], optimizer), kind=kind))
    return optimizer


def _slots(one: dict[str, Any], other: dict[str, Any], share: float) -> Iterator[str]:
    flipped: dict[str, Tensor] = {}
    for name in sorted(one, key=lambda name: isinstance(one[name], Quantized) and one[name].format.partner is not None):
        value, own = one[name], other[name]
        if isinstance(value, Quantized):
            yield from check_codes(name, value, own, flipped)
        else:
            yield from check_values(name, value, own, share)


def _equalize(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Give the state of one optimizer to the other, in place."""
    for name, value in one.items():
        if isinstance(value, Quantized):
            other[name].codes.copy_(value.codes)
            other[name].scales.copy_(value.scales)
        else:
            other[name].copy_(value)


def main(given: Sequence[str] | None = None) -> int:
    """Check optimizers, and print what came of each as a line of JSON; 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=sorted(OPTIMIZERS), help="optimizers; by default all of them")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases on fewer shapes")
    args = parser.parse_args(given)
    failed = False
    for name in in_order(args.names):
        found = check_optimizer(name, args.device, args.quick)
        failed |= bool(found.get("failed"))
        print(json.dumps({name: found}), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
