"""Reading an update: the facts in the graph, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_optim.language import ema, mean, norm, sqrt, where
from lightning_optim.language.program import trace
from lightning_optim.language.programs import Programs


def adam(p: Any, g: Any, s: Any, h: Any) -> Any:
    s.m = ema(s.m, g, h.betas[0])
    s.v = ema(s.v, g * g, h.betas[1])
    if h.amsgrad:
        s.peak = s.v
    if h.momentum:
        s.buffer = h.momentum * s.buffer + g
    return p - h.lr * s.m / sqrt(s.v)


def options(**changed: Any) -> dict[str, Any]:
    return {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "momentum": 0.0, **changed}


def test_slots_reads_and_writes_are_read_off() -> None:
    program = trace(adam, options())
    assert program.slots == {"m", "v"}
    assert program.reads == {"p", "g", "m", "v"}
    assert program.writes == {"p", "m", "v"}
    assert program.elementwise
    assert not program.needs


def test_flags_and_zeroness_select_a_program_and_floats_do_not() -> None:
    programs = Programs(adam)
    first = programs(options())
    assert programs(options(lr=0.5, betas=(0.5, 0.6))) is first
    assert programs(options(amsgrad=True)).slots == {"m", "v", "peak"}
    heavy = programs(options(momentum=0.9))
    assert heavy.slots == {"m", "v", "buffer"}
    assert programs(options(momentum=0.8)) is heavy
    assert programs(options()) is first


def test_equal_expressions_are_one() -> None:
    program = trace(lambda p, g, s, h: sqrt(g * g) + sqrt(g * g), {})
    assert [symbol.name for symbol in program.symbols] == ["element", "mul", "sqrt", "add"]


def test_needs_and_levels() -> None:
    def layerwise(p: Any, g: Any, s: Any, h: Any) -> Any:
        g = g / norm(g, over="all")
        return p - norm(p) / norm(g) * g + h.loss

    program = trace(layerwise, {"loss": 1.0})
    assert program.needs == ("norm of each tensor", "norm of all tensors", "loss")
    assert sorted(symbol.level for symbol in program.reductions) == [1, 1, 2]
    assert not trace(lambda p, g, s, h: p - mean(g, -1), {}).elementwise


def test_a_branch_on_a_value_is_refused_with_the_way_out() -> None:
    def branching(p: Any, g: Any, s: Any, h: Any) -> Any:
        large: Any = norm(g) > 1
        return p - g if large else p

    with pytest.raises(TypeError, match=r"cannot branch on gt\(.*where"):
        trace(branching, {})
    assert trace(lambda p, g, s, h: where(norm(g) > 1, p - g, p), {}).reductions
