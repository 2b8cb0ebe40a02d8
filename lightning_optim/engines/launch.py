"""The local parameters that one kernel call serves, with the table of their addresses on the device.

A kernel serves any number of local parameters, tile by tile. `Launch.tiles` holds for each tile the row of its local
parameter in `Launch.table`. A row holds the first tile of the local parameter, its number of elements and the addresses
of its operands.

Launches are cached with the batch from step to step. Only gradients move in between, and then one column of the table
is rewritten.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.captures import NO_TABLES, OTHER_GRADIENTS, REBUILT, capturing
from lightning_optim.engines.facts import Facts
from lightning_optim.engines.signature import FIXED, Numbers, Signature
from lightning_optim.engines.step import Batch, LocalParameter
from lightning_optim.storage import Quantized
from lightning_optim.storage.format import Format

ROOMS = 4  # captures with moved gradients that one copy serves each, without a step outside a graph in between


@dataclass(eq=False)
class Launch:
    """Local parameters of one signature.

    Attributes:
        signature: The names and formats of their operands.
        tile: The number of elements that one instance of the kernel serves.
        params: The local parameters.
        positions: The index of each of them in the batch.
        addresses: The addresses of the operands, of one local parameter after another.
        copies: Operands that a kernel cannot read as they are: name, tensor, and the copy that the kernel gets instead.
        staged: Copies of such gradients, which each step fills, by the index of the local parameter.
        table: The table of this step, (params + 1, width) int64. Columns are the first tile, the number of elements and
            the addresses. The last row holds only the total number of tiles.
        cached_table: The table that later steps start from. It differs from `table` while a CUDA graph is captured.
        tiles: The row of each tile, (count,) int32.
        count: The number of tiles.
        host: `cached_table` on the host. It is pinned for a GPU, since the copy may still be running, or be captured in
            a graph.
        grads: The addresses of the gradients in `cached_table`, (params,) int64; None where kernels read none.
        rooms: Pinned tables for captures, made before: memory cannot be pinned while a graph is captured.
        in_graph: The pinned table from which the last captured step copies, in each replay.
        levels: In which order the results of tiles are combined, where an engine does that on the device.
        kernels: For each program that has run on it, the kernels and what they are compiled into, by what they compute.
        ran: Whether the kernel of the last pass may have written something in this step.
    """

    signature: Signature
    tile: int
    params: list[LocalParameter] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    copies: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    staged: dict[int, Tensor] = field(default_factory=dict)
    kernels: dict[Any, dict[Any, Any]] = field(default_factory=dict)
    ran: bool = False
    rooms: list[Tensor] = field(default_factory=list)
    in_graph: Tensor | None = None
    levels: list[Tensor] = field(default_factory=list)
    table: Tensor = field(init=False)
    cached_table: Tensor = field(init=False)
    tiles: Tensor = field(init=False)
    count: int = field(init=False)
    host: Tensor = field(init=False)
    grads: Tensor | None = field(init=False)

    def build_table(self) -> None:
        """Fill the table with the addresses of all operands."""
        device = self.params[0].param.device
        numel = torch.tensor([param.param.numel() for param in self.params], dtype=torch.int64, device="cpu")
        tiles = (numel + self.tile - 1) // self.tile
        table = torch.zeros(len(numel) + 1, self.signature.width, dtype=torch.int64, device="cpu")
        table[1:, 0] = tiles.cumsum(0)
        table[:-1, 1] = numel
        table[:-1, FIXED:] = torch.tensor(self.addresses, dtype=torch.int64, device="cpu").view(len(numel), -1)
        row_of = torch.repeat_interleave(torch.arange(len(numel), dtype=torch.int32, device="cpu"), tiles)
        self.host = pinned(table, device)
        self.tiles, self.count = to_device(row_of, device), len(row_of)
        self.table = self.cached_table = copied_to(self.host, device)

    def follow_gradients(self, of_batch: Tensor) -> None:
        """Prepare the table of this step where gradients have moved since the last one.

        Args:
            of_batch: The addresses of the gradients of the batch.
        """
        grads = self.addresses_of_gradients(of_batch)
        self.table = self.cached_table
        assert self.grads is not None
        if not torch.equal(grads, self.grads):
            self.rewrite_gradients(grads)

    def addresses_of_gradients(self, of_batch: Tensor) -> Tensor:
        """Where kernels read the gradients, given the addresses of those of the batch."""
        found = of_batch[self.rows]
        for i, copy in self.staged.items():
            found[i] = copy.data_ptr()
        return found

    def rewrite_gradients(self, grads: Tensor) -> None:
        """Prepare the table of this step with new addresses of gradients."""
        column = self.signature.offsets["g"]
        if capturing():
            # A tensor that a graph fills has its values only once the graph is replayed, so steps outside it cannot
            # use this table.
            self.table = self._table_of_graph(column, grads)
            return
        self._rewrite({column: grads})
        self.grads = grads

    def make_rooms(self) -> None:
        """Pin memory for the tables of captures to come."""
        while len(self.rooms) < ROOMS:
            self.rooms.append(pinned(torch.empty_like(self.host), self.cached_table.device))

    def _table_of_graph(self, column: int, grads: Tensor) -> Tensor:
        """A table with another column that each replay of the graph being captured makes by one copy.

        The copy is from memory that nothing else writes, and that must be kept as long as the graph (`captures.kept`).
        """
        if not self.rooms:
            return _filled_on_device(self.cached_table, column, grads)
        self.in_graph = self.rooms.pop()
        self.in_graph.copy_(self.host)
        self.in_graph[:-1, column] = grads
        return copied_to(self.in_graph, self.cached_table.device)

    def point_at_buffers(self, names: Sequence[str]) -> None:
        """Prepare the table for buffers that were made after it."""
        found = {x: [p.buffers[x].data_ptr() for p in self.params] for x in names}
        columns = {x: torch.tensor(of, dtype=torch.int64, device="cpu") for x, of in found.items()}
        self._rewrite({self.signature.offsets[x]: of for x, of in columns.items()})

    def _rewrite(self, columns: dict[int, Tensor]) -> None:
        """Prepare the table with other addresses in some columns."""
        self.host = pinned(self.host.clone(), self.cached_table.device)
        for column, addresses in columns.items():
            self.host[:-1, column] = addresses
        self.table = self.cached_table = copied_to(self.host, self.cached_table.device)

    @functools.cached_property
    def rows(self) -> Tensor:
        """`positions` as a tensor, (params,) int64."""
        return torch.tensor(self.positions, dtype=torch.int64, device="cpu")

    @functools.cached_property
    def positions_on_device(self) -> Tensor:
        """`positions` as a tensor on the device, (params,) int64."""
        return to_device(self.rows, self.table.device)

    def copy_back(self, names: Sequence[str]) -> None:
        """Copy what a kernel wrote to the copies of these operands back to their tensors."""
        for name, tensor, copy in self.copies:
            if name in names:
                tensor.copy_(copy)


def launches_of(
    batch: Batch,
    names: Sequence[str],
    buffers: Sequence[str],
    served: Sequence[torch.dtype],
    by_alignment: bool,
    tile: int,
    layouts: Sequence[Numbers] = (),
) -> list[Launch]:
    """The launches that serve a batch: those of the step before, if they are still valid.

    Args:
        batch: The batch.
        names: The operands: `"p"`, `"g"` and slots, and last `"index"` where normal numbers are needed.
        buffers: The buffers between passes, which do not exist yet.
        served: The dtypes that kernels read and write. Operands of other dtypes are copied.
        by_alignment: Whether kernels depend on which addresses are multiples of 16.
        tile: The number of elements that one instance of the kernel serves.
        layouts: The layout of each local parameter in numbers; empty where passes need no statistics.
    """
    key = (*names, *buffers, by_alignment, tile, *(batch.program.axes if layouts else ()))
    launches: list[Launch]
    before, launches = batch.cache.get(key, (None, []))
    gradients = (batch.gradients or _looked_at(batch, before)) if "g" in names else None
    if not launches or not _alike(before, gradients, by_alignment):
        if capturing():
            raise RuntimeError(REBUILT.format(OTHER_GRADIENTS if key in batch.cache else NO_TABLES))
        batch.hand_out()
        launches = _launches(batch.params, names, buffers, served, by_alignment, tile, layouts)
        for launch in launches:
            launch.build_table()
            launch.grads = launch.addresses_of_gradients(gradients.addresses) if gradients else None
        batch.cache[key] = gradients, launches
        if any(launch.copies for launch in launches):  # the copies hold the values of this step
            del batch.cache[key]
    elif gradients is not None and gradients is not before:
        for launch in launches:
            launch.follow_gradients(gradients.addresses)
        if all(launch.table is launch.cached_table for launch in launches):  # else a graph is being captured
            batch.cache[key] = gradients, launches
    else:
        for launch in launches:
            launch.table = launch.cached_table
    if staged := [(launch.params[i], copy) for launch in launches for i, copy in launch.staged.items()]:
        batch.hand_out()
        for param, copy in staged:
            copy.copy_(param.operand("g"))
    if batch.program.step_counter is not None and not capturing():
        for launch in launches:
            launch.make_rooms()
    return launches


def _looked_at(batch: Batch, before: Facts | None) -> Facts:
    batch.hand_out()
    return Facts.of([param.operand("g") for param in batch.params], before)


def _alike(before: Facts | None, now: Facts | None, by_alignment: bool) -> bool:
    """Whether launches for gradients as they were serve those that there are now, wherever these have moved."""
    if before is None or now is None or before is now:
        return before is now
    return before.kinds is now.kinds and (not by_alignment or torch.equal(before.aligned, now.aligned))


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """The values in pinned memory where the device is a GPU, so that it can copy them while the host goes on."""
    return values.pin_memory() if device.type == "cuda" else values


def copied_to(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made in the order of its stream. The host does not wait for it."""
    return values.to(device, non_blocking=True)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy values from the host to the device without waiting for it."""
    return copied_to(pinned(values, device), device)


def _filled_on_device(table: Tensor, column: int, values: Tensor) -> Tensor:
    """A copy of a table with another column, made without a copy from the host."""
    table = table.clone()
    for row, value in enumerate(values.tolist()):
        table[row, column].fill_(value)
    return table


def _launches(
    params: list[LocalParameter],
    names: Sequence[str],
    buffers: Sequence[str],
    served: Sequence[torch.dtype],
    by_alignment: bool,
    tile: int,
    layouts: Sequence[Numbers],
) -> list[Launch]:
    launches: dict[Signature, Launch] = {}
    shifted: set[Signature] = set()  # some of whose gradients are not aligned
    indexed = names[-1] == "index"
    names = _with_partners(params, names[:-1] if indexed else names)
    for position, param in enumerate(params):
        operands: list[Any] = []
        addresses: list[int] = []
        copies: list[tuple[str, Tensor, Tensor]] = []
        for name in names:
            value = param.operand(name)
            if isinstance(value, Quantized):
                operands.append((name, value.format))
                addresses += [value.codes.data_ptr(), value.scales.data_ptr()]
                continue
            if value.dtype not in served or not value.is_contiguous() or value.is_neg():
                dtype = value.dtype if value.dtype in served else torch.float32
                copy = value.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
                copies.append((name, value, copy))
                value = copy
            operands.append((name, value.dtype))
            addresses.append(value.data_ptr())
        operands += [(name, param.compute_dtype) for name in buffers]
        addresses += [0] * len(buffers)
        layout = layouts[position] if layouts else Numbers()
        aligned = frozenset(_aligned(operands, addresses)) if by_alignment else frozenset()
        signature = Signature(tuple(operands), aligned - {"g"}, indexed, layout.axes, layout.statistics)
        if signature not in launches:
            launches[signature] = Launch(signature, tile)
        launch = launches[signature]
        launch.params.append(param)
        launch.positions.append(position)
        launch.addresses += [*addresses, *(_global_index(param) if indexed else ()), *layout.numbers]
        launch.copies += [found for found in copies if found[0] != "g"]
        launch.staged.update((len(launch.params) - 1, copy) for name, _, copy in copies if name == "g")
        shifted |= {signature} if "g" not in aligned else set()
    for signature, launch in launches.items() if by_alignment and "g" in names else ():
        # Views of DDP's buckets begin anywhere. To read single elements costs less than a launch of their own.
        if signature not in shifted:
            launch.signature = replace(signature, aligned=signature.aligned | {"g"})
    return list(launches.values())


def _aligned(operands: Sequence[tuple[str, Any]], addresses: Sequence[int]) -> Iterator[str]:
    """The operands whose addresses are multiples of 16."""
    following = iter(addresses)
    for name, stored in operands:
        columns = [next(following) for _ in range(2 if isinstance(stored, Format) else 1)]
        if not any(address % 16 for address in columns):
            yield name


def _with_partners(params: list[LocalParameter], names: Sequence[str]) -> Sequence[str]:
    """The operands with the partners of the quantized ones: a stage may use a slot without its partner."""
    formats = (
        value.format for param in params for name in names if isinstance(value := param.state.get(name), Quantized)
    )
    missing = {found.partner for found in formats if found.partner} - set(names)
    return [names[0], *sorted(missing), *names[1:]] if missing else names


def _global_index(param: LocalParameter) -> tuple[int, ...]:
    index = param.index_in_memory
    return index.tensor, index.first, index.run, index.stride, *index.exchange
