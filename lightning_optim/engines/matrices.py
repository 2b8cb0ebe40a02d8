"""Functions of whole matrices, computed in torch between the passes of a step: the same for all engines.

Matrices of equal shapes and numbers are one batch, over all tensors of the step. So the batches follow from the shapes
of what is computed here, and a run that is repeated on as many ranks repeats its bits. Other batches (another number of
ranks, another strategy) may round products differently in the last place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.exchange import Matrices, Part, attempt, exchange
from lightning_optim.distributed.owners import Home
from lightning_optim.distributed.ranks import is_alone
from lightning_optim.engines.step import LocalParameter
from lightning_optim.language.matrices import MatrixFunction
from lightning_optim.language.view import View

BUCKET = 1 << 26  # bytes of the matrices that are computed at once, which bounds the memory that this takes
CACHED = 1 << 20  # bytes of them on a CPU, where a batch saves calls, and large matrices are faster one by one


@dataclass(frozen=True, eq=False)
class Call:
    """A function of the matrices of one tensor.

    Attributes:
        param: The local parameter.
        function: The function.
        values: Its arguments, in the shape of `param.param`, in memory that nothing else uses. The result replaces the
            first one.
        numbers: Its numbers.
    """

    param: LocalParameter
    function: MatrixFunction
    values: tuple[Tensor, ...]
    numbers: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Unit:
    """One matrix of a call.

    Attributes:
        call: The call.
        arguments: The matrix in each argument, (rows, columns).
        result: Where the result goes, (rows, columns); it may be the memory of the first argument.
        shape: The shape in which the function sees it (`View.axes`).
        index: The index of the matrix in its tensor.
    """

    call: Call
    arguments: tuple[Tensor, ...]
    result: Tensor
    shape: tuple[int, ...]
    index: int

    @property
    def slots(self) -> dict[str, Tensor]:
        """What the matrix has of the slots of the function, by name."""
        return {name: self.call.param.of_matrices[name][self.index] for name in self.call.function.slots}


def compute(calls: Sequence[Call]) -> None:
    """Compute all functions of one level: here, or at the owners of their matrices.

    Args:
        calls: The calls, in an order that is the same on all ranks.

    Raises:
        TypeError: where the page gives no matrices of a tensor, or its function returns something of another shape.
        RuntimeError: where the function of another rank has failed.
    """
    units: list[Unit] = []
    parts: list[Part] = []
    strided: list[tuple[Tensor, Tensor]] = []
    for call in calls:
        view, home, first = call.param.view, call.param.home, call.values[0]
        if view is None:
            raise TypeError(
                f"an update uses {call.function!r}, a function of whole matrices, on a tensor of shape "
                f"{[*first.shape]}, of which its `matrices` gives no matrices."
            )
        result = first.contiguous()
        if result is not first:  # the matrix has its rows in the tensor's own order, not in that of memory
            strided.append((first, result))
        values = (result, *(value.contiguous() for value in call.values[1:]))
        if home is None or (not home.held and is_alone()):
            arguments = zip(*(map(view.matrices, values)), strict=True)
            units += [Unit(call, own, own[0], view.shape(i), i) for i, own in enumerate(arguments) if own[0].numel()]
        else:
            parts += _parts(call, view, home, tuple(value.view(-1) for value in values))
    error = attempt(run, units)
    error = exchange(parts, _run_owned, error)
    if error is not None:
        raise error
    for first, result in strided:
        first.copy_(result)


def _parts(call: Call, view: View, home: Home, values: tuple[Tensor, ...]) -> Iterator[Part]:
    """What this process holds of the matrices of a call."""
    dtype, low = call.function.rounded_to(values[0].dtype, values[0].device), 0
    for i, owner in enumerate(home.owners):
        high = low + view.rows[i] * view.columns
        if low < high:
            yield Part(home, owner, low, high, dtype, values, values[0], (call, i))
        low = high


def _run_owned(owned: Matrices) -> None:
    """Compute matrices that were brought here."""
    units = []
    for part, values in owned:
        call, i = part.tag
        arguments = tuple(value.view(call.param.view.rows[i], -1) for value in values)
        units.append(Unit(call, arguments, arguments[0], call.param.view.shape(i), i))
    run(units)


def run(units: Sequence[Unit]) -> None:
    """Compute matrices of which this process has all elements, batch by batch."""
    batches: dict[object, list[Unit]] = {}
    for unit in units:
        first = unit.arguments[0]
        dtype = unit.call.param.compute_dtype  # the matrices that were brought here may be rounded already
        key = (unit.call.function, unit.call.numbers, unit.shape, dtype, first.device)
        batches.setdefault(key, []).append(unit)
    for batch in batches.values():
        first = batch[0].arguments[0]
        room = min(BUCKET, CACHED) if first.device.type == "cpu" else BUCKET
        size = max(1, room // (first.numel() * first.element_size()))
        with _own_precision(first.device):
            for low in range(0, len(batch), size):
                _run_batch(batch[low : low + size])


def _run_batch(units: Sequence[Unit]) -> None:
    call, first = units[0].call, units[0].arguments[0]
    dtype = call.function.rounded_to(call.param.compute_dtype, first.device)
    stacked = (torch.stack(of_units).to(dtype) for of_units in zip(*(x.arguments for x in units), strict=True))
    arguments = tuple(x.view(len(units), *units[0].shape) for x in stacked)
    shape = arguments[0].shape
    held = [unit.slots for unit in units]
    slots = {name: torch.stack([of_unit[name] for of_unit in held]).to(dtype) for name in call.function.slots}
    results, new = call.function(arguments, call.numbers, slots)
    if results.shape != shape:
        raise TypeError(
            f"{call.function!r}, a function of whole matrices, must return a tensor of the shape of its "
            f"arguments: it got (matrices, rows, columns) = {[*shape]} and returned {[*results.shape]}."
        )
    for i, unit in enumerate(units):
        unit.result.copy_(results[i].reshape(unit.result.shape))
        unit.call.param.pending.update({(name, unit.index): value[i] for name, value in new.items()})


@contextlib.contextmanager
def _own_precision(device: torch.device) -> Iterator[None]:
    """Compute products in the dtype of the matrices, whatever the user allows a model to do, and no gradients.

    A function that wants fewer bits says so by `rounded`.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _full_products():
        yield


@contextlib.contextmanager
def _full_products() -> Iterator[None]:
    """Switch off TF32 and bfloat16 inside float32 products (`torch.set_float32_matmul_precision`)."""
    known = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    backends: list[Any] = [backend for backend in known if hasattr(backend, "fp32_precision")]
    if not backends:  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision
