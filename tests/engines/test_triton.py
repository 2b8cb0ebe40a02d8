"""The Triton engine in Triton's interpreter, which needs no GPU. What is compiled is in `test_sm90.py`."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import engines
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.engines import launch as launch_module
from lightning_optim.engines import triton as engine
from lightning_optim.engines.signature import Signature
from lightning_optim.engines.step import LocalParameter
from lightning_optim.engines.triton import levels
from lightning_optim.errors import OptionError
from lightning_optim.stages import Average, Lookahead, Noise
from lightning_optim.storage import Quantized
from tests.harness.engines import QUANTIZED, SHAPES, SMALL, differences, flags, make, run, run_every_program
from tests.harness.problems import NAMES, apply, build, flat, gradients

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is for machines without GPU"),
    pytest.mark.usefixtures("torch_functions"),
]

every_optimizer = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks of every launch."""
    found: list[int] = []
    run_kernel = engine.run_kernel

    def counted(function: Any, count: int, *args: Any, **options: Any) -> None:
        found.append(count)
        run_kernel(function, count, *args, **options)

    monkeypatch.setattr(engine, "run_kernel", counted)
    return found


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was written down, each time that something was: an address table, or the column of the gradients."""
    found: list[str] = []

    def note(name: str) -> None:
        write = getattr(launch_module.Launch, name)

        def noted(*args: Any) -> Any:
            found.append(name)
            return write(*args)

        monkeypatch.setattr(launch_module.Launch, name, noted)

    note("build_table")
    note("rewrite_gradients")
    return found


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, for tensors of all sizes in one launch.

    Only the slots that are one number may differ, by the order of a sum in float64: 1e-11 allows for KOALA, whose
    recursion multiplies such a difference.
    """
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(SHAPES, dtype, turned=True)
        assert not params[-1].is_contiguous()
        optimizer = build(name, params, weight_decay=0.1, engine=engine_name)
        run_every_program(optimizer, params)
        ends += [optimizer, params]
    assert differences(*ends) == []


@pytest.mark.full
@every_optimizer
def test_all_flags_equal_the_reference(name: str) -> None:
    """One by one."""
    for options in flags(name):
        ends: list[Any] = []
        for engine_name in ("reference", "triton"):
            params = make(SMALL, torch.float32)
            try:
                optimizer = build(name, params, weight_decay=0.1, engine=engine_name, **options)
            except OptionError:  # one that needs another
                break
            run_every_program(optimizer, params)
            ends += [optimizer, params]
        assert not ends or differences(*ends) == [], options


@pytest.mark.parametrize("name", ["adamw", "adan", "lion", "lamb"])
def test_cautious_steps_equal_the_reference(name: str) -> None:
    """Shares of a mask are whole numbers over a count, in whatever order they are summed; LAMB's norms are not."""
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(SHAPES, torch.float32, turned=True)
        options: dict[str, Any] = {"weight_decay": 0.1, "cautious": True, "cautious_decay": True}
        optimizer = build(name, params, engine=engine_name, **options)
        run(optimizer, params, 3)
        ends += [optimizer, params]
    assert differences(*ends) == []


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("state_format", ["log", "dynamic"])
def test_codes_equal_the_reference(name: str, state_format: str) -> None:
    """Codes, scales and parameters, bit for bit; the second step reads what the first one wrote."""
    dtype = torch.float32 if NAMES.index(name) % 2 else torch.bfloat16
    codes_equal(name, state_format, dtype, SMALL, 2)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("state_format", ["log", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_equal_the_reference_at_all_sizes(name: str, state_format: str, dtype: torch.dtype) -> None:
    codes_equal(name, state_format, dtype, SHAPES, 4)


def codes_equal(
    name: str, state_format: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], steps: int
) -> None:
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(shapes, dtype)
        optimizer = build(name, params, state_bits=8, state_format=state_format, engine=engine_name)
        run_every_program(optimizer, params, steps)
        assert any(isinstance(value, Quantized) for state in optimizer.state.values() for value in state.values())
        ends += [optimizer, params]
    assert differences(*ends) == []


def test_codes_of_extreme_blocks_equal_the_reference() -> None:
    """All zero, one value, zeros among values, one sign, values far apart, infinite and missing gradients."""
    generator = torch.Generator().manual_seed(3)
    lines = torch.randn(17, 256, generator=generator)
    lines[0], lines[1], lines[2, ::3], lines[3] = 0.0, 0.25, 0.0, lines[3].abs()
    lines[4], lines[5], lines[6, 7], lines[7] = lines[4] * 1e-12, lines[5] * 1e6, 1e9, -lines[7].abs()
    lines[8] = lines[8] * 10.0 ** torch.linspace(-18, 6, 256)
    lines[9, 3], lines[10, 5] = float("nan"), float("inf")
    for state_format in ("log", "dynamic"):
        ends: list[Any] = []
        for engine_name in ("reference", "triton"):
            params = [torch.nn.Parameter(torch.zeros(17, 256))]
            optimizer = build("adamw", params, state_bits=8, state_format=state_format, engine=engine_name)
            for scale in (1.0, -0.5):
                apply(optimizer, params, [lines * scale])
            params[0].data.nan_to_num_()  # two that are not a number are not equal
            ends += [optimizer, params]
        assert differences(*ends) == []


@pytest.mark.parametrize(("name", "state_bits", "expected"), [("adamw", 32, 1), ("adamw", 16, 1), ("lamb", 8, 4)])
def test_stages_run_in_the_same_pass(name: str, state_bits: int, expected: int, launches: list[int]) -> None:
    """And take no launch of their own. (LAMB does not adapt the vectors among its tensors: two batches.)"""
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(SMALL, torch.bfloat16)
        optimizer = build(name, params, state_bits=state_bits, engine=engine_name)
        optimizer.append(Average())
        optimizer.append(Lookahead(k=2))
        run(optimizer, params, 2)
        ends += [optimizer, params]
    assert differences(*ends) == []
    assert len(launches) == 2 * expected


@pytest.mark.parametrize(("name", "state_bits"), [("radam", 8), ("pnm", 32)])
def test_every_program_with_stages_equals_the_reference(name: str, state_bits: int) -> None:
    """Also the rectified one, with and without a step of the slow weights."""
    stages_equal(name, state_bits, torch.bfloat16)


@pytest.mark.full
@every_optimizer
@pytest.mark.parametrize("state_bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_programs_with_stages_equal_the_reference(name: str, state_bits: int, dtype: torch.dtype) -> None:
    if state_bits < 8 or name in QUANTIZED:
        stages_equal(name, state_bits, dtype)


def stages_equal(name: str, state_bits: int, dtype: torch.dtype) -> None:
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(SMALL, dtype)
        optimizer = build(name, params, state_bits=state_bits, engine=engine_name)
        optimizer.append(Average())
        optimizer.append(Lookahead(k=2))
        run_every_program(optimizer, params)
        ends += [optimizer, params]
    assert differences(*ends) == []


@pytest.mark.parametrize("kind", ["isotropic", "moments"])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_noise_is_that_of_the_reference(kind: Any, state_bits: int) -> None:
    """Bit for bit: its cosine is a polynomial, and rounded to float32 equal to the one of torch."""
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(SMALL, torch.float32)
        optimizer = build("adamw", params, state_bits=state_bits, engine=engine_name)
        optimizer.append(Noise(global_indices([], optimizer), kind=kind, seed=3 << 40 | 5))
        run(optimizer, params, 3)
        ends += [optimizer, params]
    assert differences(*ends) == []


def test_a_tensor_without_gradient_takes_part_in_stages() -> None:
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(SMALL, torch.float32)
        optimizer = build("adamw", params, engine=engine_name)
        optimizer.append(Average())
        for step, grads in enumerate(gradients(2, SMALL, torch.float32)):
            apply(optimizer, params, [grads[0], None, *grads[2:]], step)
        ends += [optimizer, params]
    assert differences(*ends) == []


@pytest.mark.parametrize(("name", "expected"), [("adamw", 1), ("adan", 1), ("lars", 3), ("lamb", 3), ("koala_v", 3)])
def test_launches_do_not_depend_on_how_many_tensors_there_are(name: str, expected: int, launches: list[int]) -> None:
    """One for an elementwise update; with sums a pass, the combination of its blocks, and the pass that writes."""
    options = {"always_adapt": True} if name in ("lars", "lamb") else {}
    for shapes in (((7,),), ((5,), (0,), (1,), (1025,), (3, 9)) * 6):
        params = make(shapes, torch.float32)
        optimizer = build(name, params, engine="triton", **options)
        run(optimizer, params, 1)
        launches.clear()
        run(optimizer, params, 1)
        assert len(launches) == expected


def test_a_clipped_step_takes_three_launches(launches: list[int]) -> None:
    params = make(((7,), (300,)), torch.float32)
    run(build("adan", params, engine="triton", max_grad_norm=0.1), params, 1)
    assert len(launches) == 3


def test_types_and_alignments_are_served_apart(launches: list[int]) -> None:
    """A launch for each combination of types, and one for parameters that do not begin at a multiple of 16 bytes."""
    buffer = torch.zeros(100)
    params = [*make(((7,), (9,)), torch.float32), *make(((7,),), torch.bfloat16), buffer[1:8].requires_grad_()]
    optimizer = build("adamw", params, engine="triton")
    twins = [p.detach().clone().requires_grad_() for p in params]
    grads = [torch.ones_like(p) for p in params]
    apply(optimizer, params, grads)
    apply(build("adamw", twins, engine="reference"), twins, grads)
    assert len(launches) == 3
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert not buffer[0]
    assert not buffer[8:].any()


def test_alignment_is_that_of_a_column(launches: list[int]) -> None:
    """Gradients may be views of one buffer that begin anywhere: what is stored still moves 16 bytes at a time."""
    params, twins = (make(((7,), (300,), (1025,)), torch.float32) for _ in range(2))
    optimizer = build("adamw", params, engine="triton")
    buffer = torch.linspace(-1, 1, 1332)
    views = [buffer[:7], buffer[7:307], buffer[307:]]
    assert [x.data_ptr() % 16 == 0 for x in views] == [True, False, False]
    for p, view in zip(params, views, strict=True):
        p.grad = view
    optimizer.step()
    apply(build("adamw", twins, engine="reference"), twins, views)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert len(launches) == 1
    (kernel,) = engine.BACKEND.kernels(optimizer.first_programs()[0], [local(optimizer, p) for p in params])
    assert re.findall(r"(\w+)_at = tl.multiple_of", kernel.text) == ["p", "exp_avg", "exp_avg_sq"]
    for p in params:
        p.grad = p.grad.clone()  # type: ignore[union-attr]
    (kernel,) = engine.BACKEND.kernels(optimizer.first_programs()[0], [local(optimizer, p) for p in params])
    assert "\n    g_at = tl.multiple_of" in kernel.text


def test_the_table_is_kept_while_nothing_moves(tables: list[str]) -> None:
    params = make(SMALL, torch.float32)
    optimizer = build("adamw", params, engine="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert tables == ["build_table"]
    params[1].data = params[1].data.clone()
    optimizer.step()
    optimizer.step()
    assert tables == ["build_table"] * 2
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    optimizer.step()
    assert tables == ["build_table"] * 2 + ["rewrite_gradients"]
    optimizer.state[params[3]]["exp_avg"] = optimizer.state[params[3]]["exp_avg"].clone()
    optimizer.step()
    assert tables[3:] == ["build_table"]


@pytest.mark.parametrize("state_bits", [32, 8])
def test_weights_in_channels_last_are_served_in_their_order(tables: list[str], state_bits: int) -> None:
    """In the order of memory that parameter, gradient and slots share; a gradient that lies otherwise is copied."""
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(((64, 8, 3, 3), (7,)), torch.float32)
        params[0] = torch.nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))
        optimizer = build("adamw", params, engine=engine_name, state_bits=state_bits)
        moved = list(gradients(5, [tuple(p.shape) for p in params], torch.float32))  # no two at the same address
        for grads in moved[:2]:
            grads[0] = grads[0].to(memory_format=torch.channels_last)
        for grads in moved:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
        ends += [optimizer, params]
    assert differences(*ends) == []
    launches = 1 if state_bits == 32 else 2  # the vector is not kept in codes
    in_order, copied = ["build_table", "rewrite_gradients"], ["build_table"]
    assert tables == [x for x in in_order + copied for _ in range(launches)] + 2 * ["rewrite_gradients"]


def test_a_table_that_is_written_by_a_graph_serves_no_step_outside_it(
    tables: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture writes is there once the graph is replayed; a step that comes before that writes its own."""
    params = make(SMALL, torch.float32)
    optimizer = build("adamw", params, engine="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in params:
        p.grad = torch.ones_like(p)
    with monkeypatch.context() as patch:
        patch.setattr(launch_module, "capturing", lambda: True)
        optimizer.step()
    assert tables == ["build_table", "rewrite_gradients"]
    optimizer.step()
    optimizer.step()
    assert tables == ["build_table", "rewrite_gradients", "rewrite_gradients"]


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("first", [1 << 31, 1 << 32, 5 << 32])
def test_elements_far_into_a_tensor_are_found(state_bits: int, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor as if it were the end of a larger one, whose other elements are nowhere: indices need 64 bits.

    The dither of element 2^32 is that of the first one again. The code of Lion has none.
    """
    build_table = launch_module.Launch.build_table

    def far(self: Any) -> None:
        build_table(self)
        self.host[0, 0] -= first // self.tile
        self.host[0, 1] += first
        for name, stored in self.signature.operands:
            column = self.signature.offsets[name]
            if isinstance(stored, torch.dtype):
                self.host[0, column] -= first * stored.itemsize
            else:
                self.host[0, column] -= first
                self.host[0, column + 1] -= first // 256 * stored.scales_per_block * 4
        self.cached_table.copy_(self.host)

    name = "adamw" if first % (1 << 32) == 0 else "lion"
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(((5000,),), torch.float32)
        optimizer = build(name, params, state_bits=state_bits, engine=engine_name)
        with monkeypatch.context() as patch:
            patch.setattr(launch_module.Launch, "build_table", far)
            for p in params:
                p.grad = torch.linspace(-1, 1, 5000)
            optimizer.step()
            optimizer.step()
        ends += [optimizer, params]
    assert differences(*ends) == []


def test_a_float_prints_nothing_anew() -> None:
    params = make(((7,),), torch.float32)
    optimizer = build("adamw", params, engine="triton", weight_decay=0.1)
    run(optimizer, params, 1)
    before = engine.load.cache_info().currsize
    optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3)
    run(optimizer, params, 2, skip=1)
    assert engine.load.cache_info().currsize == before


def test_no_float_specialises_a_kernel() -> None:
    """Triton compiles anew for some values of integers (1, multiples of 16), but for no value of a float."""
    from triton.backends.compiler import BaseBackend
    from triton.runtime.jit import native_specialize_impl

    kinds = {native_specialize_impl(BaseBackend, value, False, True, True) for value in (0.1, 1.0, 0.0, 16.0, 1e-30)}
    assert kinds == {("fp32", None)}
    params = make(((64, 64),), torch.float32)
    optimizer = build("adamw", params, state_bits=8, engine="reference")
    run(optimizer, params, 1)
    rows = [local(optimizer, p) for p in params]
    (kernel,) = engine.BACKEND.kernels(optimizer.first_programs()[0], rows)
    assert [name for name, kind in kernel.arguments.items() if kind not in ("fp32", "*fp32")] == ["t"]
    assert "@triton.jit(do_not_specialize=['t'])" in kernel.text


def test_sums_repeat_bit_for_bit() -> None:
    ends = []
    for _ in range(2):
        params = make(((30, 90), (33,)), torch.float32)
        run(build("lamb", params, engine="triton"), params, 2)
        ends.append(flat(params))
    assert torch.equal(*ends)


def test_results_of_tiles_are_combined_level_by_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bounded number at a time, whatever tensors lie side by side, until each has one result."""
    monkeypatch.setattr(levels, "MOST", 4)
    ends = torch.tensor([0, 0, 1, 71, 71, 74, 78, 83, 83]).cumsum(0)
    launch = launch_module.Launch(Signature(()), 1)
    launch.host = launch.table = ends[:, None]
    values = torch.arange(int(ends[-1])) + 7
    wanted = [values[a:b].sum() for a, b in itertools.pairwise(ends)]
    found = levels.levels_of(launch)
    assert len(found) == 4
    for starts in found:
        assert starts.diff().max() <= 4
        values = torch.stack([values[a:b].sum() for a, b in itertools.pairwise(starts)])
    assert values.tolist() == [x.item() for x in wanted]


def test_sums_in_several_levels_equal_the_reference(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MOST", 1024)
    monkeypatch.setattr(levels, "MOST", 2)
    ends: list[Any] = []
    for engine_name in ("reference", "triton"):
        params = make(((0,), (90, 90), (33,), (0,), (1100,)), torch.float32)
        optimizer = build("lars", params, engine=engine_name, always_adapt=True)
        run(optimizer, params, 1)
        ends += [optimizer, params]
    assert differences(*ends) == []
    assert launches == [11, 2 * 6, 2 * 4, 2 * 5, 11]


def test_a_power_is_near_the_reference() -> None:
    """There is no power in Triton's language: 2 ** (b log2 a) loses some units in the last place."""
    ends = []
    for engine_name in ("reference", "triton"):
        params = make(((300,),), torch.float32)
        run(build("padam", params, partial=0.13, engine=engine_name), params, 3)
        ends.append(flat(params))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_complex_parameters_are_pairs() -> None:
    ends = []
    for engine_name in ("reference", "triton"):
        params = make(((5,), (3, 4)), torch.complex64)
        run(build("adamw", params, engine=engine_name), params, 2)
        ends.append(flat(params))
    assert torch.equal(*ends)


def test_what_it_cannot_serve_is_refused() -> None:
    params = make(((3, 4),), torch.float64)
    with pytest.raises(OptionError, match="computes in float32, and a parameter is float64"):
        run(build("adamw", params, engine="triton"), params, 1)
    run(build("adamw", params), params, 1)  # `auto` finds another


def test_a_cpu_is_served_in_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make(((3,),), torch.float32)
    optimizer = build("adamw", params, engine="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(OptionError, match="not on a GPU"):
        run(optimizer, params, 1)
    assert engines.describe("auto", optimizer.first_programs(), params) in ("compiled", "blocked")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, r"triton is not installed \(pip install 'lightning-optim\[triton\]'\)"),
        (SimpleNamespace(__version__="2.3.1"), r"triton 2\.3\.1 is installed, .* need 3\.1 or later \(pip install"),
        (SimpleNamespace(), r"triton does not import, for .*Install it anew: pip install 'lightning-optim\[triton\]'"),
    ],
)
def test_without_a_triton_that_serves_it_says_so(monkeypatch: pytest.MonkeyPatch, module: Any, words: str) -> None:
    params = make(((3,),), torch.float32)
    optimizer = build("adamw", params, engine="triton")
    if module is not None:
        module.__spec__ = importlib.util.find_spec("triton")
    monkeypatch.setitem(sys.modules, "triton", module)
    engine._missing.cache_clear()
    try:
        with pytest.raises(OptionError, match=words):
            run(optimizer, params, 1)
    finally:
        engine._missing.cache_clear()


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` runs another engine, and says why."""

    def fail(*args: Any, **given: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain.")

    monkeypatch.setattr(engine, "run_kernel", fail)
    params = make(((3,),), torch.float32)
    with pytest.raises(OptionError, match=r"NVIDIA driver is too old for kernels of triton .* Update the driver"):
        run(build("adamw", params, engine="triton"), params, 1)


def test_state_on_another_device_is_refused() -> None:
    params = make(((3,),), torch.float32)
    optimizer = build("adamw", params, engine="triton")
    run(optimizer, params, 1)
    optimizer.state[params[0]]["exp_avg"] = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="is on meta, and the parameter on cpu"):
        run(optimizer, params, 1)


def test_the_package_does_not_import_triton() -> None:
    """A few modules do, and those are imported by functions."""
    package = Path(engine.__file__).parents[2]
    importers = []
    for file in package.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "triton" and "engines" not in ast.dump(node) for name in names):
                importers.append(str(file.relative_to(package)))
    assert all(re.fullmatch(r"storage/(\w+/)?triton\.py|engines/triton/(functions|normals)\.py", x) for x in importers)
    code = "import sys, lightning_optim, lightning_optim.engines; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_text_can_be_read() -> None:
    params = make(((3,),), torch.float32)
    optimizer = build("lion", params, engine="reference")
    run(optimizer, params, 1)
    rows = [local(optimizer, p) for p in params]
    text = engine.source(optimizer.first_programs()[0], rows)
    assert "x0 = squarable(g)" in text
    assert "new_exp_avg = lerp(exp_avg, x0, " in text
    assert "tl.store(p_at + index, new_p, mask=inside)" in text


def local(optimizer: Optimizer, p: Tensor) -> LocalParameter:
    """A parameter and its gradient as engines see them."""
    param = LocalParameter.of(p, optimizer.state[p], optimizer.all_slots())
    param.grad = p.grad
    return param
