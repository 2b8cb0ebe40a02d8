"""Every experiment at its tiniest size, the rule of verdicts, and what the command refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.claims.experiments import load, names
from benchmarks.claims.page import PAGES, details, findings_of
from benchmarks.claims.running import from_plain, run_claim
from benchmarks.claims.size import SMALL, TINY


@pytest.mark.parametrize("name", names())
def test_an_experiment_runs_at_its_tiniest_size(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    claim = load(name)
    record = run_claim(claim, TINY, tmp_path, processes=1)
    results = from_plain(record, claim, TINY)
    findings = findings_of(claim, results)
    assert findings
    assert all(math.isfinite(one.p) for one in findings)
    figure = claim.draw(results)
    figure.savefig(tmp_path / "picture.png")
    assert all(one.statement in details(claim, findings, record) for one in findings)


@pytest.mark.parametrize("name", names())
def test_the_small_size_compares_five_seeds_and_fits(name: str) -> None:
    parts = load(name).parts(SMALL)
    assert all(part.seeds >= 5 and part.bytes < 4e9 for part in parts)
    assert len({part.name for part in parts}) == len(parts)
    assert (PAGES / "claims" / f"{name}.md").exists()
