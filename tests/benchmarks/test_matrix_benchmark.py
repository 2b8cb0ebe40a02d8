"""The measurement of optimizers of whole matrices, at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import matrix
from benchmarks.pairs import Tensors
from benchmarks.shapes import gpt2


def test_both_sides_move_the_same_tensors_by_the_same_rules() -> None:
    shapes = gpt2(width=8, rows=20, length=4, layers=2)
    ends = []
    for make in (matrix.muon, matrix.Pair):
        tensors = Tensors(shapes)
        given = {"coefficients": "classic", "compute": "bfloat16"} if make is matrix.muon else {}
        optimizer = make(tensors.params, lr=1e-2, weight_decay=0.1, **given)
        optimizer.step()
        ends.append([p.detach() for p in tensors.params])
    matrices, rest = matrix.split(ends[0])
    assert (len(matrices), len(matrices) + len(rest)) == (8, len(shapes))
    for start, ours, theirs in zip(Tensors(shapes).params, *ends, strict=True):
        step = torch.linalg.vector_norm(theirs - start)
        assert torch.linalg.vector_norm(ours - theirs) < 0.05 * step  # products in bfloat16


def test_it_runs_and_writes_its_tables(tmp_path: Path) -> None:
    out = tmp_path / "matrix.json"
    matrix.main(["--tiny", "--out", str(out), "--rounds", "1", "--layers", "1", "--only", "Muon"])
    found = json.loads(out.read_text())
    assert all(row["times_base"] > 0 for row in found["rows"].values())
    assert "torch.optim.Muon" in matrix.page(found)
