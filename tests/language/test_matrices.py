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
    def matrices(h: Options, shape: torch.Size) -> View | None:
        return matrix_view(shape, blocks=2)

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.exp_avg = m = ema(s.exp_avg, g, 0.5)
        return p - h.lr * whole(halves_of_rows, m, share=h.lr)


def growing(g: Tensor, slots: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient times the sum of all products of gradients with themselves."""
    products = slots["products"] + g @ g.mT
    return products @ g, {"products": products}


class Growing(Optimizer):
    """A page with a slot of each matrix, which one function reads and writes."""

    lr: float = 0.5
    blocks: int = 1

    products = Slot("P", per="matrix", shape=("rows", "rows"))

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        return matrix_view(shape, [1, 2] if h.blocks == 3 else int(h.blocks))

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        return p - h.lr * (whole(growing, g, s=s, slots=("products",)) if h.has_products else g)

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"has_products": len(shape) > 1}


del OPTIMIZERS["summed"], OPTIMIZERS["growing"]  # no pages of the package


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


@pytest.mark.parametrize(("blocks", "shape"), [(1, (4, 4)), (2, (2, 2, 2)), (4, (4, 1, 1))])
def test_a_slot_of_a_matrix_is_read_and_written_by_its_function(blocks: int, shape: tuple[int, ...]) -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3, 2, dtype=torch.float64))
    bias = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Growing([p, bias], blocks=blocks)
    products, expected = torch.zeros(blocks, 4 // blocks, 4 // blocks).double(), torch.zeros(4, 6).double()
    for step in range(3):
        p.grad, bias.grad = torch.randn(4, 3, 2, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        g = p.grad.view(blocks, -1, 6)
        products = products + g @ g.mT
        expected -= 0.5 * (products @ g).view(4, 6)
        optimizer.step()
        assert torch.allclose(p.detach().view(4, 6), expected, atol=1e-12), step
    found = optimizer.state[p]["products"]
    assert found.shape == shape
    assert torch.allclose(found.view(products.shape), products)
    assert "products" not in optimizer.state[bias]
    assert torch.equal(bias.detach(), torch.full((4,), -1.5).double())


def test_slots_of_unequal_matrices_lie_one_behind_the_other() -> None:
    p = torch.nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.arange(6.0).view(3, 2)
    optimizer = Growing([p], blocks=3)
    optimizer.step()
    first, rest = p.grad[:1] @ p.grad[:1].mT, p.grad[1:] @ p.grad[1:].mT
    assert torch.equal(optimizer.state[p]["products"], torch.cat([first.flatten(), rest.flatten()]))


def test_a_slot_of_a_matrix_has_no_arithmetic() -> None:
    slots = {"products": Slot(per="matrix", shape=("rows", "rows"))}
    with pytest.raises(TypeError, match="only the function given to `whole` reads it"):
        trace(lambda p, g, s, h: p - s.products, {"lr": 0.5}, slots)
    program = trace(lambda p, g, s, h: p - whole(growing, g, s=s, slots=("products",)), {"lr": 0.5}, slots)
    assert program.slots == {"products"}
    assert program.writes == {"p"}
    assert program.outputs["products"].kind == Kind.MATRIX


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
