"""Products with the Hessian and the Gauss-Newton matrix, against matrices that torch.func writes out."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm

from lightning_optim.analysis.products import Matrix, Products, Way, products_of
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.errors import OptionError
from tests.harness.curved import Small, closure_of, matrix_of, samples
from tests.harness.ranks import run_ranks
from tests.harness.worlds import World, spread


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize(("way", "accuracy"), [("autograd", 1e-13), ("differences", 1e-9)])
def test_a_product_is_that_with_the_whole_matrix(operator: Matrix, way: Way, accuracy: float) -> None:
    """Of a random vector of any length; the loss and its gradient are there too."""
    model = Small()
    with products_of("test", closure_of(model, operator), model.trainable(), operator, way) as times:
        v = 7 * times.space.random(seed=3)
        found = times(v)
    exact = matrix_of(model, operator, samples()) @ v
    assert (found - exact).norm() < accuracy * exact.norm()
    loss = cross_entropy(model(samples()[0]), samples()[1])
    assert times.loss == pytest.approx(loss.item(), rel=1e-14)
    grads = torch.autograd.grad(loss, model.trainable(), allow_unused=True)
    assert torch.allclose(times.gradient, times.space.flat(grads), rtol=1e-12, atol=1e-15)


def test_differences_in_float32_are_right_to_five_digits() -> None:
    model = Small(torch.float32)
    with products_of("test", closure_of(model, "hessian"), model.trainable(), products="differences") as times:
        v = times.space.random(seed=3)
        found = times(v).double()
    exact = matrix_of(Small(), "hessian", samples()) @ v.double()
    assert (found - exact).norm() < 1e-4 * exact.norm()


def test_the_loss_of_outputs_may_be_a_value() -> None:
    model, (x, y) = Small(), samples()

    def closure() -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return outputs, cross_entropy(outputs, y)

    with products_of("test", closure, model.trainable(), "ggn") as times:
        v = times.space.random(seed=3)
        assert torch.allclose(times(v), matrix_of(model, "ggn", samples()) @ v, rtol=1e-12, atol=1e-14)


class OnceOnly(torch.autograd.Function):
    """tanh with a backward pass that cannot be differentiated, as that of flash attention."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return grads[0] * (1 - y * y)


class Unseen(torch.autograd.Function):
    """tanh with a backward pass that autograd does not see, as a kernel that writes into an empty tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (y,) = ctx.saved_tensors
        with torch.no_grad():
            return grads[0] * (1 - y * y)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("function", [OnceOnly, Unseen])
@pytest.mark.parametrize("residual", [False, True])
def test_differences_stand_in_where_there_is_no_second_backward_pass(
    operator: Matrix, function: type[torch.autograd.Function], residual: bool
) -> None:
    """And it is said, once. A residual connection hides from autograd that something is missing."""
    w = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    x, _ = samples()

    def closure_with(tanh: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        def outputs() -> Tensor:
            return tanh(torch.sin(x @ w.T)) + residual * (x @ w.T).square()

        if operator == "hessian":
            return lambda: outputs().pow(2).mean()
        return lambda: (outputs(), lambda o: o.pow(2).mean())

    with products_of("test", closure_with(torch.tanh), [w], operator) as times:
        v = times.space.random(seed=0)
        exact = times(v)
    with (
        pytest.warns(UserWarning, match="central differences of gradients instead") as said,
        products_of("test", closure_with(function.apply), [w], operator) as times,
    ):
        found = [times(v), times(v)]
    assert len(said) == 1
    assert times.way == "differences"
    assert torch.allclose(found[0], exact, rtol=1e-8, atol=1e-10)
    assert torch.equal(*found)


def test_without_a_second_backward_pass_autograd_is_refused_where_it_is_asked_for() -> None:
    """As in the attention of torch, whose kernels know one derivative. Left to itself, the choice is differences."""
    q = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def closure() -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q).square().sum()

    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(OptionError, match=r"second backward pass failed.*Let products be 'differences'"),
        products_of("test", closure, [q], products="autograd") as times,
    ):
        times(times.space.random(seed=0))
    with sdpa_kernel(SDPBackend.MATH), products_of("test", closure, [q], products="autograd") as times:
        v = times.space.random(seed=0)
        exact = times(v)
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.warns(UserWarning, match="scaled_dot_product_flash"),
        products_of("test", closure, [q]) as times,
    ):
        assert (times(v) - exact).norm() < 1e-3 * exact.norm()


def test_the_second_derivative_of_weight_norm_is_not_that_of_torch() -> None:
    """Its matrix is not even symmetric. In plain arithmetic it is right."""
    x, _ = samples()
    layer = weight_norm(nn.Linear(3, 2).double())
    params = list(layer.parameters())
    bias, norm, direction = params

    def plain() -> Tensor:
        weight = direction * (norm / direction.norm(dim=1, keepdim=True))
        return nn.functional.linear(x, weight, bias).sin().mean()

    with products_of("test", plain, params) as times:
        v = times.space.random(seed=0)
        exact = times(v)
    with (
        pytest.warns(UserWarning, match="weight norm is wrong"),
        products_of("test", lambda: layer(x).sin().mean(), params) as times,
    ):
        assert torch.allclose(times(v), exact, rtol=1e-7, atol=1e-9)


def test_a_function_of_a_user_that_is_right_stays_exact() -> None:
    """Here its backward pass is recorded, and nothing is said."""
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    cube: Callable[[Tensor], Tensor] = Cube.apply
    with products_of("test", lambda: cube(x).sum(), [x]) as times:
        assert torch.equal(times(x.detach()), 6 * x.detach())
    assert times.way == "autograd"


def test_nothing_is_left_behind() -> None:
    """Gradients, random generators, parameters, their versions and flags are what they were, also after an error."""
    model = Small()
    params = model.trainable()
    ways: tuple[Way, ...] = ("autograd", "differences")
    closure_of(model, "hessian")().backward()
    model.unused.weight.grad = torch.ones_like(model.unused.weight)

    def state() -> list[Any]:
        of_params = [(p.detach().clone(), p.grad, p._version, p.requires_grad) for p in model.parameters()]
        drawn = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
        return [of_params, *drawn]

    def closure() -> Tensor:
        torch.rand(3).add_(random.random() + np.random.rand())
        return closure_of(model, "hessian")()  # type: ignore[no-any-return]

    before = state()
    for way in ways:
        with (
            pytest.raises(OptionError, match="not finite"),
            products_of("test", closure, params, products=way) as times,
        ):
            times.finite(float("nan") * times.space.norm(times(times.space.random(seed=0))))
    after = state()
    for (p, grad, *flags), (q, other, *others) in zip(before[0], after[0], strict=True):
        assert torch.equal(p, q)
        assert grad is other
        assert flags == others
    assert torch.equal(before[1], after[1])
    assert before[2:] == after[2:]


# ---------------------------------------------------------------- what is refused

X = torch.ones(3, dtype=torch.float64, requires_grad=True)
Y = torch.ones(3, dtype=torch.float64, requires_grad=True)
ONE = [torch.ones(2, requires_grad=True)]


@pytest.mark.parametrize(
    ("closure", "params", "words"),
    [
        (X.sum(), [X], r"closure=tensor\(.* must be a function without arguments"),
        (lambda: X.sum(), [], "params is empty"),
        (lambda: X.sum(), X, "must be a list of tensors"),
        (lambda: X.sum(), [X, 3.0], "must be a tensor"),
        (lambda: X.sum(), [X, X], "twice"),
        (lambda: X.sum(), [X.detach()], "all 1 parameters are frozen"),
        (lambda: X.sum(), [X, torch.ones(2)], r"params\[1\] of shape \(2,\) is frozen"),
        (lambda: X.sum(), [torch.ones(2, dtype=torch.int64)], "int64"),
        (lambda: X.sum(), [torch.ones(2, dtype=torch.complex64, requires_grad=True)], "complex64"),
        (lambda: X.sum(), [torch.ones(0, requires_grad=True)], "no elements"),
        (lambda: X.sum(), [X * 2], "leaves"),
        (lambda: X.sum(), [Y], "No gradient path leads from the loss to any"),
        (lambda: X.sum().item(), [X], "is no tensor"),
        (lambda: X * 2, [X], r"of shape \(3,\), which is no scalar"),
        (lambda: X.detach().sum(), [X], "no gradient path leads to a parameter"),
        (lambda: X.sum() * float("nan"), [X], "is nan"),
        (lambda: nn.functional.dropout(X, 0.5).sum(), [X], "stochastic.*dropout"),
        (lambda: nn.Linear(3, 1).double()(X).sum(), [X], "stochastic"),
    ],
)
def test_what_cannot_serve_is_refused_in_a_sentence(closure: Callable[[], Any], params: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words), products_of("test", closure, params):
        pass


@pytest.mark.parametrize(
    "result", [None, X.sum(), (X,), (3.0, X.sum()), (X, lambda o: o), (X.int(), lambda o: X.sum())]
)
def test_a_closure_for_gauss_newton_returns_outputs_and_their_loss(result: Any) -> None:
    with pytest.raises(OptionError, match=r"outputs|no scalar"), products_of("test", lambda: result, [X], "ggn"):
        pass


def test_a_closure_builds_its_graph_anew_and_from_its_outputs() -> None:
    def backward() -> Tensor:
        loss = X.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    once = X.square().sum()
    for closure in (backward, lambda: once):
        with pytest.raises(OptionError, match=r"used up.*anew"), products_of("test", closure, [X]) as times:
            times(X.detach())
    X.grad = None
    with (
        pytest.raises(OptionError, match="does not depend on them"),
        products_of("test", lambda: (X**3, X.square().sum()), [X], "ggn") as times,
    ):
        times(X.detach())


def test_an_error_of_the_closure_is_the_users() -> None:
    def closure() -> Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"), products_of("test", closure, [X]):
        pass


def test_a_linear_loss_has_no_curvature() -> None:
    with products_of("test", lambda: X.sum(), [X]) as times:
        assert not times(torch.ones(3, dtype=torch.float64)).any()


# ---------------------------------------------------------------- on ranks

OPERATORS: tuple[Matrix, ...] = ("hessian", "ggn")
RANKS_WORLDS: tuple[World, ...] = ("single", "ddp", "fsdp1", "fsdp2")


def on_ranks() -> dict[str, Any]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    for world in RANKS_WORLDS:
        for operator in OPERATORS:
            model = spread(Small(), world)
            params = [p for p in model.parameters() if p.requires_grad]
            for p in params:
                p.grad = torch.ones_like(p)
            grads = [p.grad for p in params]
            closure = closure_of(model, operator, rank, size)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                with products_of("test", closure, params, operator) as times:
                    v = times.space.random(seed=3)
                    product = times(v)
            dots = times.space.dots(torch.stack([v, product, times.gradient]), product)
            kept = all(p.grad is g for p, g in zip(params, grads, strict=True)) or world == "fsdp1"
            found[f"{world} {operator}"] = (dots, times.loss, times.way, len(said), kept)
    found["refused"] = refused(rank)
    found["static graph"] = averaged_after_a_look(rank, size)
    dist.destroy_process_group()
    return found


def averaged_after_a_look(rank: int, size: int) -> Tensor:
    """A gradient of DDP that takes its first backward pass as that of all later ones; products come before it."""
    model = nn.parallel.DistributedDataParallel(Small(), static_graph=True)
    params = [p for p in model.parameters() if p.requires_grad]
    closure = closure_of(model, "hessian", rank, size)
    with products_of("test", closure, params) as times:
        times(times.space.random(seed=0))
    closure().backward()
    return times.gradient - times.space.flat([p.grad for p in params])


def refused(rank: int) -> list[str]:
    """What one rank does wrong is raised on both."""
    x = torch.ones(3, requires_grad=True)

    def fails() -> Tensor:
        return x.sum() / (0 if rank else 1) if rank == 0 else [][0]

    said = []
    for closure in (lambda: x.sum() if rank else x, lambda: x.sum() * float("nan" if rank else 1), fails):
        with pytest.raises(OptionError) as error, products_of("test", closure, [x]):
            pass
        said.append(str(error.value))
    return said


def test_every_strategy_finds_the_products_of_one_process() -> None:
    """Each rank has half of the batch, and the mean of their losses is that of the whole."""
    first, second = run_ranks(on_ranks)
    for operator in OPERATORS:
        model = Small()
        whole: Products
        with products_of("test", closure_of(model, operator), model.trainable(), operator) as whole:
            v = whole.space.random(seed=3)
            product = whole(v)
        dots = whole.space.dots(torch.stack([v, product, whole.gradient]), product)
        for world in RANKS_WORLDS:
            found, loss, way, said, kept = first[f"{world} {operator}"]
            assert torch.equal(found, second[f"{world} {operator}"][0]), world
            exact = way == "autograd"
            assert exact == ("fsdp" not in world)
            assert said == (0 if exact else 1)
            assert torch.allclose(found, dots, rtol=1e-13 if exact else 1e-9, atol=0), world
            assert loss == pytest.approx(whole.loss, rel=1e-14)
            assert kept, world
    assert first["refused"] == second["refused"]
    for found in (first, second):
        assert float(found["static graph"].abs().max()) < 1e-15


# ---------------------------------------------------------------- vectors


def test_vectors_of_mixed_dtypes_go_to_the_parameters_and_back() -> None:
    params = [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4), torch.ones(())]
    space = Vectors(params)
    v = space.random(seed=0)
    assert space.dimension == space.local == 11
    assert [(x.dtype, x.shape) for x in space.tensors(v)] == [(p.dtype, p.shape) for p in params]
    assert torch.equal(space.flat(space.shards(v))[6:], v[6:])
    assert not space.flat([None, *params[1:]])[:6].any()


def test_random_vectors_differ_by_seed_and_number() -> None:
    space = Vectors([torch.ones(5000), torch.ones(5000)])
    one, two, signs = space.random(0), space.random(0, 1), space.random(0, signs=True)
    assert abs(float(one @ two)) < 500
    assert abs(float(one[:5000] @ one[5000:])) < 500
    assert abs(float(one.square().mean()) - 1) < 0.1
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.sum())) < 500
    assert space.norm(signs) == 100.0


def test_inner_products_are_taken_in_float64() -> None:
    """Of 10^6 elements, that float32 would round at the seventh digit."""
    x = torch.rand(10**6, generator=torch.Generator().manual_seed(0))
    space = Vectors([x])
    assert float(space.dots(x[None], x)[0]) == pytest.approx(float(x.double().square().sum()), rel=1e-12)
