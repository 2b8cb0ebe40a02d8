"""Functions of whole matrices inside an update.

Such a function needs all elements of a matrix at once, so it cuts the update into passes, as a sum does: a pass
computes its arguments, torch computes the function on whole matrices, wherever they are brought together, and later
passes read the result like one more slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from lightning_optim.language.math import evaluation
from lightning_optim.language.symbols import Kind, Symbol
from lightning_optim.language.values import Operand, Value


@dataclass(frozen=True)
class MatrixFunction:
    """A function of whole matrices with its settings. Equal ones are computed together.

    Attributes:
        function: Computes a batch of matrices of one shape: tensors (k, rows, columns), one for each argument, and the
            settings and numbers by name, to a new tensor (k, rows, columns). It does not change its arguments.
        settings: Names and values that select the program: hashable, and no floats.
        numbers: The names of the numbers that follow the matrices as arguments.
    """

    function: Callable[..., Tensor]
    settings: tuple[tuple[str, Any], ...] = ()
    numbers: tuple[str, ...] = ()

    def __call__(self, matrices: tuple[Tensor, ...], numbers: tuple[float, ...]) -> Tensor:
        """The result for a batch of matrices."""
        return self.function(*matrices, **dict(self.settings), **dict(zip(self.numbers, numbers, strict=True)))

    def __repr__(self) -> str:
        return self.function.__name__


def whole(function: Callable[..., Tensor], *values: Operand, **given: Any) -> Value:
    """A function of the whole matrices that the tensors are (`Definition.view`), however they are sharded.

    Args:
        function: The function, in torch: see `MatrixFunction`.
        values: Its arguments, with one value per element of the tensor. So has the result.
        given: Its settings (words, bools, ints, tuples) and numbers (floats, or what is computed from them).
    """
    numbers = {name: x for name, x in given.items() if isinstance(x, float | Value)}
    settings = tuple((name, x) for name, x in given.items() if name not in numbers)
    called = MatrixFunction(function, settings, tuple(numbers))
    symbols = [x for x in (*values, *numbers.values()) if isinstance(x, Symbol)]
    if symbols:
        level = max(symbol.level for symbol in symbols) + 1
        args = (called, *values, *numbers.values())
        return symbols[0].tracer.symbol("whole", args, Kind.ELEMENT, level)
    return cast(Value, evaluation().whole(called, cast(Any, values), cast(Any, tuple(numbers.values()))))
