"""Maxima over tensors on every engine, also of values that are not finite."""

from __future__ import annotations

import pytest
import torch

from lightning_optim import engines
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.language import Options, Slots, Value
from lightning_optim.language.math import total
from tests.harness.engines import differences
from tests.harness.problems import gradients, make_params

SHAPES = ((64, 70), (3,), (0,), (1100,))
pytestmark = pytest.mark.usefixtures("quiet_interpreter", "exact_roots", "torch_functions")


class Scaled(Optimizer):
    """A page that divides by the largest element of the gradient, and of all parameters."""

    lr: float = 0.1

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        return p - h.lr * g / (1.0 + total(abs(g), by="max") + total(abs(p), over="all", by="max"))


del OPTIMIZERS[Scaled.name]  # no page of the package


@pytest.mark.parametrize("engine", [name for name in engines.ENGINES if name != "reference"])
@pytest.mark.parametrize("value", [0.5, torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1030, 4479])  # in the first tile, in the second, and the last element
def test_maxima_equal_those_of_the_reference(engine: str, value: float, place: int) -> None:
    ends = []
    for each in ("reference", engine):
        params = make_params(SHAPES, torch.float32)
        optimizer = Scaled(params, engine=each)
        for grads in gradients(2, SHAPES, torch.float32):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            grads[0].view(-1)[place] = value
            optimizer.step()
        missing = [p.isnan() for p in params]
        for p in params:
            p.data.nan_to_num_(7.0)  # two that are not a number are not equal
        ends.append((optimizer, params, missing))
    (one, params, missing), (other, others, absent) = ends
    assert all(torch.equal(x, y) for x, y in zip(missing, absent, strict=True))
    assert differences(one, params, other, others) == []
