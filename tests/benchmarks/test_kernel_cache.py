"""The cache of kernels that travels, and the keys of kernels, where Triton compiles and does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
KEYS = """
import sys, torch
from benchmarks.kernel_checks import Case
from lightning_optim.engines import triton as engine
from tests.harness.sm90 import kernels
wanted = [("adamw", 8, "log"), ("lion", 8, "dynamic"), ("adan", 8, "log"), ("adamw", 32, "log")]
for words in wanted if sys.argv[1] == "forward" else reversed(wanted):
    for kernel in kernels(Case(*words, torch.float32), ((64, 64),)):
        print(*words, kernel.name, engine.load(kernel.name, kernel.text, kernel.formats).cache_key)
"""


def _run(*words: str, **environment: str) -> str:
    """What a program prints for which Triton compiles."""
    given = {word: value for word, value in os.environ.items() if word != "TRITON_INTERPRET"}
    given |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=given, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
def test_the_key_of_a_kernel_does_not_depend_on_what_was_compiled_before() -> None:
    """So a later process finds it in the cache, in whatever order it needs its kernels."""
    forward, backward = (_run("-c", KEYS, order).splitlines() for order in ("forward", "backward"))
    assert len(forward) == 4
    assert sorted(forward) == sorted(backward)


@pytest.mark.full
def test_a_cache_serves_in_another_folder_and_under_another_build_of_triton(tmp_path: Path) -> None:
    """All that a second filling asks for is there: in the same build, and in one whose names differ."""
    here, there, elsewhere, archive = (str(tmp_path / word) for word in ("here", "there", "elsewhere", "all.tar.xz"))
    tool = ("-m", "benchmarks.kernel_cache")
    _run(*tool, "fill", here, "--optimizers", "lion", "--only", "steps")
    packed = json.loads(_run(*tool, "pack", here, archive))
    assert packed["kernels"] > 0

    assert json.loads(_run(*tool, "unpack", archive, there))["renamed"] == 0
    before = {file.name for file in Path(there).iterdir()}
    _run(*tool, "fill", there, "--optimizers", "lion", "--only", "steps")
    assert {file.name for file in Path(there).iterdir()} == before

    other = "import runpy, sys, triton.runtime.cache as c; c.triton_key = lambda: 'other'; sys.argv[0] = ''; "
    run = "runpy.run_module('benchmarks.kernel_cache', run_name='__main__', alter_sys=True)"
    found = json.loads(_run("-c", other + run, "unpack", archive, elsewhere))
    assert found["renamed"] == found["kernels"] == packed["kernels"]
    assert not {*before} & {file.name for file in Path(elsewhere).iterdir() if list(file.glob("*.cubin"))}
