"""Curvature of batches against random matrices, worked numbers, and the rates that follow from a spectrum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_optim import OptionError
from lightning_optim.analysis import batch_size, spectrum_rates, stability
from lightning_optim.analysis.batch_size import (
    batch_eigenvalue,
    curvature_factor,
    effective_batch,
    eigenvector_overlap,
    full_eigenvalue,
    hessian_noise,
    learning_rate_factor,
    least_damping,
    noise_edge,
)
from lightning_optim.analysis.spectrum_rates import Method, Small, from_spectrum, heavy_ball
from lightning_optim.analysis.stability import Momentum, stability_threshold

RITZ = [-2.817204445980, 0.036020875848, 0.267414423979, 1.793066946737, 7.273224038776]
WEIGHTS = [0.109497885105, 0.439777505623, 0.307665292560, 0.034489020804, 0.108570295909]
P, SIGMA = 2000, 0.02  # of the worked numbers


@pytest.mark.parametrize(
    ("batch", "samples", "noise", "top"),
    [
        (1, math.inf, 0.8, 1.788854382),
        (4, math.inf, 0.2, 0.9),
        (16, math.inf, 0.05, 0.6),
        (64, math.inf, 0.0125, 0.525),
        (256, math.inf, 0.003125, 0.50625),
        (1024, math.inf, 0.00078125, 0.5015625),
        (64, 50000, 0.012484, 0.524968),
    ],
)
def test_worked_numbers_of_batches(batch: int, samples: float, noise: float, top: float) -> None:
    found = P * SIGMA**2 / effective_batch(batch, samples)
    assert found == pytest.approx(noise, rel=1e-6)
    assert batch_eigenvalue(0.5, found) == pytest.approx(top, abs=1e-6)
    assert batch_eigenvalue(-0.5, found) == -batch_eigenvalue(0.5, found)
    if found < 0.25:
        assert full_eigenvalue(batch_eigenvalue(0.5, found), found) == pytest.approx(0.5, abs=1e-12)
    expected = batch_eigenvalue(0.5, 0.8) / top
    factor = curvature_factor(batch, 1, 0.5, P * SIGMA**2, samples=math.inf)
    if samples == math.inf:
        assert factor == pytest.approx(expected, rel=1e-7)
        assert curvature_factor(batch, 1, 0.5, P * SIGMA**2, "sqrt") == pytest.approx(math.sqrt(expected), rel=1e-7)


@pytest.mark.parametrize(("noise", "overlap"), [(0.0125, 0.95), (0.05, 0.8), (0.2, 0.2), (0.3, 0.0)])
def test_eigenvalues_are_those_of_random_matrices(noise: float, overlap: float) -> None:
    """One of P = 800; its top lies within a few P^(-1/2) of the limit, and the edge of noise within P^(-2/3)."""
    rng, size = np.random.default_rng(0), 800
    x = rng.standard_normal((size, size)) * math.sqrt(noise / size)
    x = (x + x.T) / math.sqrt(2)
    x[0, 0] += 0.5
    values, vectors = np.linalg.eigh(x)
    assert values[-1] == pytest.approx(batch_eigenvalue(0.5, noise), rel=0.03)
    assert values[0] == pytest.approx(-noise_edge(noise), rel=0.03)
    assert eigenvector_overlap(0.5, noise) == pytest.approx(overlap, abs=1e-12)
    if noise < 0.2:  # near the threshold one draw says nothing
        assert vectors[0, -1] ** 2 == pytest.approx(overlap, abs=0.05)


def test_noise_is_estimated_without_bias() -> None:
    rng, size, batches = np.random.default_rng(1), 400, 6
    z = torch.from_numpy(rng.standard_normal(size))
    z /= z.norm()
    noise = [torch.from_numpy(rng.standard_normal((size, size)) * 0.1) for _ in range(batches)]
    products = [[((n + n.mT) / math.sqrt(2) + torch.eye(size)) @ z] for n in noise]
    assert hessian_noise(products) == pytest.approx(size * 0.01, rel=0.15)
    with pytest.raises(OptionError, match="of two or more"):
        hessian_noise(products[:1])


def test_rules_for_learning_rates() -> None:
    assert 1e-3 * learning_rate_factor(4096, 256) == pytest.approx(0.016)
    assert 1e-3 * learning_rate_factor(4096, 256, "sqrt") == pytest.approx(0.004)
    assert curvature_factor(2, 1, eigenvalue=1e3, noise=1e-9) == pytest.approx(1)  # there is no noise left
    assert batch_size.least_damping(4.0, 0.5, 0.05) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("method", "small", "lr", "momentum"),
    [
        ("gradient_descent", "median", 0.220597375839, 0.0),
        ("heavy_ball", "least", 0.480022657839, 0.754301585358),
        ("nesterov", "least", 1 / 7.273224038776, 0.868505374398),
    ],
)
def test_worked_numbers_of_a_spectrum(method: Method, small: Small, lr: float, momentum: float) -> None:
    found = from_spectrum(torch.tensor(RITZ).double(), torch.tensor(WEIGHTS).double(), method, small)
    assert found == pytest.approx((lr, momentum), rel=1e-6)  # float32 literals


def test_worked_numbers_of_a_quadratic() -> None:
    assert heavy_ball(10, 0.1) == pytest.approx((0.330578512397, 0.669421487603), abs=1e-12)
    assert spectrum_rates.gradient_descent(10, 0.1).lr == pytest.approx(0.198019801980, abs=1e-12)
    for eigenvalue in (0.1, 3.0, 10.0):
        assert _radius(eigenvalue, *heavy_ball(10, 0.1), "heavy_ball") == pytest.approx(0.81818182, abs=1e-6)


def test_the_spike_at_zero_is_left_out() -> None:
    values, weights = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.6, 0.2, 0.2])
    assert from_spectrum(values, weights, small="least") == heavy_ball(4, 1)
    assert from_spectrum(values, weights.flip(0), small="median") == heavy_ball(4, 0.5)


@pytest.mark.parametrize(
    ("kind", "momentum", "threshold"),
    [("heavy_ball", 0.0, 200), ("heavy_ball", 0.9, 380), ("nesterov", 0.9, 135.71428571), ("ema", 0.9, 3800)],
)
def test_thresholds_are_where_steps_begin_to_diverge(kind: Momentum, momentum: float, threshold: float) -> None:
    found = stability_threshold(0.01, momentum, kind)
    assert found == pytest.approx(threshold, rel=1e-9)
    assert _radius(found * 0.999, 0.01, momentum, kind) < 1 < _radius(found * 1.001, 0.01, momentum, kind)


def _radius(eigenvalue: float, lr: float, momentum: float, kind: str) -> float:
    """The spectral radius of a step on a parabola, as a map of (parameter, momentum)."""

    def step(p: float, m: float) -> tuple[float, float]:
        g = eigenvalue * p
        m = momentum * m + (1 - momentum if kind == "ema" else 1) * g
        return p - lr * (g + momentum * m if kind == "nesterov" else m), m

    matrix = np.array([step(1.0, 0.0), step(0.0, 1.0)]).T
    return float(np.abs(np.linalg.eigvals(matrix)).max())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: learning_rate_factor(0, 1), "batch=0 must be a number above 0"),
        (lambda: learning_rate_factor(2, 1, "cubic"), "rule='cubic' must be 'linear' or 'sqrt'"),  # type: ignore[arg-type]
        (lambda: curvature_factor(2, 1, 0.5, -1), "noise=-1 must be a number of at least 0"),
        (lambda: effective_batch(3, 2), "batch=3 must be at most 2"),
        (lambda: full_eigenvalue(0.1, 1), "Take a larger batch"),
        (lambda: heavy_ball(1, 2), "smallest=2 must be above 0 and at most 1"),
        (lambda: heavy_ball(math.inf, 2), "largest=inf must be a number above 0"),
        (lambda: from_spectrum(torch.zeros(2), torch.ones(2) / 2), "must be finite, and not all zero"),
        (lambda: stability_threshold(0), "lr=0 must be a number above 0"),
        (lambda: stability.stability_threshold(1, 1), r"momentum=1 must be in \[0, 1\)"),
        (lambda: stability_threshold(1, 0.9, "nesterov", 0.1), "dampening=0.1 must be 0 where kind='nesterov'"),
        (lambda: learning_rate_factor(2, 1, most=-1), "most=-1 must be a number above 0"),
        (lambda: batch_eigenvalue(math.nan, 0.1), "eigenvalue=nan must be a finite number"),
        (lambda: full_eigenvalue(math.nan, 0.1), "of_batch=nan must be a finite number"),
        (lambda: curvature_factor(8, 64, 0.5, 0.1, samples=64), "reference=64 must be below 64, the size of the data"),
        (lambda: least_damping(math.nan, 0.5, 0.1), "lr=nan must be a number above 0"),
        (lambda: hessian_noise([[torch.ones(2)]]), "products of 1 batches given"),
        (lambda: hessian_noise([[torch.ones(2)], [torch.ones(2), torch.ones(3)]]), "the same tensors for each batch"),
        (lambda: hessian_noise([[torch.ones(1)], [torch.tensor([math.nan])]]), "not finite. Leave that batch out"),
        (lambda: from_spectrum(torch.ones(2), torch.ones(3)), "a weight of at least 0 for each value"),
        (lambda: from_spectrum(torch.ones(2), torch.tensor([math.nan, 1])), "a weight of at least 0 for each value"),
    ],
)
def test_what_is_out_of_range_gets_a_sentence(call: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        call()


def test_eigenvalues_may_be_tensors_and_probes_shorter_than_others() -> None:
    """As `extreme_eigenvalues` and `spectral_density` return them."""
    one, nodes = torch.tensor([0.5], dtype=torch.float64), torch.tensor([-1.0, 4.0, 9.0, math.nan])
    assert batch_eigenvalue(one[0], 0.05) == batch_eigenvalue(0.5, 0.05)
    assert full_eigenvalue(one, one * 0) == 0.5
    assert heavy_ball(one, one / 2) == heavy_ball(0.5, 0.25)
    assert from_spectrum(nodes, torch.tensor([0.3, 0.4, 0.3, 0.0]), small="least") == heavy_ball(9.0, 1.0)


def test_dampening_needs_momentum() -> None:
    """In torch's SGD it belongs to the momentum buffer, which there is none of."""
    assert stability_threshold(0.01, 0.0, dampening=0.5) == 200
    assert stability_threshold(0.01, 0.9, dampening=0.5) == pytest.approx(760)
