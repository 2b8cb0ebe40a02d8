"""The benchmark for GPUs, at sizes for Triton's interpreter."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu, kernel_checks
from benchmarks.contenders import bytes_that_must_move, one_by_one, others, ours
from benchmarks.shapes import decoder_1b, gpt2_124m, many_small
from benchmarks.timing import random_params, side_by_side
from lightning_optim.core.optimizer import OPTIMIZERS
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
    given = ["--tiny", "--rounds", "1", "--optimizers", "lion", "--out", str(out)]
    assert gpu.main([*given, "--budget", "-1"]) == 0
    assert not out.exists()
    given += ["--only", "checks", "copy", "host", "graphs", "race/tiny/lion/"]
    assert gpu.main([*given]) == 0
    pieces = json.loads(out.read_text())["pieces"]
    assert list(pieces) == ["checks/lion", "copy", "host waits", "graphs", "race/tiny/lion/float32"]
    assert pieces["checks/lion"]["cases"] >= 4
    assert pieces["checks/lion"]["failed"] == {}
    rows = pieces["race/tiny/lion/float32"]["rows"]
    assert set(rows) == {"ours, 32 bits", "ours, 8 bits, log", "ours, 8 bits, dynamic"}
    assert all(row["ms"] > 0 and row["host_ms"] > 0 for row in rows.values())
    text = out.with_suffix(".md").read_text()
    assert "Kernels against the reference" in text
    assert "### lion, tiny, float32" in text
    capsys.readouterr()
    before = out.read_text()
    assert gpu.main([*given]) == 0
    assert out.read_text() == before
    assert "race/tiny" not in capsys.readouterr().out.split("###")[0]


def test_a_piece_that_raises_ends_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told, it is not saved, and what follows it is measured."""
    out = tmp_path / "gpu.json"
    given = ["--tiny", "--rounds", "0", "--optimizers", "lion", "--out", str(out), "--only", "copy", "graphs", "race/"]
    assert gpu.main(given) == 1  # no round, so no median: whatever measures raises
    assert list(json.loads(out.read_text())["pieces"]) == ["copy", "graphs"]
    told = capsys.readouterr().err
    assert "not measured: race/tiny/lion/float32, race/tiny/adamw/bfloat16" in told
    assert "Traceback" in told


@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_kernel_that_does_nothing_is_found(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernel_checks.cases("adamw", quick=True)[index]
    monkeypatch.setattr(engine, "run_kernel", lambda *_args, **_options: None)
    found = list(kernel_checks.check(case, CPU, ((7,), (64, 64))))
    assert any("the parameter differs" in problem for problem in found)
    assert any("exp_avg" in problem for problem in found)


def test_every_optimizer_has_cases() -> None:
    for name in OPTIMIZERS:
        full = kernel_checks.cases(name)
        assert {case.dtype for case in full} == set(kernel_checks.DTYPES)
        assert {case.staged for case in full} == {True, False}
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
