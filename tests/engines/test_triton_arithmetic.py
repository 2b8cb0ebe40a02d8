"""Division and roots of the Triton engine on a GPU, run in the interpreter from estimates that are a digit off."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_optim.engines import triton as engine

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is for machines without GPU"),
    pytest.mark.usefixtures("quiet_interpreter", "estimates"),
]

COUNT = 1 << 16
INFINITY, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor(
    [0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-45, -1e-45, 1e-40, 2.0**-126, 3e38, -3e38, 2.0**127, 1.0, -1.0, 3.0, 1e-30]
)


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates as the instructions of a GPU return them: off by a unit in the last place, and most never subnormal."""
    from triton import language as tl

    from lightning_optim.engines.triton import functions

    generator = np.random.default_rng(0)

    def normal(x: Any) -> Any:
        return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(np.float32)

    def estimate(exact: Any, off: int, flushes: bool = True) -> Any:
        def estimated(x: Any) -> Any:
            x = x if isinstance(x, tl.tensor) else tl.full((1,), x, tl.float32)
            with np.errstate(all="ignore"):
                values = (normal(x.handle.data) if flushes else x.handle.data).astype(np.float64)
                found = exact(values).astype(np.float32)
            moved = found.view(np.int32) + generator.integers(-off, off + 1, found.shape, dtype=np.int32)
            found = np.where(np.isfinite(found) & (found != 0), moved.view(np.float32), found)
            found = normal(found) if flushes else found
            return tl.tensor(type(x.handle)(found, x.handle.dtype), x.type)

        return estimated

    monkeypatch.setattr(functions, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(functions, "reciprocal", estimate(lambda x: 1 / x, 1))
    monkeypatch.setattr(functions, "full_range_reciprocal", estimate(lambda x: 1 / x, 1, flushes=False))
    monkeypatch.setattr(functions, "reciprocal_root", estimate(lambda x: 1 / np.sqrt(x), 2))


def computed(name: str, *args: Tensor | float) -> Tensor:
    """The values of a function of the engine, some of whose arguments may be numbers."""
    arguments = ", ".join(f"a{i}" for i in range(len(args)))
    values = ", ".join(f"tl.load(a{i} + at)" if isinstance(arg, Tensor) else f"a{i}" for i, arg in enumerate(args))
    size = max(arg.numel() for arg in args if isinstance(arg, Tensor))
    text = f"@triton.jit\ndef kernel(out, {arguments}):\n    at = tl.arange(0, {size})\n"
    kernel = engine.load("kernel", text + f"    tl.store(out + at, {name}({values}))\n", ())
    out = torch.empty(size)
    engine.run_kernel(kernel, 1, out, *args)
    return out


def check(found: Tensor, exact: Tensor, units: int = 0) -> None:
    """The same bits but for `units` in the last place; infinities and missing numbers are the same in any case."""
    wanted = exact.float()
    assert torch.equal(found.isnan(), wanted.isnan())
    found, wanted = found[~wanted.isnan()], wanted[~wanted.isnan()]
    assert torch.equal(found.isinf(), wanted.isinf())
    apart = (found.view(torch.int32).long() & 0x7FFFFFFF) - (wanted.view(torch.int32).long() & 0x7FFFFFFF)
    assert (apart.abs() <= units).all()
    assert torch.equal(found < 0, wanted < 0) or units


def numbers(seed: int, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** (low + (high - low) * torch.rand(COUNT, generator=generator, dtype=torch.float64))
    return (size * (torch.randint(2, (COUNT,), generator=generator) * 2 - 1)).float()


def test_quotients_are_rounded_correctly() -> None:
    a, b = numbers(1, -30, 30), numbers(2, -8, 8)
    check(computed("divide", a, b), a.double() / b.double())


def test_quotients_by_a_number_are_those_of_torch_on_a_gpu() -> None:
    """Times the reciprocal, rounded twice."""
    a = torch.cat([numbers(1, -45, 38)[: COUNT - len(SPECIAL)], SPECIAL])
    for divisor in (*(0.0316, 0.1, 0.7071, 0.999, 3e-20, 1e20, 0.0, -0.0, INFINITY), 2.0**-127, 2.0**127, -0.5):
        number = torch.tensor(divisor)
        check(computed("divide_by_number", a, divisor), a * (1 / number.double()).float(), 1)


def test_quotients_of_any_bits_are_right_to_a_unit() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-(1 << 31), 1 << 31, (COUNT,), generator=generator).int().view(torch.float32) for _ in "ab")
    check(computed("divide", a, b), a.double() / b.double(), 1)
    a, b = numbers(4, -45, 38), numbers(5, -45, 38.5)
    check(computed("divide", a, b), a.double() / b.double(), 1)


def test_quotients_of_special_values() -> None:
    a, b = torch.cartesian_prod(SPECIAL, SPECIAL).T.contiguous()
    check(computed("divide", a, b), a.double() / b.double(), 1)


def test_roots_are_rounded_correctly() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randint(-(1 << 31), 1 << 31, (COUNT,), generator=generator).int().view(torch.float32)
    for values in (x, numbers(7, -45, -37).abs(), numbers(8, -20, 5).abs(), SPECIAL):
        check(computed("square_root", values), values.double().sqrt())
