"""What an optimizer hands to an engine: programs, and the tensors that they run on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed import Placement, is_sharded, local
from lightning_optim.slot import Slot
from lightning_optim.storage import Coded
from lightning_optim.trace import Program

HALF = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Row:
    """One parameter in one step, as this process holds it.

    Attributes:
        param: The parameter, real; complex parameters come as their real view with a last axis of 2.
        grad: The gradient, like the parameter; None where only stages run.
        state: The slots by name: tensors like the parameter, of an axis-reduced shape, or of shape (); or in codes.
        numel: Number of real elements of the logical tensor, of which this process may hold a part.
        sharded: Whether other processes hold other parts.
    """

    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    numel: int
    sharded: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that the arithmetic runs in: float32 for half precision, else the parameter's own."""
        return torch.float32 if self.param.dtype in HALF else self.param.dtype


def make_row(p: Tensor, grad: Tensor | None, state: dict[str, Any], slots: Mapping[str, Slot]) -> Row:
    """A parameter as engines see it: the local part, real, and with at least one axis."""
    param, gradient = local(p), None if grad is None else local(grad)
    state = {name: value if isinstance(value, Coded) else local(value) for name, value in state.items()}
    if param.is_complex():  # real and imaginary parts are elements of their own
        param, gradient = torch.view_as_real(param), None if gradient is None else torch.view_as_real(gradient)
        state = {name: torch.view_as_real(x) if x.is_complex() else x for name, x in state.items()}
    if param.dim() == 0:  # torch promotes types differently where a tensor has no axis
        param, gradient = param.view(1), None if gradient is None else gradient.view(1)
        state = {name: x.view(1) if slots[name].per == "element" else x for name, x in state.items()}
    return Row(param, gradient, state, p.numel() * (2 if p.is_complex() else 1), is_sharded(p))


@dataclass(slots=True)
class Job:
    """Rows that run one program with the same options and scalars.

    Attributes:
        program: What to run.
        h: The options of the group and the scalars of the step, by name.
        t: The step of these rows, which stochastic rounding depends on.
        rows: The tensors.
    """

    program: Program
    h: dict[str, Any]
    t: int = 0
    rows: list[Row] = field(default_factory=list)


@dataclass(slots=True)
class Step:
    """All that runs in one step of an optimizer.

    Attributes:
        jobs: What runs on which rows.
        shared: The slots that belong to the optimizer, shape (), float64; engines write them in place.
        placement: Sums partial results over the processes that share a tensor.
    """

    jobs: list[Job]
    shared: dict[str, Tensor]
    placement: Placement

    @property
    def rows(self) -> list[Row]:
        return [row for job in self.jobs for row in job.rows]
