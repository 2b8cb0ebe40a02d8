"""The comparison of two ranks with one process, on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.two_ranks import cases, two_ranks


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
