"""Statistics of a race against scipy, and against definitions."""

from __future__ import annotations

import itertools
import random

import pytest
from scipy import stats

from lightning_optim.race import student
from lightning_optim.race.statistics import holm, paired

FREEDOMS = [*range(1, 31), 100, 101, 1000]


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_students_t(freedom: int) -> None:
    """Rounding: scipy's own value of one degree of freedom is off by 2e-14 at t = 0.001."""
    for t in (0.0, 1e-3, 0.5, 1.0, 2.0, 3.7, 20.0, 1e3):
        assert student.two_sided(-t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), abs=1e-13)
    for level in (0.5, 0.9, 0.95, 0.99):
        assert student.quantile(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-10)


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
def test_paired_differences(seeds: int) -> None:
    numbers = random.Random(seeds)
    values = {seed: numbers.gauss(1, 1) for seed in range(seeds)}
    others = {seed: numbers.gauss(0, 1) for seed in range(seeds + 2)}  # two that the candidate has not finished
    expected = stats.ttest_rel(list(values.values()), [others[seed] for seed in values])
    found = paired(values, others)
    assert found is not None
    interval = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high), rel=1e-9)


def test_differences_without_a_spread_are_not_tested() -> None:
    same = paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same is not None
    assert (same.mean, same.p) == (0.0, 1.0)
    for shifted in (paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}), paired({0: 2.0}, {0: 1.0})):
        assert shifted is not None
        assert (shifted.mean, shifted.p, shifted.low) == (1.0, None, None)
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_holm_is_the_closure_of_bonferroni() -> None:
    """A hypothesis holds together with others: its p-value is the largest of Bonferroni's over all sets with it."""
    numbers = random.Random(0)
    for count in range(1, 6):
        p = [numbers.random() ** 3 for _ in range(count)]
        sets = [s for size in range(1, count + 1) for s in itertools.combinations(range(count), size)]
        expected = [max(min(1.0, len(s) * min(p[i] for i in s)) for s in sets if one in s) for one in range(count)]
        assert holm(p) == pytest.approx(expected)
