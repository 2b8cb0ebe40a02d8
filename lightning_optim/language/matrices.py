"""Functions of whole matrices inside an update.

Such a function needs all elements of a matrix at once, so it cuts the update into passes, as a sum does: a pass
computes its arguments, torch computes the function on whole matrices, wherever they are brought together, and later
passes read the result like one more slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lightning_optim.language.math import evaluation
from lightning_optim.language.symbols import Kind, Symbol, is_element
from lightning_optim.language.values import Operand, Value

F = TypeVar("F", bound=Callable[..., Tensor])


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

    def rounded_to(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of the matrices that it gets and returns, for a parameter that computes in `dtype` on `device`."""
        choose = getattr(self.function, "rounds_to", None)
        return dtype if choose is None else choose(dtype, device, **dict(self.settings))

    def __repr__(self) -> str:
        return self.function.__name__


def rounded(choose: Callable[..., torch.dtype]) -> Callable[[F], F]:
    """Declare that the matrices of a function are rounded to another dtype, in which they also travel between ranks.

    Args:
        choose: A function of the dtype in which the update computes, the device, and the settings by name, to the dtype
            of the matrices that the function gets.

    Example:
        >>> @rounded(lambda dtype, device: torch.bfloat16 if device.type == "cuda" else dtype)
        ... def centred(x: Tensor) -> Tensor:
        ...     return x - x.mean((1, 2), keepdim=True)
    """

    def declare(function: F) -> F:
        vars(function)["rounds_to"] = choose
        return function

    return declare


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
        if not values or not all(map(is_element, values)):
            raise TypeError(f"a function of whole matrices takes values of each element, and got {[*values]}.")
        level = max(symbol.level for symbol in symbols) + 1
        args = (called, *values, *numbers.values())
        return symbols[0].tracer.symbol("whole", args, Kind.ELEMENT, level)
    return cast(Value, evaluation().whole(called, cast(Any, values), cast(Any, tuple(numbers.values()))))
