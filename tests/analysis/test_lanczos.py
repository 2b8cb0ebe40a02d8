"""Lanczos and its quadrature against worked numbers, and densities against spectra that are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_optim.analysis import spectral_density
from lightning_optim.analysis.density import smoothed
from lightning_optim.analysis.lanczos import Basis, Quadrature, quadrature
from lightning_optim.analysis.products import products_of
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.errors import OptionError
from tests.harness.curved import eight, tiny_net


def alternating(size: int) -> Tensor:
    return torch.tensor([(-1.0) ** i for i in range(size)], dtype=torch.float64)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_eight(steps: int) -> Quadrature:
    matrix = eight()
    return quadrature(lambda v: matrix @ v, Vectors([torch.zeros(8, dtype=torch.float64)]), alternating(8), steps)


def of_tiny_net(steps: int) -> Quadrature:
    net, x, y = tiny_net()
    with products_of("test", lambda: cross_entropy(net(x), y), net.parameters()) as times:
        return quadrature(times, times.space, alternating(31), steps)


def test_worked_numbers_of_a_matrix() -> None:
    found = of_eight(5)
    a = numbers(0.641134588505, 4.916124183553, -0.746627840714, 1.453106967236, 0.288783940780)
    b = numbers(2.516901793350, 3.322561442472, 0.917855644335, 0.423845394858)
    ritz = numbers(-2.817204445980, 0.036020875848, 0.267414423979, 1.793066946737, 7.273224038776)
    shares = numbers(0.109497885105, 0.439777505623, 0.307665292560, 0.034489020804, 0.108570295909)
    for values, exact in [(found.diagonal, a), (found.beside, b), (found.nodes, ritz), (found.weights, shares)]:
        assert torch.allclose(values, exact, rtol=0, atol=1e-11)
    assert float(8 * (found.weights * found.nodes).sum()) == pytest.approx(5.129076708039, abs=1e-11)


def test_worked_numbers_of_a_net() -> None:
    found = of_tiny_net(5)
    a = numbers(0.036951169188, 1.179970413075, 1.318815195717, 0.487071589092, -0.091666742535)
    b = numbers(0.225268255693, 0.821688218847, 1.089642934800, 0.453904615173)
    assert torch.allclose(found.diagonal, a, rtol=0, atol=1e-11)
    assert torch.allclose(found.beside, b, rtol=0, atol=1e-11)
    assert float(found.nodes[-1]) == pytest.approx(2.472771997895, abs=1e-11)
    assert float(of_tiny_net(10).nodes[-1]) == pytest.approx(2.473035665286, abs=1e-11)
    assert float(31 * (found.weights * found.nodes).sum()) == pytest.approx(1.145486244835, abs=1e-11)


def test_all_steps_find_the_whole_spectrum_and_no_more_are_taken() -> None:
    found = of_eight(100)
    assert torch.allclose(found.nodes, torch.linalg.eigvalsh(eight()), rtol=0, atol=1e-13)
    assert len(found.beside) == 7
    assert found.last < 1e-10


def test_an_invariant_subspace_ends_the_iteration() -> None:
    """The start is a combination of three eigenvectors, so the quadrature is exact with three nodes."""
    spectrum = torch.tensor([1.0, 2.0, 3.0, 3.0, 5.0, 6.0], dtype=torch.float64)
    start = numbers(1, 0, 2, 1, 2, 0)
    found = quadrature(lambda v: spectrum * v, Vectors([spectrum]), start, 6)
    assert torch.allclose(found.nodes, numbers(1, 3, 5), atol=1e-13)
    assert torch.allclose(found.weights, numbers(0.1, 0.5, 0.4), atol=1e-13)


def test_vectors_stay_orthogonal_where_eigenvalues_have_converged() -> None:
    """Without reorthogonalisation the largest would be found again after some 20 steps."""
    spectrum = torch.cat([torch.linspace(0, 1, 400, dtype=torch.float64), numbers(100)])
    space = Vectors([spectrum])
    basis = Basis(space, 120)
    basis.push(space.random(0))
    for _ in range(120):
        basis.push(spectrum * basis.rows[basis.count - 1])
    gram = basis.rows @ basis.rows.mT
    assert float((gram - torch.eye(121, dtype=torch.float64)).abs().max()) < 1e-14


def test_a_vector_of_the_span_leaves_rounding_or_nothing() -> None:
    space = Vectors([torch.zeros(3, dtype=torch.float64)])
    basis = Basis(space, 3)
    for seed in range(3):
        basis.push(space.random(seed))
    along, norm = basis.push(numbers(1, 2, 3))
    assert norm < 1e-14
    assert float(along.norm()) == pytest.approx(14**0.5)


# ---------------------------------------------------------------- densities


def test_the_density_of_worked_numbers() -> None:
    """At 0 with a width of 0.1; one point of the grid lies there."""
    found = of_eight(5)
    curve = smoothed([found], 8, 3, 0.1)
    at_zero = sum(
        float(w) * float(torch.exp(-0.5 * (n / 0.1) ** 2)) / (0.1 * (2 * torch.pi) ** 0.5)
        for n, w in zip(found.nodes, found.weights, strict=True)
    )
    assert at_zero == pytest.approx(1.678619446795, abs=1e-10)
    fine = smoothed([found], 8, 20001, 0.1)
    nearest = int(fine.grid.abs().argmin())
    assert float(fine.density[nearest]) == pytest.approx(at_zero, rel=1e-3)
    assert curve.trace == pytest.approx(5.129076708039, abs=1e-10)


@pytest.mark.parametrize("points", [16, 100, 1024])
def test_a_density_integrates_to_one_and_says_how_many_eigenvalues_there_are(points: int) -> None:
    """60 % zeros, 30 % around 1 and 10 % at 7, of a diagonal Hessian, for which probes of signs are exact."""
    spectrum = torch.cat([torch.zeros(60), torch.linspace(0.8, 1.2, 30), torch.full((10,), 7.0)]).double()
    x = torch.ones(100, dtype=torch.float64, requires_grad=True)
    curve = spectral_density(lambda: (spectrum * x * x).sum() / 2, [x], points=points)
    grid, density = curve
    assert grid.shape == density.shape == (points,)
    assert grid.dtype == density.dtype == torch.float64
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-12)
    assert curve.trace == pytest.approx(float(spectrum.sum()), rel=1e-10)
    assert curve.trace_error < 1e-10
    if points == 1024:
        for low, high, share in [(-0.3, 0.3, 0.6), (0.5, 1.5, 0.3), (6.5, 7.5, 0.1)]:
            inside = (grid > low) & (grid < high)
            assert float(torch.trapezoid(density[inside], grid[inside])) == pytest.approx(share, abs=1e-3)


def test_the_trace_has_an_honest_error() -> None:
    """Of a matrix far from diagonal; the scatter of a probe is the root of twice the squares beside the diagonal."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    x = torch.ones(60, dtype=torch.float64, requires_grad=True)
    curve = spectral_density(lambda: x @ matrix @ x / 2, [x], steps=20, probes=64)
    beside = matrix - torch.diag(matrix.diag())
    expected = float((2 * beside.square().sum() / 64).sqrt())
    assert curve.trace_error == pytest.approx(expected, rel=0.3)
    assert abs(curve.trace - float(matrix.trace())) < 3 * expected
    one = spectral_density(lambda: x @ matrix @ x / 2, [x], steps=20, probes=1)
    assert one.trace_error != one.trace_error  # unknown


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_a_single_eigenvalue_has_a_density(value: float) -> None:
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    grid, density = spectral_density(lambda: value * x.square().sum() / 2, [x])
    assert float(grid[density.argmax()]) == pytest.approx(value, abs=1e-3)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"probes": 0}, {"points": 1}, {"width": 0.0}, {"width": float("inf")}, {"seed": 2**64}]
)
def test_options_of_densities_are_checked(options: dict[str, Any]) -> None:
    x = torch.ones(5, requires_grad=True)
    with pytest.raises(OptionError, match=f"spectral_density: {next(iter(options))}="):
        spectral_density(lambda: x.square().sum(), [x], **options)
