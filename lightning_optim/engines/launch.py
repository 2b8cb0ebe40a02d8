"""Where the tensors of a launch are: what they have in common, and a table of their addresses.

An engine with kernels serves any number of tensors in one launch. `Table.blocks` says to which tensor a block of
elements belongs, and the row of that tensor in `Table.rows` holds its first block, its number of elements and the
address of each of its columns (the parameter, the gradient, the slots; two addresses for a slot in codes).

All of it is kept with the rows from step to step. Only gradients move in between, and then one column is written
anew.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.step import Batch, LocalParameter
from lightning_optim.storage import Quantized

FIXED = 2  # numbers in a row of the table before the addresses


@dataclass(frozen=True)
class Column:
    """Where one per-element value of a tensor is kept.

    Attributes:
        name: `"p"`, `"g"`, a slot, or `"site"`.
        kind: A type, as float32, a format of codes (log, ratio, dynamic), or `"site"`: not values, but where in the
            whole tensor the elements are (`philox.GlobalIndex`), in the place of addresses.
        partner: The slot that codes need for their meaning.
        signed: Whether a table of codes is the signed one.
    """

    name: str
    kind: str
    partner: str | None = None
    signed: bool = True

    @property
    def quantized(self) -> bool:
        return self.kind in ("log", "ratio", "dynamic")

    @property
    def places(self) -> int:
        """How many numbers it has in a row of the table."""
        return 4 if self.kind == "site" else 2 if self.quantized else 1

    @property
    def codebook(self) -> str:
        """The argument that holds its table of codes."""
        return "signed_codebook" if self.signed else "unsigned_codebook"


@dataclass(frozen=True)
class Layout:
    """What the tensors of one launch have in common.

    Attributes:
        columns: Their per-element values, in the order of the table.
        aligned: Whether every address is a multiple of 16.
    """

    columns: tuple[Column, ...]
    aligned: bool

    @property
    def width(self) -> int:
        """Numbers in a row of the table."""
        return FIXED + sum(column.places for column in self.columns)

    def place(self, name: str) -> int:
        """Where in a row of the table the first address of a column stands."""
        before = [column.name for column in self.columns].index(name)
        return FIXED + sum(column.places for column in self.columns[:before])


@dataclass(frozen=True)
class Table:
    """Where the tensors of a launch are, on their device.

    Attributes:
        rows: (tensors + 1, width) int64: the first block, the number of elements, the addresses; the last row closes
            the last tensor.
        blocks: (count,) int32: the tensor of each block.
        count: How many blocks there are.
        host: The rows on the host; pinned for a GPU, since the copy may still be under way, or be captured in a graph.
    """

    rows: Tensor
    blocks: Tensor
    count: int
    host: Tensor


def build_table(device: torch.device, width: int, tile: int, sizes: Sequence[int], addresses: Sequence[int]) -> Table:
    """Write down where tensors of these sizes are, in blocks of `tile` elements."""
    numel = torch.tensor(sizes, dtype=torch.int64)
    blocks = (numel + tile - 1) // tile
    rows = torch.zeros(len(sizes) + 1, width, dtype=torch.int64)
    rows[1:, 0] = blocks.cumsum(0)
    rows[:-1, 1] = numel
    rows[:-1, FIXED:] = torch.tensor(addresses, dtype=torch.int64).view(len(sizes), width - FIXED)
    tensor_of = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    host = pinned(rows, device)
    return Table(moved(host, device), moved(pinned(tensor_of, device), device), len(tensor_of), host)


def replace_column(table: Table, place: int, addresses: Sequence[int]) -> Table:
    """The table after one column has moved."""
    if capturing():
        # A copy from the host would be repeated with the graph, when the host's memory holds something else.
        rows = table.rows.clone()
        for row, address in enumerate(addresses):
            rows[row, place].fill_(address)
        return Table(rows, table.blocks, table.count, table.host)
    host = pinned(table.host.clone(), table.rows.device)
    host[:-1, place] = torch.tensor(addresses, dtype=torch.int64)
    return Table(moved(host, table.rows.device), table.blocks, table.count, host)


def capturing() -> bool:
    """Whether what reaches the device is written down for a CUDA graph, and not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Host memory from which a GPU can read by itself."""
    return values.pin_memory() if device.type == "cuda" else values


def moved(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made in the order of its stream: the host does not wait."""
    return values.to(device, non_blocking=True)


@dataclass
class Group:
    """Tensors that one launch serves.

    Attributes:
        layout: What they have in common.
        rows: The tensors.
        addresses: For one tensor after another, where its columns are.
        grads: The addresses of the gradients alone.
    """

    layout: Layout
    rows: list[LocalParameter] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    table: Table | None = None
    grads: list[int] = field(default_factory=list)

    def follow(self, tile: int) -> Table:
        """The table of this step: gradients may have moved since the last one."""
        grads = [row.grad.data_ptr() for row in self.rows] if self._has_gradient() else []  # type: ignore[union-attr]
        if self.table is None:
            device = self.rows[0].param.device
            sizes = [row.param.numel() for row in self.rows]
            self.table = build_table(device, self.layout.width, tile, sizes, self.addresses)
        elif grads != self.grads:
            table = replace_column(self.table, self.layout.place("g"), grads)
            if capturing():
                return table  # filled when the graph is replayed, and not before: a step outside it cannot go by this
            self.table = table
        self.grads = grads
        return self.table

    def _has_gradient(self) -> bool:
        return any(column.name == "g" for column in self.layout.columns)


@dataclass
class Grouping:
    """The rows of a batch by what one launch can serve.

    Attributes:
        groups: The launches.
        grads: What the layouts took for granted of the gradients.
        staged: What could not be served as it is, and its copy; such a grouping is good for one step.
        order: Where each row of the groups stands among the rows as they were given.
        rows: All rows, in the order of the groups.
        numel: The number of elements of each logical tensor, (rows,) float64, on the device.
    """

    groups: list[Group]
    grads: list[Any]
    staged: list[tuple[str, Tensor, Tensor]]
    order: list[int] = field(default_factory=list)

    @functools.cached_property
    def rows(self) -> list[LocalParameter]:
        return [row for group in self.groups for row in group.rows]

    @functools.cached_property
    def numel(self) -> Tensor:
        numbers = torch.tensor([float(row.numel) for row in self.rows], dtype=torch.float64)
        return moved(pinned(numbers, self.rows[0].param.device), self.rows[0].param.device)

    @functools.cached_property
    def _places(self) -> Tensor:
        places = torch.tensor(self.order, dtype=torch.int64)
        return moved(pinned(places, self.rows[0].param.device), self.rows[0].param.device)

    def as_given(self, values: Tensor) -> Tensor:
        """One number for each row, in the order in which the rows were given.

        Ranks share that order, and not the one of the groups: addresses differ.
        """
        return values if len(self.groups) == 1 else torch.empty_like(values).index_copy_(0, self._places, values)

    def as_grouped(self, values: Tensor) -> Tensor:
        """The way back."""
        return values if len(self.groups) == 1 else values[self._places]


def grouping(batch: Batch, names: Sequence[str], served: Sequence[torch.dtype], by_alignment: bool) -> Grouping:
    """The rows by what one launch can serve; the one of the step before, as long as it holds.

    Args:
        batch: The batch.
        names: The columns: `"p"`, `"g"` and slots.
        served: The types that kernels read and write; others are copied.
        by_alignment: Whether tensors at odd addresses go apart.
    """
    rows = batch.params
    grads = _kinds_of_gradients(rows, by_alignment) if "g" in names else []
    key = (*names, by_alignment)
    known: Grouping | None = batch.cache.get(key)
    if known is None or known.grads != grads:
        known = _grouping(rows, names, served, by_alignment, grads)
        batch.cache[key] = known
        if known.staged:  # copies of values, which are of this step
            del batch.cache[key]
    return known


def _kinds_of_gradients(rows: list[LocalParameter], by_alignment: bool) -> list[Any]:
    """Lists of plain values: this is done in every step, and many small objects would wake the garbage collector."""
    grads = [row.grad for row in rows]
    kinds: list[Any] = [[grad.dtype for grad in grads], list(map(Tensor.is_contiguous, grads))]  # type: ignore
    return [*kinds, [grad.data_ptr() % 16 == 0 for grad in grads]] if by_alignment else kinds  # type: ignore


def _grouping(
    rows: list[LocalParameter],
    names: Sequence[str],
    served: Sequence[torch.dtype],
    by_alignment: bool,
    grads: list[Any],
) -> Grouping:
    names = _with_partners(rows, names)
    staged: list[tuple[str, Tensor, Tensor]] = []
    groups: dict[Any, Group] = {}
    order: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        kinds: list[Any] = []
        addresses: list[int] = []
        for name in names:
            if name == "site":
                assert row.global_index is not None
                kinds.append("site")
                addresses += [
                    row.global_index.tensor,
                    row.global_index.first,
                    row.global_index.run,
                    row.global_index.stride,
                ]
                continue
            value: Any = row.param if name == "p" else row.grad if name == "g" else row.state[name]
            if isinstance(value, Quantized):
                kinds.append(value.format)
                addresses += [value.codes.data_ptr(), value.scales.data_ptr()]
                continue
            if value.dtype not in served or not value.is_contiguous():
                value = _staged(name, value, served, staged)
            if value.device != row.param.device:
                raise RuntimeError(
                    f"{name} of a parameter of shape {tuple(row.param.shape)} is on {value.device}, and the parameter "
                    f"on {row.param.device}. Move the model before its optimizer is made, or load the state again."
                )
            kinds.append(value.dtype)
            addresses.append(value.data_ptr())
        places = addresses[:-4] if names[-1] == "site" else addresses
        aligned = by_alignment and not any(place % 16 for place in places)
        key = (aligned, *kinds)
        if key not in groups:
            groups[key] = Group(Layout(tuple(map(_column, names, kinds)), aligned))
        groups[key].rows.append(row)
        groups[key].addresses += addresses
        order.setdefault(key, []).append(place)
    return Grouping(list(groups.values()), grads, staged, [i for places in order.values() for i in places])


def _with_partners(rows: list[LocalParameter], names: Sequence[str]) -> Sequence[str]:
    """The columns, and those that codes among them have their meaning from; a stage may touch one without the other."""
    formats = (value.format for row in rows for name in names if isinstance(value := row.state.get(name), Quantized))
    missing = {found.partner for found in formats if found.partner} - set(names)
    return [names[0], *sorted(missing), *names[1:]] if missing else names


def _staged(
    name: str, value: Tensor, served: Sequence[torch.dtype], staged: list[tuple[str, Tensor, Tensor]]
) -> Tensor:
    """A copy that can be served."""
    dtype = value.dtype if value.dtype in served else torch.float32
    copy = value.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
    staged.append((name, value, copy))
    return copy


def _column(name: str, kind: Any) -> Column:
    """A column of a type, of a format of codes, or of places."""
    if kind == "site":
        return Column(name, "site")
    if isinstance(kind, torch.dtype):
        return Column(name, str(kind).removeprefix("torch."))
    return Column(name, kind.name, kind.partner, getattr(kind, "signed", True))
