"""Pieces that are programs of their own: first steps, two ranks, hardware counters, and the tests that need a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

from benchmarks import two_ranks as both
from benchmarks.contenders import others, ours
from benchmarks.gpu.setting import Result, Setting
from benchmarks.pages import ROOT

TESTS = ("tests/gpu", "tests/callbacks/test_optimizer_state_memory.py")


def run_module(*words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m` with these words, in the root of the repository."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    whole = {**os.environ, "PYTHONPATH": path, **(environment or {})}
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=whole, cwd=ROOT)


def first_steps(setting: Setting) -> Result:
    """Seconds of a first step in a fresh process: with nothing compiled yet, and with kernels in the caches on disk."""
    import torch

    contenders = ours("adamw")[: 1 if setting.tiny else 2]
    contenders += [] if setting.tiny else others("adamw", torch.float32, ("torch.optim",))[0]
    which = "tiny" if setting.tiny else next(iter(setting.lists))
    found: Result = {}
    for contender in contenders:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            words = ["adamw", contender.label, "--device", str(setting.device), "--list", which]
            found[contender.label] = {}
            for what in ("cold", "warm"):
                done = run_module("benchmarks.first_step", *words, environment=caches)
                found[contender.label][what] = _last(done)
    return found


def two_ranks(setting: Setting) -> Result:
    """DDP and FSDP2 with two ranks on this device against one process."""
    return {"cases": both.two_ranks(setting.device.type)}


def counters(setting: Setting) -> Result:
    """Hardware counters of one launch of AdamW, with state in 32 and in 8 bits."""
    if not setting.on_gpu:
        return {"skipped": "needs a GPU"}
    return {f"{bits} bits": _last(run_module("benchmarks.one_kernel", "adamw", bits, "--ncu")) for bits in ("32", "8")}


def tests(setting: Setting) -> Result:
    """The tests that need a GPU."""
    if not setting.on_gpu:
        return {"skipped": "needs a GPU"}
    words = ("-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", "--durations=5")
    done = run_module("pytest", *words, *(name for name in TESTS if (ROOT / name).exists()))
    lines = done.stdout.splitlines()
    return {"summary": lines[-1] if lines else done.stderr[-500:], "output": lines[-150:], "status": done.returncode}


def _last(done: subprocess.CompletedProcess[str]) -> Result | str:
    """The object in the last line that a program printed, or the end of what it said where it failed."""
    lines: Sequence[str] = done.stdout.splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else (done.stderr or done.stdout)[-1500:]
