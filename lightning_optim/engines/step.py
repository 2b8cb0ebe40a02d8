"""What an optimizer hands to an engine: programs, and the tensors that they run on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.distributed.philox import Site
from lightning_optim.distributed.shards import Piece, Placement, is_divided, local, piece_of
from lightning_optim.language.program import Program
from lightning_optim.language.slot import Slot
from lightning_optim.storage import Coded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HALF = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Row:
    """One parameter in one step, as this process holds it.

    Attributes:
        param: The parameter, real; complex parameters come as their real view with a last axis of 2.
        grad: The gradient, like the parameter; None where only stages run.
        state: The slots by name: tensors like the parameter, of an axis-reduced shape, or of shape (); or in codes.
        numel: Number of real elements of the logical tensor, of which this process may hold a part.
        piece: The part of it that this process holds; None where nobody divided it.
        site: Where in the whole tensor the elements are; None where nothing is drawn for them.
    """

    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    numel: int
    piece: Piece | None = None
    site: Site | None = None

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The process groups whose other members hold other parts."""
        return () if self.piece is None else self.piece.groups

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type that the arithmetic runs in: float32 for half precision, else the parameter's own."""
        return torch.float32 if self.param.dtype in HALF else self.param.dtype


class Rows(list[Row]):
    """Rows that take their steps together, with what an engine has found out about them.

    Attributes:
        groupings: By columns; an engine keeps here how it serves these rows, as long as they are the same.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        super().__init__(rows)
        self.groupings: dict[Any, Any] = {}


def make_row(p: Tensor, grad: Tensor | None, state: dict[str, Any], slots: Mapping[str, Slot]) -> Row:
    """A parameter as engines see it: the local part, real, and with at least one axis."""
    param, gradient = local(p), None if grad is None else local(grad)
    state = {name: value if isinstance(value, Coded) else local(value) for name, value in state.items()}
    _refuse_elsewhere(param, state, slots)
    _refuse_misfits(param, state, slots)
    if param.is_complex():  # real and imaginary parts are elements of their own
        param, gradient = torch.view_as_real(param), None if gradient is None else torch.view_as_real(gradient)
        state = {name: torch.view_as_real(x) if x.is_complex() else x for name, x in state.items()}
    if param.dim() == 0:  # torch promotes types differently where a tensor has no axis
        param, gradient = param.view(1), None if gradient is None else gradient.view(1)
        state = {name: x.view(1) if slots[name].per == "element" else x for name, x in state.items()}
    piece = piece_of(p) if is_divided(p) else None
    numel = p.numel() if piece is None else piece.numel
    return Row(param, gradient, state, numel * (2 if p.is_complex() else 1), piece)


def _refuse_elsewhere(param: Tensor, state: dict[str, Any], slots: Mapping[str, Slot]) -> None:
    """Refuse state on another device: engines that go by addresses would read what is not there."""
    for name, value in state.items():
        device = (value.codes if isinstance(value, Coded) else value).device
        if device != param.device and slots[name].per == "element":
            raise RuntimeError(
                f"{name} of a parameter of shape {tuple(param.shape)} is on {device}, and the parameter on "
                f"{param.device}. Move the model before its optimizer is made, or load the state again."
            )


def _refuse_misfits(param: Tensor, state: dict[str, Any], slots: Mapping[str, Slot]) -> None:
    """Refuse state of another size: engines that go by addresses would read and write beyond its end."""
    for name, slot in slots.items():
        if slot.per != "element" or slot.without is not None or name not in state:
            continue
        if state[name].shape != param.shape:
            raise RuntimeError(
                f"{name} has the shape {tuple(state[name].shape)}, and its parameter {tuple(param.shape)}. Did the "
                "parameter change after the first step? Make the optimizer anew, or call its reset()."
            )


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
    rows: Rows = field(default_factory=Rows)


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
