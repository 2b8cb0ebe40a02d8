"""Functions of whole matrices inside an update.

Such a function needs all elements of a matrix at once, so it cuts the update into passes, as a sum does: a pass
computes its arguments, torch computes the function on whole matrices, wherever they are brought together, and later
passes read the result like one more slot. Slots of the matrices (`Slot(per="matrix")`) lie where the function runs, and
only it reads them. They are written with all other slots, when nothing of the step can fail any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lightning_optim.language.math import evaluation
from lightning_optim.language.symbols import Kind, Symbol, is_element
from lightning_optim.language.values import Operand, Setting, Slots, Value

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class MatrixFunction:
    """A function of whole matrices with its settings. Equal ones are computed together.

    Attributes:
        function: Computes a batch of matrices of one shape: tensors (k, rows, columns), one for each argument, and the
            settings and numbers by name, to a new tensor (k, rows, columns). It does not change its arguments. With
            slots it is also given, after the matrices, a dict of their values by name, each (k, *shape of the slot),
            and returns a pair: the result and a dict of new values. Slots that are not in it keep their values.
        settings: Names and values that select the program: hashable, and no floats.
        numbers: The names of the numbers that follow the matrices and the slots as arguments.
        slots: The names of the slots of the matrices that it reads and writes.
    """

    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...] = ()
    numbers: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()

    def __call__(
        self, matrices: tuple[Tensor, ...], numbers: tuple[float, ...], slots: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The result for a batch of matrices, and new values of slots, by name."""
        given = {**dict(self.settings), **dict(zip(self.numbers, numbers, strict=True))}
        if not self.slots:
            return self.function(*matrices, **given), {}
        result, new = self.function(*matrices, slots, **given)
        return result, new

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


def whole(
    function: Callable[..., Any],
    *values: Operand,
    s: Slots | None = None,
    slots: Sequence[str] | Setting = (),
    **given: Any,
) -> Value:
    """A function of the whole matrices that the tensors are (`Definition.matrices`), however they are sharded.

    Args:
        function: The function, in torch: see `MatrixFunction`.
        values: Its arguments, with one value per element of the tensor. So has the result.
        s: The slots of the update, where the function has slots of the matrices.
        slots: The names of these slots. No other function of the update may read or write them.
        given: Its settings (words, bools, ints, tuples) and numbers (floats, or what is computed from them).
    """
    numbers = {name: x for name, x in given.items() if isinstance(x, float | Value)}
    settings = tuple((name, x) for name, x in given.items() if name not in numbers)
    names: Any = tuple(slots)
    called = MatrixFunction(function, settings, tuple(numbers), names)
    before: Any = [getattr(s, name) for name in names]
    symbols = [x for x in (*values, *before, *numbers.values()) if isinstance(x, Symbol)]
    if not symbols:
        return cast(Value, evaluation().whole(called, cast(Any, values), cast(Any, tuple(numbers.values()))))
    if not values or not all(map(is_element, values)):
        raise TypeError(f"a function of whole matrices takes values of each element, and got {[*values]}.")
    if not all(x.name == "matrix" for x in before):
        raise TypeError(f"the slots of matrices {[*names]} must each be read and written by one function.")
    level = max(symbol.level for symbol in symbols) + 1
    result = symbols[0].tracer.symbol("whole", (called, *values, *numbers.values()), Kind.ELEMENT, level)
    for name in names:
        setattr(s, name, result.tracer.symbol("after", (result, name), Kind.MATRIX, level))
    return result
