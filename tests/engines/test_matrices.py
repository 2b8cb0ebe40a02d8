"""Functions of whole matrices on every engine: the same bits, and nothing written where one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import OptionError, engines
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.engines import matrices
from lightning_optim.language import (
    Options,
    Slot,
    Slots,
    Value,
    View,
    ema,
    matrix_view,
    mean,
    norm,
    rounded,
    total,
    whole,
)
from lightning_optim.storage import Quantized
from tests.harness.engines import differences

SHAPES = ((6, 4), (3, 4), (4, 6), (6, 4), (2, 3, 2, 2), (5,), (), (0, 4), (4, 0), (70, 61))
pytestmark = pytest.mark.usefixtures("quiet_interpreter", "exact_roots", "torch_functions")
every_engine = pytest.mark.parametrize("engine", list(engines.ENGINES))

calls: list[tuple[int, ...]] = []  # the shapes of the batches that `mixed` was called with


def mixed(x: Tensor, *, share: float, keep: bool) -> Tensor:
    """Each row becomes a share of the sum of all rows, beside itself."""
    calls.append(tuple(x.shape))
    x.mul_(share)  # its memory is its own
    return x.sum(1, keepdim=True) + x if keep else x.sum(1, keepdim=True).expand_as(x)


def products(x: Tensor, y: Tensor) -> Tensor:
    """A product of three matrices in which each element depends on all."""
    return x @ y.mT @ x


@rounded(lambda dtype, device: torch.bfloat16)
def coarse(x: Tensor) -> Tensor:
    assert x.dtype == torch.bfloat16
    return x.flip(2)


class Mixing(Optimizer):
    """A page whose cuts are of every kind, at three levels."""

    lr: float = 0.5
    beta: float = 0.5
    weight_decay: float = 0.1

    exp_avg = Slot("m")
    previous = Slot("r")

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        return matrix_view(shape, blocks=1 if shape and shape[0] % 2 else 2)

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"matrix": len(shape) > 1}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.exp_avg = m = ema(s.exp_avg, g, h.beta)
        if not h.matrix:
            return p - h.lr * m / (1.0 + norm(g, over="all"))
        first = whole(mixed, m, share=1.0 / (1.0 + norm(p)), keep=True)
        scale = total(abs(first), by="max") + norm(g, over="all")
        rows = mean(g * g, -1)  # a statistic inside an argument, and one of a result
        second = whole(products, first / (1.0 + scale), m / (1.0 + scale + rows))
        s.previous = second
        second = second / (1.0 + mean(second * second, -1))
        return p * (1.0 - h.lr * h.weight_decay) - h.lr * (second + whole(mixed, g, share=h.lr, keep=False))


class Plain(Optimizer):
    """A page that applies a function to its slot itself."""

    lr: float = 0.5
    kind: str = "coarse"

    exp_avg = Slot("m")

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        return matrix_view(shape)

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.exp_avg = ema(s.exp_avg, g, 0.5)
        function: Callable[..., Tensor] = FUNCTIONS[str(h.kind)]
        return p - h.lr * whole(function, s.exp_avg) + 0.0 * whole(function, p)


def spoiling(x: Tensor) -> Tensor:
    return x.zero_()


def failing(x: Tensor) -> Tensor:
    if x.shape[1] == 3:
        raise MemoryError("by the test")
    return x


def transposing(x: Tensor) -> Tensor:
    return x.mT


def product(x: Tensor) -> Tensor:
    return x @ x.mT @ x


FUNCTIONS = {f.__name__: f for f in (coarse, spoiling, failing, transposing, product)}
for _page in (Mixing, Plain):
    del OPTIMIZERS[_page.__name__.lower()]  # no pages of the package


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(optimizer: Optimizer, params: list[Tensor], steps: int = 3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = p.grad.to(memory_format=torch.channels_last) if p.dim() == 4 else p.grad
        optimizer.step()


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_engines_find_the_same_bits(engine: str, dtype: torch.dtype) -> None:
    if engine == "triton" and dtype == torch.float64:
        pytest.skip("it computes in float32")
    params, others = parameters(dtype), parameters(dtype)
    one, other = Mixing(params, engine=engine), Mixing(others, engine="reference")
    train(one, params)
    train(other, others)
    if dtype == torch.float64:  # in which the order of sums shows
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    else:
        assert not differences(one, params, other, others)
    assert all(p.isfinite().all() for p in params)


@every_engine
def test_all_engines_find_the_same_bits_of_state_in_8_bits(engine: str) -> None:
    """The pass that computes arguments decodes the momentum, and the last one codes it again."""
    params, others = (parameters(shapes=((70, 61), (6, 4))) for _ in range(2))
    one, other = (
        Plain(of_one, kind="product", state_bits=8, engine=e) for of_one, e in ((params, engine), (others, "reference"))
    )
    train(one, params)
    train(other, others)
    assert isinstance(one.state[params[0]]["exp_avg"], Quantized)
    assert not differences(one, params, other, others)


@every_engine
def test_the_matrix_is_of_the_tensor_and_not_of_its_memory(engine: str) -> None:
    """Channels-last, transposed and sliced parameters move as contiguous ones do."""
    shapes = ((4, 3, 2, 2), (6, 5), (6, 5))
    contiguous, turned = parameters(shapes=shapes), parameters(shapes=shapes)
    turned[0] = torch.nn.Parameter(turned[0].detach().to(memory_format=torch.channels_last))
    turned[1] = torch.nn.Parameter(turned[1].detach().t().contiguous().t())
    turned[2] = torch.nn.Parameter(torch.stack([turned[2].detach()] * 2, -1)[..., 0])
    for params in (contiguous, turned):
        train(Mixing(params, engine=engine), params)
    for p, q in zip(contiguous, turned, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@every_engine
def test_equal_matrices_with_equal_numbers_are_one_batch(engine: str) -> None:
    calls.clear()
    params = parameters(shapes=((6, 4), (3, 4), (3, 4), (9, 4)))
    train(Mixing(params, engine=engine), params, steps=1)
    assert sorted(calls) == [(1, 3, 4), (1, 3, 4), (1, 9, 4), (1, 9, 4), (2, 3, 4), (4, 3, 4)]


@every_engine
def test_buckets_bound_the_memory(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of bounded size end where one batch does, and nothing of a step is kept after it."""
    params, others = (parameters(shapes=((6, 4),) * 5) for _ in range(2))
    whole_batch = Mixing(others, engine=engine)
    train(whole_batch, others, steps=1)
    calls.clear()
    monkeypatch.setattr(matrices, "BUCKET", 2 * 4 * 12)
    optimizer = Mixing(params, engine=engine)
    train(optimizer, params, steps=1)
    assert max(k for k, *_ in calls) == 2
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    batches = optimizer._runner.cached["update"].batches
    assert not any(param.buffers for batch in batches for param in batch.params)


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_function_gets_memory_of_its_own(engine: str, dtype: torch.dtype) -> None:
    """One that overwrites its argument changes neither slots nor parameters, in whatever dtype these are."""
    (p,) = params = parameters(dtype, ((6, 4),))
    optimizer = Plain(params, kind="spoiling", state_bits=16 if dtype == torch.bfloat16 else 32, engine=engine)
    before = p.detach().clone()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p.detach(), before)
    assert torch.equal(optimizer.state[p]["exp_avg"].float(), torch.full((6, 4), 0.5))


@every_engine
def test_nothing_is_written_where_a_function_fails(engine: str) -> None:
    params = parameters(shapes=((6, 4), (3, 4)))
    optimizer = Plain(params, kind="failing", engine=engine)
    before = [p.detach().clone() for p in params]
    with pytest.raises(MemoryError, match="by the test"):
        train(optimizer, params, steps=1)
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert not optimizer.state


@every_engine
def test_matrices_are_rounded_to_the_dtype_that_a_function_declares(engine: str) -> None:
    (p,) = params = parameters(shapes=((6, 4),))
    before = p.detach().clone()
    p.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    Plain(params, engine=engine).step()
    assert torch.equal(p.detach(), before - 0.5 * (0.5 * p.grad).bfloat16().flip(1).float())


def test_the_precision_of_products_is_that_of_the_function() -> None:
    """TF32 and bfloat16 products that a user allows to a model do not reach it, nor does autocast; both stay set."""
    results = []
    for precision in ("highest", "medium"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            params = parameters(shapes=((64, 64),))
            with torch.autocast("cpu", enabled=precision == "medium"):
                train(Plain(params, kind="product"), params, steps=1)
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision(before)
        results.append(params[0].detach())
    assert torch.equal(*results)


@every_engine
def test_nan_stays_in_its_matrix(engine: str) -> None:
    params = parameters(shapes=((6, 4), (6, 4)))
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[0, 0] = torch.nan  # type: ignore[index]
    Plain(params, kind="product", engine=engine).step()
    assert params[0].isnan().all()
    assert params[1].isfinite().all()


def test_what_is_refused() -> None:
    real, imaginary = parameters(shapes=((6, 4),)), parameters(torch.complex64, ((6, 4),))
    with pytest.raises(
        OptionError, match="capturable=True cannot be served, for it computes functions of whole matrices"
    ):
        Plain(real, capturable=True)
    with pytest.raises(OptionError, match="cannot serve a complex parameter"):
        train(Plain(imaginary, kind="product"), imaginary, steps=1)
    with pytest.raises(TypeError, match="must return a tensor of the shape of its"):
        train(Plain(real, kind="transposing"), real, steps=1)
    vector = parameters(shapes=((6,),))
    with pytest.raises(TypeError, match="of which its `matrices` gives no matrices"):
        train(Plain(vector, kind="product"), vector, steps=1)
