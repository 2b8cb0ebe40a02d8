"""Functions of whole matrices cut an update, and are computed on the matrices that a tensor is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import OptionError
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.language import Options, Slot, Slots, Value, View, ema, matrix_view, whole
from lightning_optim.language.program import trace
from lightning_optim.language.symbols import Kind


def halves_of_rows(x: Tensor, share: float) -> Tensor:
    """Each row becomes a share of the sum of all rows."""
    return share * x.sum(1, keepdim=True).expand_as(x)


class Summed(Optimizer):
    """A page with a function of whole matrices, after a slot and before arithmetic."""

    lr: float = 0.5

    exp_avg = Slot("m")

    @staticmethod
    def view(h: Options, shape: torch.Size) -> View | None:
        return matrix_view(shape, blocks=2)

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.exp_avg = m = ema(s.exp_avg, g, 0.5)
        return p - h.lr * whole(halves_of_rows, m, share=h.lr)


del OPTIMIZERS["summed"]  # no page of the package


def test_a_function_of_matrices_is_a_cut_whose_result_later_passes_read() -> None:
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        return p - whole(halves_of_rows, g * g, share=h.lr)

    program = trace(update, {"lr": 0.5})
    (symbol,) = program.matrices
    assert (symbol.kind, symbol.level, program.elementwise) == (Kind.ELEMENT, 1, False)
    assert symbol in program.elements([program.outputs["p"]])
    assert not any(other.name == "mul" for other in program.elements([program.outputs["p"]])), "an earlier pass"
    assert program.needs == ("whole matrix",)


def test_each_block_is_a_matrix_of_its_own() -> None:
    g = torch.arange(24.0).view(4, 3, 2)
    p = torch.nn.Parameter(torch.zeros(4, 3, 2))
    p.grad = g.clone()
    Summed([p]).step()
    rows = (0.5 * g).view(2, 2, 6).sum(1, keepdim=True).expand(2, 2, 6)
    assert torch.equal(p.detach(), (-0.5 * 0.5 * rows).reshape(4, 3, 2))


def test_the_view_of_a_tensor() -> None:
    shape = torch.Size([6, 2, 3])
    assert matrix_view(shape) == View((6,), 6)
    assert matrix_view(shape, blocks=[3, 1, 2]) == View((3, 1, 2), 6)
    assert matrix_view(shape, experts=True) == View((2,) * 6, 3)
    assert matrix_view(torch.Size([6])) is None
    for blocks in (4, 0, [3, 2], [6, 0]):
        with pytest.raises(OptionError, match="does not divide the 6 rows"):
            matrix_view(shape, blocks=blocks)
    with pytest.raises(OptionError, match="three axes"):
        matrix_view(torch.Size([6, 2]), experts=True)
