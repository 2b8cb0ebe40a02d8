"""The local parameters that one kernel call serves, with the table of their addresses on the device.

A kernel serves any number of local parameters. `Launch.tiles` says to which of them a tile of elements belongs, and
its row in `Launch.table` holds its first tile, its number of elements and the address of each of its operands.

All of it is kept with the batch from step to step. Only gradients move in between, and then one column is rewritten.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_optim.engines.signature import FIXED, Signature
from lightning_optim.engines.step import Batch, LocalParameter
from lightning_optim.storage import Quantized


@dataclass(eq=False)
class Launch:
    """Local parameters of one signature.

    Attributes:
        signature: What they have in common.
        tile: How many elements of one of them an instance of the kernel serves.
        params: The local parameters.
        positions: Where each of them stands in its batch.
        addresses: For one after another, the addresses of its operands.
        copies: Operands that no kernel can read as they are: name, tensor and the copy that is served in its place.
        table: The table of this step, (params + 1, width) int64: the first tile, the number of elements, the addresses;
            the last row closes the last local parameter.
        kept: The table that later steps start from; another than `table` while a CUDA graph is captured.
        tiles: (count,) int32: the row of each tile.
        count: How many tiles there are.
        host: `kept` on the host; pinned for a GPU, since the copy may still be under way, or be captured in a graph.
        grads: The addresses of the gradients in `kept`.
    """

    signature: Signature
    tile: int
    params: list[LocalParameter] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    copies: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    table: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    tiles: Tensor = field(init=False)
    count: int = field(init=False)
    host: Tensor = field(init=False)
    grads: list[int] = field(init=False)

    def build_table(self) -> None:
        """Write down where the local parameters are."""
        device = self.params[0].param.device
        numel = torch.tensor([param.param.numel() for param in self.params], dtype=torch.int64)
        tiles = (numel + self.tile - 1) // self.tile
        table = torch.zeros(len(numel) + 1, self.signature.width, dtype=torch.int64)
        table[1:, 0] = tiles.cumsum(0)
        table[:-1, 1] = numel
        table[:-1, FIXED:] = torch.tensor(self.addresses, dtype=torch.int64).view(len(numel), -1)
        row_of = torch.repeat_interleave(torch.arange(len(numel), dtype=torch.int32), tiles)
        self.host = pinned(table, device)
        self.tiles, self.count = to_device(row_of, device), len(row_of)
        self.table = self.kept = moved(self.host, device)
        self.grads = self._grads()

    def follow_gradients(self) -> None:
        """Set the table of this step: gradients may have moved since the last one."""
        grads = self._grads()
        self.table = self.kept
        if grads != self.grads:
            self.rewrite_gradients(grads)

    def rewrite_gradients(self, grads: list[int]) -> None:
        """Set the table of this step to one with other addresses of gradients."""
        column = self.signature.offsets["g"]
        if capturing():
            # A copy from the host would be repeated with the graph, when the host's memory holds something else. What
            # a graph fills is there once it is replayed, and not before: no step outside it can go by this table.
            self.table = _filled_on_device(self.kept, column, grads)
            return
        self.host = pinned(self.host.clone(), self.kept.device)
        self.host[:-1, column] = torch.tensor(grads, dtype=torch.int64)
        self.table = self.kept = moved(self.host, self.kept.device)
        self.grads = grads

    def _grads(self) -> list[int]:
        has_gradient = "g" in self.signature.offsets
        return [param.grad.data_ptr() for param in self.params] if has_gradient else []  # type: ignore[union-attr]

    @functools.cached_property
    def where(self) -> Tensor:
        """`positions` on the device, (params,) int64."""
        return to_device(torch.tensor(self.positions, dtype=torch.int64), self.table.device)

    def copy_back(self, names: Sequence[str]) -> None:
        """Bring what was written to copies of these operands back to their tensors."""
        for name, tensor, copy in self.copies:
            if name in names:
                tensor.copy_(copy)


def launches_of(
    batch: Batch, names: Sequence[str], served: Sequence[torch.dtype], by_alignment: bool, tile: int
) -> list[Launch]:
    """The launches that serve a batch; those of the step before, as long as they hold.

    Args:
        batch: The batch.
        names: The operands: `"p"`, `"g"` and slots; also `"index"`, as the last, where normal numbers are needed.
        served: The dtypes that kernels read and write; others are copied.
        by_alignment: Whether local parameters with odd addresses go apart.
        tile: How many elements an instance of the kernel serves.
    """
    grads = _kinds_of_gradients(batch.params, by_alignment) if "g" in names else []
    key = (*names, by_alignment, tile)
    launches: list[Launch]
    known, launches = batch.cache.get(key, (None, []))
    if known != grads:
        launches = _launches(batch.params, names, served, by_alignment, tile)
        for launch in launches:
            launch.build_table()
        batch.cache[key] = grads, launches
        if any(launch.copies for launch in launches):  # they hold the values of this step
            del batch.cache[key]
    else:
        for launch in launches:
            launch.follow_gradients()
    return launches


def capturing() -> bool:
    """Whether what reaches the device is written down for a CUDA graph, and not run."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """Host memory from which a GPU can read by itself."""
    return values.pin_memory() if device.type == "cuda" else values


def moved(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made in the order of its stream: the host does not wait."""
    return values.to(device, non_blocking=True)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on the device, without waiting for it."""
    return moved(pinned(values, device), device)


def _filled_on_device(table: Tensor, column: int, values: Sequence[int]) -> Tensor:
    """A copy of a table with another column, for which the host copies nothing."""
    table = table.clone()
    for row, value in enumerate(values):
        table[row, column].fill_(value)
    return table


def _kinds_of_gradients(params: list[LocalParameter], by_alignment: bool) -> list[Any]:
    """What launches take for granted of gradients.

    Lists of plain values: this is done in every step, and many small objects would wake the garbage collector.
    """
    grads = [param.grad for param in params]
    kinds: list[Any] = [[grad.dtype for grad in grads], list(map(Tensor.is_contiguous, grads))]  # type: ignore
    return [*kinds, [grad.data_ptr() % 16 == 0 for grad in grads]] if by_alignment else kinds  # type: ignore


def _launches(
    params: list[LocalParameter], names: Sequence[str], served: Sequence[torch.dtype], by_alignment: bool, tile: int
) -> list[Launch]:
    launches: dict[Signature, Launch] = {}
    indexed = names[-1] == "index"
    names = _with_partners(params, names[:-1] if indexed else names)
    for position, param in enumerate(params):
        operands: list[Any] = []
        addresses: list[int] = []
        copies: list[tuple[str, Tensor, Tensor]] = []
        for name in names:
            value: Any = param.param if name == "p" else param.grad if name == "g" else param.state[name]
            if isinstance(value, Quantized):
                operands.append((name, value.format))
                addresses += [value.codes.data_ptr(), value.scales.data_ptr()]
                continue
            if value.dtype not in served or not value.is_contiguous():
                dtype = value.dtype if value.dtype in served else torch.float32
                copy = value.to(dtype=dtype, memory_format=torch.contiguous_format, copy=True)
                copies.append((name, value, copy))
                value = copy
            operands.append((name, value.dtype))
            addresses.append(value.data_ptr())
        signature = Signature(tuple(operands), by_alignment and not any(x % 16 for x in addresses), indexed)
        if signature not in launches:
            launches[signature] = Launch(signature, tile)
        launch = launches[signature]
        launch.params.append(param)
        launch.positions.append(position)
        launch.addresses += [*addresses, *(_global_index(param) if indexed else ())]
        launch.copies += copies
    return list(launches.values())


def _with_partners(params: list[LocalParameter], names: Sequence[str]) -> Sequence[str]:
    """The operands, and the partners of quantized ones among them: a stage may touch one without the other."""
    formats = (
        value.format for param in params for name in names if isinstance(value := param.state.get(name), Quantized)
    )
    missing = {found.partner for found in formats if found.partner} - set(names)
    return [names[0], *sorted(missing), *names[1:]] if missing else names


def _global_index(param: LocalParameter) -> tuple[int, int, int, int]:
    index = param.global_index
    assert index is not None
    return index.tensor, index.first, index.run, index.stride
