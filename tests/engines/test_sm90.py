"""Kernels compiled for sm_90, which needs no GPU: what they take, how they access memory, and in which order."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_checks
from lightning_optim.engines import triton as engine
from lightning_optim.engines.kernels import Kernel
from lightning_optim.language.slot import Slot
from lightning_optim.storage.policy import FORMATS
from tests.harness.columns import Code, races
from tests.harness.problems import NAMES

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="it is compiled where no GPU is needed"),
    pytest.mark.timeout(900),
]

# Some of each kind: the pass that writes, sums, means, arguments of functions of matrices, rectified programs, the
# weights to evaluate, stages, normal numbers, each format, and columns that begin between multiples of 16 bytes.
SOME = (
    *("adamw:32", "adamw:16", "adamw:8", "radam:8", "pnm:8", "lamb:32", "adafactor:32", "muon:32", "padam:32"),
    *("lion+averages:32", "adamw+moments:32", "adan:32@gradients", "adamw:8@all", "combine_tiles"),
)


@functools.cache
def reports(*words: str) -> list[dict[str, Any]]:
    """What a process that compiles, and does not interpret, says of the kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.harness.sm90", *words]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=1500)
    assert not done.returncode, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    """No spills, 16 bytes at a time for what is stored in 16 or 32 bits, and no element stored before it is loaded."""
    assert found
    for report in found:
        assert report["stack"] == 0, report
        assert report["local"] == 0, report
        assert report["registers"] <= report["bound"], report
        assert report.get("loads", {}).get("16", 0) >= report["wide_loads"], report
        assert report.get("stores", {}).get("16", 0) >= report["wide_stores"], report
        assert not report.get("races"), report


def test_kernels_compile_for_sm_90() -> None:
    check(reports(*SOME))


def test_every_function_is_in_some_kernel() -> None:
    """None of those that printed kernels may call is left out of what is compiled."""
    functions = {**engine._functions()}
    slots = ((Slot("m"), None), (Slot("v", signed=False), None), (Slot("m", root_of="v"), "v"))
    for form in (make(slot, partner) for make in FORMATS.values() for slot, partner in slots):
        functions.update(form.triton())
    compiled = {word: function for word, function in functions.items() if hasattr(function, "fn")}
    called = {word for report in reports(*SOME) for word in (report["kernel"], *report.get("calls", ()))}
    waiting = [word for word in called if word in compiled]
    while waiting:
        body = inspect.getsource(compiled[waiting.pop()].fn)
        new = {word for word in re.findall(r"\b(\w+)\(", body) if word in compiled} - called
        called |= new
        waiting += new
    assert compiled.keys() <= called


@pytest.mark.parametrize("name", ["radam", "adafactor"])
def test_what_is_compared_on_a_device_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every_text_is_compiled(name, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_compared_on_a_device_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every_text_is_compiled(name, monkeypatch)


def every_text_is_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.harness import sm90

    texts: set[str] = set()
    build = engine.BACKEND.build

    def noted(kernel: Kernel) -> Any:
        texts.add(kernel.text)
        return build(kernel)

    monkeypatch.setattr(engine.BACKEND, "build", noted)
    monkeypatch.setattr(engine, "run_kernel", lambda *_args, **_options: None)  # what it prints depends on no number
    for case in kernel_checks.cases(name):
        assert list(kernel_checks.Check(case, sm90.CPU, kernel_checks.SHAPES).problems())
    monkeypatch.undo()
    assert texts
    assert texts <= {kernel.text for _, kernel in sm90.printed(name)}


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", ["", "+averages", "+noise", "+moments", "@gradients", "@all"])
def test_all_kernels_compile_for_sm_90(name: str, more: str) -> None:
    check(reports(f"{name}{more}"))


CODE = """
#rows = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [1, 32], warpsPerCTA = [4, 1], order = [1, 0]}>
#halves = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [1, 32], warpsPerCTA = [2, 2], order = [1, 0]}>
#first = #ttg.blocked<{sizePerThread = [1, 1], threadsPerWarp = [4, 8], warpsPerCTA = [1, 4], order = [0, 1]}>
module {
  tt.func public @swap(%at: !tt.ptr<i64>) {
    %m_at = tt.int_to_ptr %at : i64 -> !tt.ptr<f32> loc(#loc1)
    %m = tt.splat %m_at : !tt.ptr<f32> -> tensor<SHAPE!tt.ptr<f32>, #LOADED> loc("m"(#loc2))
    %m_1 = tt.addptr %m, %i : tensor<SHAPE!tt.ptr<f32>, #LOADED>, tensor<SHAPEi32, #LOADED>
    %m_2 = tt.splat %m_at : !tt.ptr<f32> -> tensor<SHAPE!tt.ptr<f32>, #STORED>
    %m_3 = tt.addptr %m_2, %j : tensor<SHAPE!tt.ptr<f32>, #STORED>, tensor<SHAPEi32, #STORED>
    %m_4 = tt.load %m_1, %k : tensor<SHAPE!tt.ptr<f32>, #LOADED> loc(#loc3)
    WAIT
    tt.store %m_3, %n, %k : tensor<SHAPE!tt.ptr<f32>, #STORED> loc(callsite(#loc4 at #loc5))
  }
}
"""
ACROSS = "%n = ttg.convert_layout %x : tensor<4x256xf32, #rows> -> tensor<4x256xf32, #halves> loc(#loc6)"
WITHIN = "%n = ttg.convert_layout %x : tensor<4x256xf32, #rows> -> tensor<4x256xf32, #rows>"


@pytest.mark.parametrize(
    ("shape", "loaded", "stored", "wait", "found"),
    [
        ("4x256x", "rows", "rows", "", False),
        ("4x256x", "rows", "halves", "", True),
        ("4x256x", "rows", "halves", WITHIN, True),
        ("4x256x", "rows", "halves", ACROSS, False),
        ("4x256x", "rows", "halves", f"scf.if %c {{\n{ACROSS}\n}}", True),  # not always
        ("4x256x", "rows", "halves", "ttg.local_barrier", False),
        ("4x1x", "rows", "first", "", True),
        ("4x1x", "first", "first", "", True),  # all warps load what the first one stores
        ("4x1x", "rows", "rows", "", False),
    ],
)
def test_a_column_that_is_stored_before_it_is_loaded_is_found(
    shape: str, loaded: str, stored: str, wait: str, found: bool
) -> None:
    words = {"SHAPE": shape, "LOADED": loaded, "STORED": stored, "WAIT": wait}
    assert bool(list(races(re.sub("|".join(words), lambda word: words[word[0]], CODE)))) == found


def test_the_holders_of_an_element_are_found() -> None:
    """Four warps of 32 threads with eight elements each: a row is a warp's, its scale that of all its threads."""
    code = Code.read(CODE.replace("SHAPE", "4x256x").replace("LOADED", "rows").replace("STORED", "halves"))
    of_rows, of_halves, of_scales = (
        code.owners(f"tensor<{kind}>") for kind in ("4x256xf32, #rows", "4x256xf32, #halves", "4x1xf32, #rows")
    )
    assert [of_rows[i] for i in (0, 7, 8, 255, 256)] == [[(0, 0)], [(0, 0)], [(0, 1)], [(0, 31)], [(1, 0)]]
    assert [of_halves[i] for i in (0, 127, 128, 256)] == [[(0, 0)], [(0, 31)], [(1, 0)], [(2, 0)]]
    assert of_scales[2] == [(2, lane) for lane in range(32)]
