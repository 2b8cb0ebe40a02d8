"""Means along one axis and several, and what follows from them, on every engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_optim import engines
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.engines import compiled
from lightning_optim.engines.compiled import strips
from lightning_optim.engines.strides import strides_of
from lightning_optim.engines.triton import chunks
from lightning_optim.language import Options, Slot, Slots, Value, ema, mean, norm, sqrt, where
from lightning_optim.language.program import trace
from tests.harness.engines import differences
from tests.harness.problems import gradients, make_params

SHAPES = ((6, 4), (6, 4), (5, 3, 2, 2), (1, 7), (9, 1), (1, 1), (0, 4), (4, 0), (3, 2, 5), (70, 61), (3, 1500))
pytestmark = pytest.mark.usefixtures("quiet_interpreter", "exact_roots", "torch_functions")
every_engine = pytest.mark.parametrize("engine", [name for name in engines.ENGINES if name != "reference"])


class Normalizing(Optimizer):
    """A page with statistics of several kinds: read, averaged again, compared, stored and left in a number's place."""

    lr: float = 0.1
    beta: float = 0.5

    row = Slot("R", signed=False, exact=True, without="rest")
    column = Slot("C", signed=False, exact=True, without="first")
    exp_avg = Slot("m")

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"first": 0, "rest": tuple(range(1, len(shape)))}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.row = R = ema(s.row, mean(g * g, h.rest), h.beta)
        s.column = C = ema(s.column, mean(g * g, h.first), h.beta)
        V = 2.0 / (1.0 + R) + C / (1.0 + mean(R, h.first))
        s.exp_avg = m = ema(s.exp_avg, g / (1.0 + norm(p) + R), h.beta)
        u = where(R > 0.5, m, g) / (1.0 + V)
        return p - h.lr * u / (1.0 + sqrt(mean(u * u, h.rest))) - h.lr * C


del OPTIMIZERS[Normalizing.name]  # no page of the package


def oracle(params: Sequence[Tensor], steps: int, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray[Any, Any]]:
    """The same in numpy, tensor by tensor."""
    found = [p.detach().numpy().copy() for p in params]
    slots = [(0.0, 0.0, 0.0)] * len(found)
    for grads in gradients(steps, shapes, torch.float64):
        for i, (p, grad) in enumerate(zip(found, grads, strict=True)):
            if not p.size:
                continue
            g, rest, (R, C, m) = grad.numpy(), tuple(range(1, p.ndim)), slots[i]
            R = R + 0.5 * ((g * g).mean(rest, keepdims=True) - R)
            C = C + 0.5 * ((g * g).mean(0, keepdims=True) - C)
            V = 2.0 / (1.0 + R) + C / (1.0 + R.mean(0, keepdims=True))
            m = m + 0.5 * (g / (1.0 + np.sqrt((p * p).sum()) + R) - m)
            u = np.where(R > 0.5, m, g) / (1.0 + V)
            p -= 0.1 * u / (1.0 + np.sqrt((u * u).mean(rest, keepdims=True))) + 0.1 * C
            slots[i] = R, C, m
    return found


def train(engine: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES, steps: int = 4) -> Any:
    params = make_params(shapes, dtype)
    for i, p in enumerate(params):
        if p.dim() == 4:
            params[i] = torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))
        if tuple(p.shape) == (70, 61):
            params[i] = torch.nn.Parameter(p.detach().t().contiguous().t())
    optimizer = Normalizing(params, engine=engine)
    for grads in gradients(steps, shapes, dtype):
        for p, grad in zip(params, grads, strict=True):
            p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("engine", ["reference", "blocked", "compiled"])
def test_equals_the_recursion(engine: str) -> None:
    _, params = train(engine, torch.float64)
    for p, expected in zip(params, oracle(make_params(SHAPES, torch.float64), 4, SHAPES), strict=True):
        torch.testing.assert_close(p.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(engine: str, dtype: torch.dtype) -> None:
    (one, params), (other, others) = train("reference", dtype), train(engine, dtype)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q, p, rtol=2e-6, atol=2e-6)
        for name, value in one.state[p].items():
            torch.testing.assert_close(other.state[q][name], value, rtol=2e-6, atol=2e-6)


def test_strips_in_any_number_of_threads_end_in_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where windows take several calls."""
    shapes, threads = ((300, 401), (2, 60_000), (64, 64)), torch.get_num_threads()
    expected = oracle(make_params(shapes, torch.float64), 2, shapes)
    monkeypatch.setattr(strips, "LEAST", 3)
    monkeypatch.setattr(strips, "ROOM", 1000)
    monkeypatch.setattr(compiled, "THREADED", 1)
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(train("compiled", torch.float64, shapes, 2))
    finally:
        torch.set_num_threads(threads)
    one, params = runs[0]
    for other, others in runs[1:]:
        assert differences(one, params, other, others) == []
    for p, values in zip(runs[0][1], expected, strict=True):
        torch.testing.assert_close(p.detach().numpy(), values, rtol=1e-12, atol=1e-12)


def test_chunks_of_any_size_end_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((40, 61), (40, 61), (3, 1500))
    _, whole = train("triton", torch.float32, shapes, 2)
    monkeypatch.setattr(chunks, "ROOM", 1 << 10)
    _, chunked = train("triton", torch.float32, shapes, 2)
    for p, q in zip(whole, chunked, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)


@every_engine
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_goes_where_the_reference_has_it(engine: str, value: float) -> None:
    found = []
    for each in ("reference", engine):
        (p,) = make_params(((6, 70),), torch.float32)
        optimizer = Normalizing([p], engine=each)
        p.grad = torch.ones_like(p)
        p.grad[2, 3] = value
        optimizer.step()
        found.append([torch.isnan(x) for x in (p, *optimizer.state[p].values())])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("order", [None, (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_strides_lead_to_the_number_of_each_element(order: tuple[int, ...] | None) -> None:
    shape, axes = (2, 3, 4, 5), [frozenset({-1}), frozenset({0, 2}), frozenset({1, 2, 3}), frozenset({-2, -1})]
    strides = strides_of(shape, order, axes)
    for which, reduced in enumerate(axes):
        numbers = torch.randn([1 if axis - 4 in reduced or axis in reduced else n for axis, n in enumerate(shape)])
        expected = numbers.expand(shape).permute(order or (0, 1, 2, 3)).reshape(-1)
        for low, high in ((0, 120), (7, 93), (61, 62)):
            found = strides.spread(which, numbers.reshape(-1), torch.empty(high - low), low)
            assert torch.equal(found, expected[low:high])
            first, end = strides.window(which, low, high)
            assert set(found.tolist()) <= set(numbers.reshape(-1)[first:end].tolist())


def test_what_has_no_meaning_is_refused() -> None:
    slots = {"row": Slot("R", without="columns")}
    h = {"columns": -1, "rows": -2}

    def twice(p: Value, g: Value, s: Slots, h: Options) -> Value:
        return p - mean(mean(g, h.columns), h.columns)

    def too_many(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.row = g
        return p

    def other(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.row = mean(g, h.rows)
        return p

    with pytest.raises(TypeError, match="has no axis -1 to take the mean along"):
        trace(twice, h, slots)
    for update in (too_many, other):
        with pytest.raises(TypeError, match="the slot row has size 1 along columns"):
            trace(update, h, slots)


@every_engine
def test_a_slot_of_another_shape_is_refused(engine: str) -> None:
    optimizer, (p,) = train(engine, torch.float32, ((6, 4),), 1)
    optimizer.state[p]["row"] = torch.zeros(1, 1)
    optimizer._runner.clear_cache()
    with pytest.raises(RuntimeError, match=r"row has the shape \(1, 1\), and its parameter needs \(6, 1\)"):
        optimizer.step()


def test_many_small_tensors_cost_no_more_calls_than_few() -> None:
    """Statistics of tensors of one shape are stacked."""
    counts = []
    for many in (2, 40):
        shapes = ((4, 3),) * many
        optimizer, params = train("compiled", torch.float32, shapes, 2)
        with torch.profiler.profile() as profile:
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        named = [event.key for event in profile.key_averages() for _ in range(event.count)]
        counts.append(sum(key in ("aten::sum", "aten::mul", "aten::div", "aten::add", "aten::lerp") for key in named))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1 << 31), "has an axis too long for its row and column means"),
        ((2, 1 << 16, 1 << 15), "has an axis too long"),  # a convolution's axes that count as one
        ((1 << 31, 2), "has an axis too long"),
        ((1 << 20, 1 << 12), ""),
    ],
)
def test_triton_refuses_axes_whose_index_does_not_fit(shape: tuple[int, ...], words: str) -> None:
    """They would be read at another place, and no machine of a test could hold them."""
    pytest.importorskip("triton")
    program = Normalizing([nn.Parameter(torch.empty(2, 3, *(1 for _ in shape[2:])))]).first_programs()[0]
    refusal = engines.ENGINES["triton"].refusal([program], [torch.empty(shape, device="meta")])
    assert words in refusal
    assert ("axis too long" in refusal) == bool(words)
