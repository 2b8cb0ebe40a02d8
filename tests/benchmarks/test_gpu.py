"""The benchmark for GPUs, at sizes for Triton's interpreter."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import kernel_checks
from benchmarks.contenders import bytes_that_must_move, one_by_one, others, ours
from benchmarks.gpu import processes, report
from benchmarks.gpu.command import main
from benchmarks.gpu.plan import pieces
from benchmarks.gpu.processes import Piece
from benchmarks.gpu.setting import Result, Setting
from benchmarks.shapes import decoder_1b, gpt2_124m, many_small
from benchmarks.timing import random_params, side_by_side
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.engines import kernels
from lightning_optim.engines import triton as engine
from tests.harness.problems import build

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="sizes for the interpreter")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet_interpreter() -> Iterator[None]:
    """The interpreter is NumPy, which warns of what is masked out."""
    with np.errstate(all="ignore"):
        yield


def test_it_runs_in_pieces_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checks, bandwidth and a race; a budget that is spent begins nothing, and what is saved is not repeated."""
    out = tmp_path / "gpu.json"
    given = ["--tiny", "--rounds", "1", "--optimizers", "lion", "--out", str(out), "--commit", "abc"]
    assert main([*given, "--budget", "-1"]) == 0
    assert not out.exists()
    given += ["--only", "checks", "copy", "steps", "race/tiny/lion/"]
    assert main(given) == 0
    (device, found), *none = json.loads(out.read_text()).items()
    assert not none
    assert device == found["about"]["device"]
    results = found["pieces"]
    assert list(results) == ["copy", "checks/lion", "race/tiny/lion/float32", "steps/lion"]
    assert all(piece["commit"] == "abc" for piece in results.values())
    assert results["checks/lion"]["cases"] >= 4
    assert results["checks/lion"]["failed"] == {}
    rows = results["race/tiny/lion/float32"]["rows"]
    assert set(rows) == {"ours, 32 bits", "ours, 8 bits", "ours, 8 bits, dynamic"}
    assert all(row["ms"] > 0 and row["host_ms"] > 0 for row in rows.values())
    text = out.with_suffix(".md").read_text()
    assert "Kernels against the reference" in text
    assert "### lion, tiny, float32" in text
    capsys.readouterr()
    before = out.read_text()
    assert main(given) == 0
    assert out.read_text() == before
    assert "race/tiny" not in capsys.readouterr().out.split("###")[0]


def test_a_piece_that_fails_is_told_and_comes_last(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is no result, what follows it is measured, and the next call tries it after everything else."""
    out = tmp_path / "gpu.json"
    given = ["--tiny", "--rounds", "0", "--optimizers", "lion", "--out", str(out)]
    assert main([*given, "--only", "copy", "race/"]) == 1  # no round, so no median: whatever measures raises
    (found,) = json.loads(out.read_text()).values()
    assert list(found["pieces"]) == ["copy"]
    assert list(found["failed"]) == [
        "race/tiny/lion/float32",
        "race/tiny/adamw/bfloat16",
        "race/tiny/adamw/float32/slow",
    ]
    told = capfd.readouterr()
    assert "without a result: race/tiny/lion/float32, race/tiny/adamw/bfloat16" in told.err
    assert "Traceback" in told.err
    assert main([*given, "--only", "race/tiny/lion", "steps"]) == 1
    said = capfd.readouterr().out
    assert said.index("steps/lion: done") < said.index("race/tiny/lion/float32: ")


def _dies(_setting: Setting) -> Result:
    os._exit(3)


def _sleeps(_setting: Setting) -> Result:
    time.sleep(60)
    return {}


def _beside(_setting: Setting, folder: Path, others: int) -> Result:
    """The number of processes that are running at one time; it waits until there are as many as expected."""
    mine = folder / str(os.getpid())
    mine.touch()
    end = time.monotonic() + 20
    while len(list(folder.iterdir())) <= others and time.monotonic() < end:
        time.sleep(0.01)
    return {"seen": len(list(folder.iterdir()))}


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
def test_a_process_that_dies_or_hangs_ends_no_other(method: str) -> None:
    wanted = [Piece("dies", _dies), Piece("hangs", _sleeps, limit=0.3), Piece("copy", _fine)]
    found = dict(processes.run(wanted, Setting(tiny=True), math.inf, method))
    assert found["dies"].failed == "its process ended with 3"
    assert found["hangs"].failed == "took more than 0 s"
    assert found["copy"].result == {"fine": 1}


def _fine(_setting: Setting) -> Result:
    return {"fine": 1}


def test_pieces_without_a_clock_run_side_by_side(tmp_path: Path) -> None:
    several = functools.partial(_beside, folder=tmp_path, others=1)
    wanted = [Piece("one", several, alone=False), Piece("other", several, alone=False), Piece("third", _fine)]
    found = list(processes.run(wanted, Setting(tiny=True, jobs=2), math.inf, "fork"))
    assert {name for name, _ in found[:2]} == {"one", "other"}
    assert all(outcome.result == {"seen": 2} for _, outcome in found[:2])
    assert found[2][0] == "third"


def test_the_page_is_made_from_results_of_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices stand side by side, and the later file counts where two have measured the same piece."""

    def result(device: str, rate: float, failed: dict[str, str]) -> dict[str, Any]:
        about = {"device": device, "torch": "2", "peers": {"bitsandbytes": "1"}}
        return {
            device: {"about": about, "pieces": {"copy": {"bytes_per_second": rate, "commit": "abc"}}, "failed": failed}
        }

    files = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for file, content in zip(
        files, (result("X", 1e12, {"tests": "ended"}), result("Y", 2e12, {}), result("X", 3e12, {})), strict=True
    ):
        file.write_text(json.dumps(content))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "gpu.md"
    page.write_text("above\n<!-- measurements: written by x -->\nold\n<!-- end of measurements -->\nbelow\n")
    monkeypatch.setattr("benchmarks.pages.ROOT", tmp_path)
    assert main(["--render", *map(str, files)]) == 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "## X" in text
    assert "## Y" in text
    assert "moves 3.00 TB/s" in text
    assert "moves 1.00 TB/s" not in text
    assert "Without a result: tests (ended)" in text


def test_names_of_pieces_differ_and_all_optimizers_are_checked() -> None:
    names = [piece.name for piece in pieces(Setting())]
    assert len(names) == len(set(names))
    assert {name.removeprefix("checks/") for name in names if name.startswith("checks/")} == set(OPTIMIZERS)
    assert {name.removeprefix("steps/") for name in names if name.startswith("steps/")} == set(OPTIMIZERS)


def test_the_page_of_a_device_says_what_was_wrong() -> None:
    """Goals, refusals, wrong steps and counters, from numbers that were made up."""
    row: dict[str, Any] = {
        "bits": 32,
        "state_bytes": 8,
        "must_move_bytes": 28,
        "peak_bytes": 0,
        "first_step_s": 1.0,
        "ms": 2.0,
    }
    row |= {"ms_10": 1.0, "ms_90": 3.0, "host_ms": 0.1, "kernel_ms": 1.5, "launches": {"kernels": 1, "copies": 0}}
    races = {"torch AdamW fused": row, "ours, 32 bits": {**row, "ms": 1.0, "times_base": 0.5}, "peer": {"failed": "no"}}
    steps = {"waits": {"adamw, 32 bits": "RuntimeError: waits"}, "replays": {"adamw, 32 bits": "refused: it is"}}
    results = {
        "copy": {"bytes_per_second": 1e5},
        "checks/adamw": {"cases": 2, "failed": {"adamw, 8 bits": ["step 1: wrong"]}},
        "race/GPT-2 124M/adamw/float32": {"rows": races, "parameters": 1, "base": "torch AdamW fused", "absent": {}},
        "steps/adamw": steps,
        "two ranks": {"cases": {"ddp, adamw": {"agrees": True}, "fsdp2, lamb": {"agrees": False, "differs": 1.0}}},
        "tests": {"summary": "== 3 passed =="},
        "replay/10,000 small": {"rows": {"ours": row}},
        "counters": {"32 bits": {"registers": 80}, "8 bits": "it failed", "commit": "abc"},
        "first steps": {"ours": {"cold": {"first": 1.0}, "warm": {"first": 0.5, "third": 0.001}}, "commit": "abc"},
    }
    about = {"device": "X", "torch": "2", "peers": {}}
    text = report.page({"X": {"about": about, "pieces": results, "failed": {"race/x": "took more than 90 s"}}})
    for said in (
        "2 cases of 1 optimizers, 1 failed",
        "adamw, 8 bits: step 1: wrong",
        "make the host wait: adamw, 32 bits (RuntimeError: waits), of 1",
        "Without `capturable`: adamw, 32 bits",
        "2 cases, wrong: fsdp2, lamb (differs by 1.0e+00)",
        "3 passed",
        "race/x (took more than 90 s)",
        "AdamW at 32 bits at most 1.0 of torch's fused time | 0.50 | yes",
        "| peer | failed: no |",
        "| registers | 80 |",
        "| ours | 1.00 | 0.50 | 1.0 |",
    ):
        assert said in text


@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_kernel_that_does_nothing_is_found(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernel_checks.cases("adamw", quick=True)[index]
    monkeypatch.setattr(engine, "run_kernel", lambda *_args, **_options: None)
    found = list(kernel_checks.Check(case, CPU, ((7,), (64, 64))).problems())
    assert any("the parameter is" in problem for problem in found)
    assert any("exp_avg" in problem for problem in found)


@pytest.mark.parametrize(("name", "turns"), [("radam", 6), ("adabelief", 6), ("schedule_free_radam", 5), ("pnm", 2)])
def test_programs_of_later_steps_are_checked(name: str, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """RAdam rectifies from its sixth step on. A check that does not get there says so."""
    (case, *_) = kernel_checks.cases(name, quick=True)
    check = kernel_checks.Check(case, CPU, ((7,),))
    assert list(check.problems()) == []
    assert turns in kernel_checks.first_steps(check.by_kernel)
    assert check.ran >= check.every
    if turns > 3:
        monkeypatch.setattr(kernel_checks, "first_steps", lambda _optimizer: [])
        assert any("a program was not run" in x for x in kernel_checks.Check(case, CPU, ((7,),)).problems())


def test_arguments_of_functions_of_matrices_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no sign of an eigenvector."""
    (case, *_) = kernel_checks.cases("soap", quick=True)
    assert list(kernel_checks.Check(case, CPU, ((6, 8),)).problems()) == []
    run = kernels.KernelBackend.store

    def halved(self: Any, plan: Any, buffers: Any) -> None:
        run(self, plan, buffers)
        for param in plan.batch.params:
            for name in buffers:
                param.buffers[name].mul_(0.5)

    monkeypatch.setattr(kernels.KernelBackend, "store", halved)
    assert any("argument 0 of" in problem for problem in kernel_checks.Check(case, CPU, ((6, 8),)).problems())


def test_every_optimizer_has_cases() -> None:
    for name in OPTIMIZERS:
        full = kernel_checks.cases(name)
        assert {case.dtype for case in full} == set(kernel_checks.DTYPES)
        assert {"", "averages"} <= {case.stages for case in full}
        assert 32 in {case.bits for case in kernel_checks.cases(name, quick=True)}


def test_lists_are_as_large_as_they_say() -> None:
    def count(shapes: list[tuple[int, ...]]) -> int:
        return sum(math.prod(shape) for shape in shapes)

    assert count(gpt2_124m()) == 124_439_808  # as published
    assert len(gpt2_124m()) == 148
    assert count(decoder_1b()) == 1_100_048_384  # as published
    assert len(decoder_1b()) == 201
    assert count(many_small()) == 10_000_000


@pytest.mark.parametrize(("name", "per_parameter"), [("adamw", 28), ("lion", 20), ("adan", 44), ("lamb", 44)])
def test_bytes_that_must_move(name: str, per_parameter: int) -> None:
    """Counted by hand at 32 bits: the parameter twice, the gradient, each slot twice; LAMB reads all four twice."""
    params = random_params([(64, 70)], torch.float32, CPU)
    optimizer = build(name, params, engine="reference", lr=1e-3, **({"weight_decay": 0.1} if name == "lamb" else {}))
    optimizer.step()
    assert bytes_that_must_move(optimizer, 0) == per_parameter * 64 * 70
    plain = torch.optim.AdamW(params)
    assert bytes_that_must_move(plain, 8 * 64 * 70) == 28 * 64 * 70


def test_a_call_per_tensor_is_adamw() -> None:
    ends = []
    for make in (one_by_one().make, others("adamw", torch.float32, ("torch.optim",))[0][0].make, ours("adamw")[0].make):
        params = random_params([(30,), (4, 5)], torch.float32, CPU)
        optimizer = make(params)
        for _ in range(3):
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2])


def test_rounds_alternate() -> None:
    called: list[str] = []
    calls: dict[str, Any] = {name: lambda name=name: called.append(name) for name in "ab"}
    times = side_by_side(calls, CPU, rounds=2)
    assert len(times["a"].device) == len(times["a"].host) == len(times["b"].device)
    turns = "".join(name for i, name in enumerate(called) if i == 0 or called[i - 1] != name)
    assert turns == "abab"
