"""The comparison of two ranks with one process, on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import two_ranks as module
from benchmarks.two_ranks import cases, train_cases, two_ranks


@pytest.mark.full
def test_two_ranks_agree_with_one_process_in_every_case() -> None:
    found = two_ranks("cpu", "reference")
    assert list(found) == [str(case) for case in cases()]
    assert [name for name, result in found.items() if not result["agrees"]] == []
    assert all(0 <= result["differs"] <= result["allowed"] for result in found.values())


@pytest.mark.full
def test_a_case_that_fails_does_not_end_the_others() -> None:
    found = two_ranks("cpu", "no such engine")
    assert [name for name, result in found.items() if "no such engine" not in result["failed"]] == []
    assert len(found) == len(cases())


def crashes_after_the_first(device: str, engine: str, first: int, end: float, file: Path) -> None:
    """One rank ends after the first case, and later there is no time for any other."""
    if first:
        train_cases(device, engine, first, 0.0, file)
        return
    only = cases()[:1]
    module.cases = lambda: only
    train_cases(device, engine, first, end, file)
    if os.environ["RANK"] == "0":
        os._exit(5)


@pytest.mark.full
def test_a_process_that_crashes_costs_its_own_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train_cases", crashes_after_the_first)
    one, other, *rest = two_ranks("cpu", "reference").values()
    assert one["agrees"]
    assert "exit code 5" in other["failed"]
    assert [result["failed"] for result in rest] == ["the time was over"] * (len(cases()) - 2)
