"""The CPU engine's printing of programs, where buffers are reused; against the reference on the same programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.distributed.reductions import Reductions
from lightning_optim.engines import blocked, reference
from lightning_optim.engines.blocked import blocks
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.language.math import maximum, minimum, norm, sign, sqrt, total, where
from lightning_optim.language.program import trace

Formula = Callable[[Any, Any, Any, Any], Any]


def trade(p: Any, g: Any, s: Any, h: Any) -> Any:
    """Two slots trade places."""
    s.a, s.b = s.b, s.a
    return p - h.lr * g


def turn(p: Any, g: Any, s: Any, h: Any) -> Any:
    """A slot moves on while the other becomes new."""
    s.a, s.b = s.b, s.a + g * p
    return p


def share(p: Any, g: Any, s: Any, h: Any) -> Any:
    """Two slots and the parameter take one value."""
    s.a = s.b = new = p + 2.0 * g
    return new


def late(p: Any, g: Any, s: Any, h: Any) -> Any:
    """The old value of a slot is read after its new one is known."""
    old, s.a = s.a, g * g
    s.b = sqrt(s.a) + old
    return 1.0 - (2.0 / (3.0 + s.b * s.b)) - s.a


def constant(p: Any, g: Any, s: Any, h: Any) -> Any:
    """A slot is set to a number."""
    s.a = 0.25
    s.b = maximum(0.1, minimum(g, 0.5)) - sign(p)
    return where(p > 0.3, where(g >= 0, 1.0, p), abs(-p)) ** 2.0


def sums(p: Any, g: Any, s: Any, h: Any) -> Any:
    """Sums of two levels, over a tensor and over all, and a maximum of both kinds."""
    scale = norm(g, over="all")
    s.a = g / (scale + 1.0)
    s.b = p * norm(s.a) + total(abs(p), by="max") + total(norm(p), over="all", by="max")
    return p - h.lr * s.b / (total(s.b) + 10.0)


def rows(dtype: torch.dtype) -> list[LocalParameter]:
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    found = []
    for shape in ((1,), (7,), (3, 5), (0,), (300, 400), (2048,), (2049,)):
        state = {"a": values(shape).float(), "b": values(shape).float()}
        if dtype == torch.float64:
            state = {name: value.double() for name, value in state.items()}
        p = values(shape)
        found.append(LocalParameter(p, p, values(shape), state, p.numel()))
    p = values((30, 50)).t()
    state = {"a": values((50, 30)), "b": values((50, 30))}
    found.append(LocalParameter(p, p, values((50, 30)), state, 1500))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("formula", [trade, turn, share, late, constant, sums])
def test_equals_the_reference(formula: Formula, dtype: torch.dtype) -> None:
    h = {"lr": 0.1}
    ends = []
    for engine in (reference, blocked):
        kept = rows(dtype)
        engine.run(Step([Batch.of(trace(formula, h), h, params=kept)], {}, Reductions()))
        ends.append([value for row in kept for value in (row.param, row.state["a"], row.state["b"])])
    tolerance = 1e-6 if formula is sums else 0.0  # sums of blocks are added in another order
    for right, value in zip(*ends, strict=True):
        torch.testing.assert_close(value, right, rtol=tolerance, atol=tolerance)


def test_blocks_end_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a block, the values are the same."""
    ends = []
    for size in (256, 1024, 32768):
        monkeypatch.setattr(blocks, "CACHED", size)
        monkeypatch.setattr(blocks, "PACKED", size // 2)
        kept, h = rows(torch.float32), {"lr": 0.1}
        blocked.run(Step([Batch.of(trace(late, h), h, params=kept)], {}, Reductions()))
        ends.append(torch.cat([row.param.reshape(-1) for row in kept]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])
