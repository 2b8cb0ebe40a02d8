"""The ends of spectra that are known: of nets small enough to write the matrix out, and of matrices that are made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_optim.analysis import Extremes, batch_eigenvalue, extreme_eigenvalues, noise_edge, spectral_density
from lightning_optim.analysis.products import Matrix, Way, products_of
from lightning_optim.analysis.thick_restart import ThickRestart
from lightning_optim.errors import OptionError
from tests.harness.curved import Small, closure_of, eight, matrix_of, samples, tiny_net
from tests.harness.peak import Peak
from tests.harness.ranks import run_ranks
from tests.harness.worlds import World, spread


def made(spectrum: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))
    whole: Tensor = (q * spectrum) @ q.mT
    return (whole + whole.mT) / 2


def quadratic(matrix: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A loss with this Hessian, of parameters of several shapes."""
    first = torch.linspace(-1, 1, len(matrix) // 2, dtype=matrix.dtype).requires_grad_()
    second = torch.ones(len(matrix) - len(first), 1, dtype=matrix.dtype, requires_grad=True)

    def closure() -> Tensor:
        x = torch.cat([first, second[:, 0]])
        return x @ matrix @ x / 2

    return closure, [first, second]


def assert_right(found: Extremes, exact: Tensor, k: int, accuracy: float) -> None:
    """Right to an accuracy, and within the bounds."""
    exact = exact.sort().values
    for i, (values, truth) in enumerate([(found.largest, exact.flip(0)[:k]), (found.smallest, exact[:k])]):
        error = (values - truth).abs()
        assert values.dtype == torch.float64
        assert values.shape == found.bound[i].shape == (k,)
        assert float(error.max()) < accuracy
        assert (error <= found.bound[i]).all()


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


ZEROS = torch.zeros(90, dtype=torch.float64)
SPECTRA = {
    "simple": normal(100),
    "all zero": ZEROS,
    "one": numbers(-2),
    "two equal": numbers(3, 3),
    "identity": 1 + ZEROS,
    "low rank": torch.cat([numbers(5, 5, 5, 4, 1e-3), ZEROS]),
    "negative": torch.cat([numbers(-3, -3, -1), ZEROS - 0.5]),
    "multiple at both ends": torch.cat([numbers(5, 5, 5, 4, 4, -3, -3, -3), normal(92)]),
    "all twice": normal(40).repeat(2),
    "whole numbers": torch.arange(-5, 5, dtype=torch.float64).repeat(7),
    "scales": torch.logspace(-12, 3, 60, dtype=torch.float64),
}


@pytest.mark.parametrize("basis", [None, "least"])
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_quadratic_has_the_eigenvalues_of_its_matrix(name: str, k: int | None, basis: str | None) -> None:
    """Multiple eigenvalues as often as they occur, zero and negative ones, more steps than elements, all of them."""
    spectrum = SPECTRA[name]
    k = min(k or len(spectrum), len(spectrum))
    size = None if basis is None or name == "scales" else min(2 * k + 8, len(spectrum))  # "scales" would take long
    closure, params = quadratic(made(spectrum))
    found = extreme_eigenvalues(closure, params, k, steps=600, basis=size)
    assert_right(found, spectrum, k, 1e-8 * max(1.0, float(spectrum.abs().max())))


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("way", ["autograd", "differences"])
@pytest.mark.parametrize("k", [1, 4, 47])
def test_a_net_has_the_eigenvalues_of_the_matrix_written_out(operator: Matrix, way: Way, k: int) -> None:
    """To 1e-8, also by differences, and with a parameter that the loss does not use."""
    model = Small()
    found = extreme_eigenvalues(closure_of(model, operator), model.trainable(), k, operator=operator, products=way)
    assert_right(found, torch.linalg.eigvalsh(matrix_of(model, operator, samples())), k, 1e-8)


@pytest.mark.parametrize(("way", "accuracy"), [("autograd", 1e-6), ("differences", 1e-5)])
def test_float32_is_as_right_as_it_can_be(way: Way, accuracy: float) -> None:
    """The third derivatives of differences are taken out: without that they are off by more than 2e-5."""
    net, x, y = tiny_net()
    exact = torch.linalg.eigvalsh(matrix_of(net, "hessian", (x, y)))
    net, x = net.float(), x.float()
    found = extreme_eigenvalues(lambda: cross_entropy(net(x), y), list(net.parameters()), 3, products=way)
    assert_right(found, exact, 3, accuracy)


def test_differences_under_autocast_take_a_longer_step() -> None:
    """Gradients of 3 digits yield eigenvalues to 1 %; with the step of float32 they would be off by 10 %."""
    net, x, y = tiny_net()
    exact = torch.linalg.eigvalsh(matrix_of(net, "hessian", (x, y)))
    net, x = net.float(), x.float()

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(net(x), y)

    found = extreme_eigenvalues(closure, net.parameters(), products="differences")
    assert_right(found, exact, 1, 0.02 * float(exact[-1]))


def test_worked_numbers() -> None:
    closure, params = quadratic(eight())
    largest, smallest, bound = extreme_eigenvalues(closure, params, k=4)
    assert torch.allclose(largest, numbers(7.273226466192, 1.907052264615, 1.359623845375, 0.181956247204), atol=1e-11)
    assert torch.allclose(smallest, numbers(-2.817567845099, -1.443821830701, -0.414235419566, 0.0895672940), atol=1e-9)
    assert bound.shape == (2, 4)
    net, x, y = tiny_net()
    largest, smallest, _ = extreme_eigenvalues(lambda: cross_entropy(net(x), y), net.parameters())
    assert float(largest) == pytest.approx(2.473035665290, abs=1e-11)
    assert float(smallest) == pytest.approx(-0.723972882584, abs=1e-11)


def test_memory_does_not_depend_on_the_number_of_steps() -> None:
    """It is the basis, and a dozen for a product with the graph of the loss; nothing is held afterwards.

    A density holds a vector for each step.
    """
    curvature = torch.linspace(-1, 3, 100_000)
    x = torch.zeros(100_000, requires_grad=True)

    def closure() -> Tensor:
        return (curvature * x * x).sum() / 2

    peaks = []
    for steps in (20, 50):
        with Peak() as peak:
            found = extreme_eigenvalues(closure, [x], steps=steps, basis=10)
        assert found.bound.min() > 1e-4  # all steps were needed
        assert peak.now < 1000
        peaks.append(peak.most / (4 * len(x)))
    assert peaks[0] == peaks[1] < 11 + 12
    with Peak() as peak:
        spectral_density(closure, [x], steps=30, probes=1)
    assert 31 < peak.most / (4 * len(x)) < 31 + 12


@pytest.mark.parametrize(("batch", "top"), [(16, 0.6), (64, 0.525)])
def test_batches_sharpen_the_hessian_as_random_matrices_say(batch: int, top: float) -> None:
    """An eigenvalue 0.5 under noise of variance 4e-4 for each element and sample, of 500 parameters as of 2000.

    The largest eigenvalue of a batch scatters by the root of 2 sigma^2 / batch, and its edge less.
    """
    size, sigma = 500, 0.04  # sigma^2 P is that of the table with 2000 parameters and 0.02
    generator = torch.Generator().manual_seed(batch)
    noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
    noise = (noise + noise.mT) / 2**0.5 * sigma / batch**0.5
    u = torch.ones(size, dtype=torch.float64) / size**0.5
    closure, params = quadratic(0.5 * torch.outer(u, u) + noise)
    largest, smallest, _ = extreme_eigenvalues(closure, params)
    kappa = size * sigma**2 / batch
    assert batch_eigenvalue(0.5, kappa) == pytest.approx(top)
    scatter = (2 * sigma**2 / batch) ** 0.5
    assert abs(float(largest) - top) < 3 * scatter
    assert abs(float(smallest) + noise_edge(kappa)) < 3 * scatter


# ---------------------------------------------------------------- on ranks


def on_ranks() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    worlds: tuple[World, ...] = ("ddp", "fsdp1", "fsdp2")
    found: dict[str, Any] = {}
    for world in worlds:
        model = spread(Small(), world)
        params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        closure = closure_of(model, "hessian", rank, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # FSDP differentiates once
            ends = extreme_eigenvalues(closure, params, steps=14)
            curve = spectral_density(closure, params, steps=4, probes=1)
        found[world] = (tuple(ends), curve.nodes, curve.trace, messages(closure, params))
    dist.destroy_process_group()
    return found


def messages(closure: Callable[[], Tensor], params: list[Tensor]) -> float:
    """All-reduces of a product and the inner products that follow it."""
    with counted() as sent, products_of("test", closure, params, products="differences") as times:
        machine = ThickRestart(lambda v: times(v, 1.0), times.space, 1, 8)
        machine.run(1, lambda: 1e-9)
        before = sent[0]
        machine.run(3, lambda: 1e-9)
    return (sent[0] - before) / 2


class counted:
    """Inside, calls of `all_reduce` are counted."""

    def __enter__(self) -> list[int]:
        self.sent, self.before = [0], dist.all_reduce

        def all_reduce(*args: Any, **kwargs: Any) -> Any:
            self.sent[0] += 1
            return self.before(*args, **kwargs)

        dist.all_reduce = all_reduce
        return self.sent

    def __exit__(self, *args: object) -> None:
        dist.all_reduce = self.before


def test_ranks_find_what_one_process_finds() -> None:
    """Each with half of the batch; shards stay where they are.

    A product is one message under DDP, where inner products need none. Under FSDP the two rounds of inner products are
    two, beside what FSDP sends itself.
    """
    first, second = run_ranks(on_ranks)
    model = Small()
    ends = extreme_eigenvalues(closure_of(model), model.trainable(), steps=14)
    curve = spectral_density(closure_of(model), model.trainable(), steps=4, probes=1)
    for world, (found, nodes, trace, sent) in first.items():
        accuracy = 1e-12 if world == "ddp" else 1e-8
        for values, exact in zip(found[:2], ends[:2], strict=True):
            assert torch.allclose(values, exact, rtol=0, atol=accuracy), world
        assert torch.allclose(nodes, curve.nodes, atol=1e-6), world
        assert trace == pytest.approx(curve.trace, abs=1e-7)
        assert all(map(torch.equal, found, second[world][0]))
        assert sent == (1 if world == "ddp" else 2), world


def test_a_triple_eigenvalue_is_found_three_times_or_the_bound_says_so() -> None:
    values = torch.arange(600, dtype=torch.float64).div(3, rounding_mode="floor")
    closure, params = quadratic(torch.diag(values))
    found = extreme_eigenvalues(closure, params, k=3)
    assert torch.allclose(found.largest, values[-3:], atol=1e-8)
    assert torch.allclose(found.smallest, values[:3], atol=1e-8)
    short = extreme_eigenvalues(closure, params, k=3, steps=150)
    for part, exact, bound in zip(short[:2], (values[-3:], values[:3]), short.bound, strict=True):
        assert ((part - exact).abs() <= bound).all()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k=0 must be a whole number from 1 to 8, the number of elements"),
        ({"k": 9}, "k=9 must be a whole number from 1 to 8"),
        ({"k": 1.5}, "k=1.5"),
        ({"k": True}, "k=True"),
        ({"k": 3, "steps": 2}, "steps=2 must be a whole number of at least k=3"),
        ({"steps": 0}, "steps=0"),
        ({"k": 2, "basis": 4}, "basis=4 must be None, or a whole number of at least 7, which k=2 needs"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"operator": "fisher"}, "operator='fisher' must be 'hessian' or 'ggn'"),
        ({"products": "forward"}, "products='forward' must be 'autograd', 'differences' or None"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    closure, params = quadratic(eight())
    with pytest.raises(OptionError, match=words):
        extreme_eigenvalues(closure, params, **options)


def test_a_product_that_is_not_finite_is_refused() -> None:
    x = torch.zeros(3, requires_grad=True)
    with pytest.raises(OptionError, match=r"extreme_eigenvalues: a product .* is not finite.*square root of 0"):
        extreme_eigenvalues(lambda: (x**4 + 0 * x.abs().pow(1.5)).sum(), [x])
    with pytest.raises(OptionError, match=r"spectral_density: a product .* is not finite"):
        spectral_density(lambda: (x**4 + 0 * x.abs().pow(1.5)).sum(), [x])


def test_dropout_is_refused_and_leaves_no_trace() -> None:
    x = torch.ones(30, requires_grad=True)
    before = torch.get_rng_state()
    with pytest.raises(OptionError, match=r"stochastic.*model\.eval\(\)"):
        extreme_eigenvalues(lambda: nn.functional.dropout(x, 0.5).square().sum(), [x])
    assert torch.equal(torch.get_rng_state(), before)
    assert x.grad is None
