"""Verdicts on processes whose answer is known, with numbers of the specification and of closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from lightning_optim import OptionError
from lightning_optim.analysis.block_means import smirnov, two_sided
from lightning_optim.analysis.gradient_square import full_gradient
from lightning_optim.analysis.stationarity import stationarity

APPROACHING, INVARIANT, MOVING = "approaching a stationary point", "invariant measure reached", "still moving"


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def descent(
    steps: int, curvature: Tensor, rate: float, noise: float, start: Tensor, generator: torch.Generator, beta: float = 0
) -> tuple[Tensor, Tensor]:
    """SGD on a quadratic: its iterates and losses."""
    theta, momentum, found = start.clone(), torch.zeros_like(start), []
    for _ in range(steps):
        found.append(theta)
        momentum = beta * momentum + curvature * theta + noise * normal(generator, len(theta))
        theta = theta - rate * momentum
    iterates = torch.stack(found)
    return iterates, (curvature * iterates**2).sum(1) / 2


def process(kind: str, seed: int) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    size = (1, 3, 30)[seed % 3]
    curvature = torch.logspace(-1, 0, size, dtype=torch.float64) if size > 1 else torch.tensor([0.7]).double()
    far = 5 * normal(g, size) + 1
    rate = (0.3, 0.6, 0.9)[seed // 3 % 3]
    if kind == "descent":
        return descent(600, curvature, rate, 0, far, g)
    if kind == "descent in a long valley":
        return descent(800, torch.logspace(-3, 0, 20, dtype=torch.float64), rate, 0, normal(g, 20), g)
    if kind == "heavy ball":
        return descent(600, curvature, rate / 3, 0, far, g, 0.9)
    if kind == "noise that vanishes at the minimum":
        found = [far]
        for _ in range(800):
            found.append(found[-1] * (1 - rate * curvature * (1 + 0.5 * normal(g, size))))
        return torch.stack(found), None
    if kind == "two-cycle":
        return descent(400 + seed, torch.tensor([2.0]).double(), 1.0, 0, torch.tensor([0.3]).double(), g)
    if kind == "stationary SGD":
        spread = (rate / (curvature * (2 - rate * curvature))).sqrt()
        return descent(4000, curvature, rate, 1.0, spread * normal(g, size), g)
    if kind == "SGD from far":
        return descent(4000, curvature, rate, 1.0, 30 * far, g)
    if kind == "SGD from far, not there yet":
        flat = torch.full((size,), 0.7 / 1500, dtype=torch.float64)
        return descent(1500, flat, 1.0, 0.01, 2 * torch.ones_like(flat), g)
    iterates, losses = process("stationary SGD", seed)
    ramp = torch.linspace(0, 1, len(iterates), dtype=torch.float64)[:, None]
    if kind == "a drift beside noise":
        return iterates + 12 * ramp * normal(g, size), losses
    if kind == "a drift alone":
        return ramp * normal(g, size) + 3, None
    if kind == "a random walk":
        return normal(g, 2000, size).cumsum(0), None
    assert kind == "noise that grows"
    return iterates * (1 + 4 * ramp), None


ANSWERS = {
    "descent": APPROACHING,
    "descent in a long valley": APPROACHING,
    "heavy ball": APPROACHING,
    "noise that vanishes at the minimum": APPROACHING,
    "two-cycle": INVARIANT,
    "stationary SGD": INVARIANT,
    "SGD from far": INVARIANT,
    "SGD from far, not there yet": MOVING,
    "a drift beside noise": MOVING,
    "a drift alone": MOVING,
    "a random walk": MOVING,
    "noise that grows": MOVING,
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_verdicts(kind: str) -> None:
    """Nine seeds, sizes and learning rates; `benchmarks/stationarity.py` counts over more."""
    for seed in range(9):
        iterates, losses = process(kind, seed)
        for given in (None,) if losses is None else (None, losses):
            found = stationarity(iterates, given)
            assert found.verdict == ANSWERS[kind], f"{kind}, seed {seed}: {found}"


@pytest.mark.parametrize("kind", ["descent", "stationary SGD", "a drift beside noise"])
def test_units_do_not_change_a_verdict(kind: str) -> None:
    iterates, losses = process(kind, 1)
    assert losses is not None
    first = stationarity(iterates, losses)
    for of_parameters, of_losses, zero in ((1e-6, 1e8, 0.0), (1e5, 1e-9, 1e3), (-1.0, 1.0, -7.0)):
        found = stationarity(iterates * of_parameters + zero, losses * of_losses + zero)
        assert found.verdict == first.verdict
        assert found.slowdown == pytest.approx(first.slowdown, rel=1e-3)


def test_numbers_of_the_stationary_law() -> None:
    """E loss = lambda V / 2 and E |step|^2 = 2 V (1 - r) of the Ornstein-Uhlenbeck law."""
    rate, curvature, variance = 0.4, 1.3, 0.7
    g = torch.Generator().manual_seed(0)
    spread = rate * variance / (curvature * (2 - rate * curvature))
    start = math.sqrt(spread) * normal(g, 40)
    iterates, losses = descent(4000, curvature * torch.ones(40).double(), rate, math.sqrt(variance), start, g)
    found = stationarity(iterates, losses)
    assert found.loss == pytest.approx(40 * 0.094594594595, rel=0.02)
    assert abs(found.loss_slope) < 4 * found.loss_slope_error
    assert found.level == pytest.approx(1, rel=0.02)
    assert found.displacement**2 == pytest.approx(40 * 0.291060291060, rel=0.8)


def test_the_gradient_says_when_weights_are_frozen() -> None:
    """Steps that shrink by a schedule, while the gradient stays."""
    steps = 0.98 ** torch.arange(600, dtype=torch.float64)
    iterates = steps.cumsum(0)[:, None] * torch.ones(1, 3, dtype=torch.float64)
    gradient = torch.ones(3, dtype=torch.float64)
    assert stationarity(iterates, gradients=[gradient, 0.9 * gradient]).verdict == "undecided"
    assert stationarity(iterates, gradients=[gradient, 0.01 * gradient]).verdict == APPROACHING
    noisy = gradient + 20 * normal(torch.Generator().manual_seed(0), 2, 30, 3)
    assert stationarity(iterates, gradients=[gradient, noisy[0]]).gradient is not None


def test_full_gradients() -> None:
    """The pair form, and the scatter of estimates against their errors."""
    g = torch.Generator().manual_seed(1)
    batches = normal(g, 7, 4)
    pairs = batches @ batches.T
    exact = float(pairs.sum() - pairs.trace()) / (7 * 6)
    assert full_gradient(batches).square == pytest.approx(exact, rel=1e-12)
    many = [full_gradient(0.3 + normal(g, 12, 10)) for _ in range(300)]
    squares = torch.tensor([one.square for one in many])
    errors = torch.tensor([one.error for one in many])
    assert squares.mean() == pytest.approx(0.9, abs=4 * float(squares.std()) / math.sqrt(300))
    assert errors.square().mean().sqrt() == pytest.approx(float(squares.std()), rel=0.2)


def test_tests_are_those_of_scipy() -> None:
    g = torch.Generator().manual_seed(2)
    for scale in (1.0, 1.7):
        a, b = normal(g, 60), scale * normal(g, 50)
        theirs: Any = scipy.stats.ks_2samp(a.numpy(), b.numpy(), method="asymp")
        distance, p = smirnov(a, b)
        assert distance == pytest.approx(theirs.statistic)
        assert p == pytest.approx(theirs.pvalue, abs=0.05)
    for t, left in ((1.0, 3.0), (3.0, 5.0), (5.0, 12.0), (4.0, 60.0)):
        assert two_sided(t, left) == pytest.approx(2 * scipy.stats.t.sf(t, left), rel=0.06)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([torch.ones(63, 2)], "at least 64"),
        ([[torch.ones(2), torch.ones(3)]], "different numbers of parameters"),
        ([torch.full((100, 1), math.nan)], "diverged"),
        ([torch.ones(100, 1), [1.0]], "1 losses for 100 iterates"),
        ([torch.ones(100, 1), None, []], "gradients is empty"),
        ([torch.ones(100, 1), None, [torch.tensor([math.inf])]], "NaN or infinite"),
        ([torch.ones(100, 2), None, [torch.ones(3)]], "has 3 elements, and iterates have 2"),
        ([[]], "at least 64"),
        ([None], "iterates=None must be a tensor of real numbers"),
        ([[{"w": torch.ones(2)}] * 100], "must be a tensor of real numbers"),
        ([torch.ones(100, 1, dtype=torch.complex64)], "must be a tensor of real numbers"),
        ([torch.ones(100, 1), ["low"] * 100], r"losses=\['low'"),
        ([torch.ones(100, 1), None, None, -1], "seed=-1 must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(arguments: list[Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        stationarity(*arguments)


def test_weights_at_rest_have_arrived() -> None:
    assert stationarity(torch.ones(100, 3)).verdict == APPROACHING


def test_a_run_that_diverges_is_moving_however_large_it_gets() -> None:
    """Squares of 1e180 are no numbers any more."""
    iterates = torch.tensor([-1.5], dtype=torch.float64) ** torch.arange(1000, dtype=torch.float64)
    found = stationarity(iterates, iterates.abs())
    assert found.verdict == MOVING
    assert "growing" in found.evidence
    assert found.loss == pytest.approx(float(iterates[750:].abs().mean()), rel=0.1)


def test_iterates_may_be_lists_of_anything_with_numbers() -> None:
    g = torch.Generator().manual_seed(3)
    iterates = normal(g, 200, 3)
    gradients = normal(g, 2, 3)
    expected = stationarity(iterates, iterates[:, 0], gradients)
    parts = [(row[:1], row[1:].view(1, 2)) for row in iterates]
    pairs = [[one[:2], one[2:]] for one in gradients]
    assert stationarity(parts, iterates[:, 0].tolist(), pairs) == expected
    arrays: list[Any] = [iterates.numpy(), iterates[:, 0].numpy(), gradients.numpy()]
    assert stationarity(*arrays) == stationarity(iterates.tolist(), *arrays[1:]) == expected
    one = stationarity(iterates[:, 0].tolist(), gradients=[1.0, 0.5])
    assert str(one) == str(stationarity(iterates[:, :1], gradients=[torch.ones(1), torch.ones(1) / 2]))
