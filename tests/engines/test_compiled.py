"""The compiled engine ends where the reference does, for every optimizer, type and storage."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import engines
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.engines import compiled
from lightning_optim.engines.cpp import compiler
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.errors import OptionError
from lightning_optim.language.math import exp
from lightning_optim.language.program import trace
from lightning_optim.stages import Average, Lookahead
from lightning_optim.storage import Quantized
from tests.harness.engines import QUANTIZED, SHAPES, differences, make, run
from tests.harness.problems import NAMES, build, make_params

needs_compiler = pytest.mark.skipif(bool(compiler.without_compiler()), reason="no C++ compiler")
# Their exponentials and powers are our own: a few units in the last place from torch's.
CLOSE = ("diffgrad", "padam")


def ends(name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, steps: int = 3, **options: Any) -> list[Any]:
    """Optimizer and parameters after a run by the reference, and by the compiled engine."""
    found: list[Any] = []
    for engine in ("reference", "compiled"):
        params = make(shapes, dtype, turned=True)
        optimizer = build(name, params, weight_decay=0.1, engine=engine, **options)
        run(optimizer, params, steps)
        found += [optimizer, params]
    return found


def assert_near(tolerance: float, one: Any, params: Sequence[Tensor], other: Any, others: Sequence[Tensor]) -> None:
    """Parameters and slots that are tensors agree to a share of their largest value."""
    for p, q in zip(params, others, strict=True):
        pairs = [(p, q), *((x, other.state[q][name]) for name, x in one.state[p].items())]
        for x, y in [(x, y) for x, y in pairs if isinstance(x, Tensor) and x.numel()]:
            torch.testing.assert_close(y, x, rtol=0, atol=tolerance * max(float(x.detach().abs().max()), 1e-30))


@needs_compiler
@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CLOSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, for tensors of all sizes, one of them not contiguous."""
    assert differences(*ends(name, SHAPES, dtype)) == []


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_is_near_the_reference_in_float64(name: str) -> None:
    assert_near(1e-14, *ends(name, SHAPES, torch.float64))


@needs_compiler
@pytest.mark.parametrize("name", CLOSE)
def test_own_functions_are_near(name: str) -> None:
    """Eight units in the last place of float32."""
    assert_near(8 * 2.0**-24, *ends(name, SHAPES, torch.float32))


@needs_compiler
@pytest.mark.usefixtures("exact_roots")
@pytest.mark.parametrize("name", [name for name in QUANTIZED if name not in CLOSE])
@pytest.mark.parametrize("state_format", ["log", "dynamic"])
def test_codes_equal_the_reference(name: str, state_format: str) -> None:
    """Codes, scales and parameters, bit for bit; later steps read what earlier ones wrote."""
    found = ends(name, SHAPES, torch.float32, state_bits=8, state_format=state_format)
    assert any(isinstance(value, Quantized) for state in found[2].state.values() for value in state.values())
    assert differences(*found) == []


@needs_compiler
@pytest.mark.usefixtures("exact_roots")
def test_codes_of_extreme_blocks_equal_the_reference() -> None:
    """All zero, one value, zeros among values, values far apart, infinite and missing gradients."""
    lines = torch.randn(17, 256, generator=torch.Generator().manual_seed(3))
    lines[0], lines[1], lines[2, ::3], lines[3] = 0.0, 0.25, 0.0, lines[3].abs()
    lines[4], lines[5], lines[6, 7] = lines[4] * 1e-12, lines[5] * 1e6, 1e9
    lines[8] = lines[8] * 10.0 ** torch.linspace(-18, 6, 256)
    lines[9, 3], lines[10, 5] = float("nan"), float("inf")
    for state_format in ("log", "dynamic"):
        found: list[Any] = []
        for engine in ("reference", "compiled"):
            params = [torch.nn.Parameter(torch.zeros(17, 256))]
            optimizer = build("adamw", params, state_bits=8, state_format=state_format, engine=engine)
            for scale in (1.0, -0.5):
                params[0].grad = lines * scale
                optimizer.step()
            params[0].data.nan_to_num_()
            found += [optimizer, params]
        assert differences(*found) == []


@needs_compiler
def test_functions_are_those_of_float64() -> None:
    """To 4 units in the last place over their whole range, and right where the result is infinite or no number."""
    edges = torch.tensor([0.0, 1.0, torch.inf, torch.nan])
    found = [(_apply(lambda p, g, s, h: exp(p), 0.0, x), x.double().exp()) for x in [torch.linspace(-110, 95, 20001)]]
    for power in (0.25, -0.7, 3.0, 1.0, 0.5):
        a, b = torch.cat([torch.logspace(-44, 38, 20001), edges]), torch.tensor(power).double()
        found.append((_apply(lambda p, g, s, h: p**h.b, power, a), a.double() ** b))
    for mine, right in found:
        usual = torch.isfinite(right.float()) & (right.abs() > 1.2e-38)  # below, fewer bits are left
        assert ((mine - right) / right)[usual].abs().max() < 4 * 2.0**-23
        odd = ~torch.isfinite(right.float())
        torch.testing.assert_close(mine[odd], right.float()[odd], rtol=0, atol=0, equal_nan=True)
        assert (mine[right == 0] < 1.2e-38).all()


def _apply(formula: Any, b: float, values: Tensor) -> Tensor:
    p = values.clone()
    param = LocalParameter(p, p, None, {}, p.numel())
    compiled.run(Step([Batch.of(trace(formula, {"b": b}), {"b": b}, params=[param])], {}, Reductions()))
    return p


@needs_compiler
def test_threads_change_nothing() -> None:
    """Neither elements nor sums: blocks are added up in one order."""
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = make(((700, 501), (11,)), torch.float32)
            optimizer = build("lamb", params, engine="compiled", max_grad_norm=0.5, state_bits=8)
            run(optimizer, params, 3)
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for params in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], params, strict=True))


@needs_compiler
def test_stages_run_in_the_same_pass() -> None:
    found: list[Any] = []
    for engine in ("blocked", "compiled"):
        params = make(SHAPES, torch.float32)
        optimizer = build("sgdw", params, engine=engine)
        optimizer.append(Average("ema", 0.9))
        optimizer.append(Lookahead(2, 0.5))
        run(optimizer, params, 5)
        found += [optimizer, params]
    assert differences(*found) == []


@needs_compiler
def test_nothing_is_compiled_for_floats_shapes_or_numbers_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    load = compiler.load

    def noted(source: compiler.Source) -> Any:
        made.append(source.text)
        return load(source)

    monkeypatch.setattr(compiler, "load", noted)
    for shapes, options in ((SHAPES, {}), (((3, 3),), {"lr": 0.5}), (((64, 64), (9,)), {"betas": (0.5, 0.6)})):
        params = make(shapes, torch.float32)
        optimizer = build("adamw", params, engine="compiled", weight_decay=0.1, **options)
        run(optimizer, params, 2)
        optimizer.param_groups[0]["lr"] = 0.123
        run(optimizer, params, 1)
    assert len(set(made)) == 1


@needs_compiler
def test_kernels_are_kept_between_processes(tmp_path: Path) -> None:
    """A second process compiles nothing, and no half-written file is ever there."""
    text = (
        "import torch, lightning_optim as lo; p = torch.nn.Parameter(torch.ones(5)); p.grad = torch.ones(5);"
        "lo.Adan([p], engine='compiled').step(); print(p[0].item())"
    )
    outputs = []
    for _ in range(2):
        environ = {
            "XDG_CACHE_HOME": str(tmp_path),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        done = subprocess.run([sys.executable, "-c", text], env=environ, capture_output=True, text=True, check=True)
        outputs.append((done.stdout, {f.name: f.stat().st_mtime_ns for f in (tmp_path / "lightning_optim").iterdir()}))
    assert outputs[0] == outputs[1]
    assert all(name.endswith(".so") for name in outputs[0][1])
    assert (tmp_path / "lightning_optim").stat().st_mode & 0o077 == 0


def test_without_a_compiler_the_blocked_engine_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "without_compiler", lambda: "no C++ compiler is found.")
    params = make_params(((3,),), torch.float32)
    optimizer = build("adamw", params)
    assert "engine: blocked (no C++ compiler is found.)" in repr(optimizer)
    run(optimizer, params, 1)
    with pytest.raises(OptionError, match="engine='compiled' cannot serve here: no C"):
        run(build("adamw", params, engine="compiled"), params, 1)


@needs_compiler
def test_auto_takes_it() -> None:
    params = make_params(((3,),), torch.float32)
    assert engines.describe("auto", build("adamw", params).first_programs(), params) == "compiled"
