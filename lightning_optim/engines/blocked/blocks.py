"""Walks over the elements of local parameters in blocks that fit into the cache."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.distributed.philox import normals
from lightning_optim.engines.blocked.printer import Code
from lightning_optim.engines.step import LocalParameter
from lightning_optim.storage import Quantized

CACHED = 32768  # elements per thread and block: blocks of four float32 buffers fit into a cache of 1 MiB
PACKED = 2048  # tensors of up to so many elements share a block: copying them there costs less than separate calls


# Writes the numbers of a statistic for a block: name of the input, position in the batch, buffer, first element.
Spread = Callable[[str, int, Tensor, int], Tensor]


@dataclass(frozen=True)
class Pack:
    """The launch of this engine: one local parameter of any size, or several small ones that share a block.

    Attributes:
        params: The local parameters, all of one compute dtype.
        positions: The index of each of them in the batch.
    """

    params: list[LocalParameter]
    positions: list[int]


def packs(params: Sequence[LocalParameter], alone: bool) -> list[Pack]:
    """Sort local parameters into packs.

    Args:
        params: The local parameters of a batch.
        alone: Whether each of them gets a pack of its own, as it must where a number differs between tensors.
    """
    sorted_packs: list[Pack] = []
    room: dict[torch.dtype, tuple[Pack, int]] = {}  # the pack to fill, and how many elements fit into it
    for position, param in enumerate(params):
        numel, dtype = param.param.numel(), param.compute_dtype
        quantized = any(isinstance(value, Quantized) for value in param.state.values())  # also where a shard is small
        if alone or quantized or numel > PACKED or param.param.is_neg():  # torch copies no list into lazy signs
            sorted_packs.append(Pack([param], [position]))
            continue
        pack, left = room.get(dtype, (None, 0))
        if pack is None or numel > left:
            pack, left = Pack([], []), CACHED
            sorted_packs.append(pack)
        pack.params.append(param)
        pack.positions.append(position)
        room[dtype] = pack, left - numel
    return sorted_packs


def walk(
    pack: Pack, code: Code, write: bool, t: int, counters: Mapping[str, tuple[int, int]], spread: Spread
) -> Iterator[list[Tensor]]:
    """Yield the views of one block after another. Copies are written back when the next block is requested.

    A view is a copy where an operand has no one-dimensional view in the compute dtype: several small tensors in one
    block, half precision, a quantized slot, or a tensor that is not contiguous.

    Args:
        pack: The local parameters.
        code: The code that runs on the views: its inputs, then its scratch buffers.
        write: Whether the code writes its outputs into the views.
        t: The step counter, on which stochastic rounding depends.
        counters: The seed and the step of each input that holds normal numbers, by name.
        spread: A function that fills the inputs that hold statistics.
    """
    total = sum(param.param.numel() for param in pack.params)
    if total == 0:
        return
    size = min(total, CACHED * torch.get_num_threads())
    scratch = _scratch.buffers(pack.params[0].compute_dtype, code.scratch, size)
    if len(pack.params) > 1:
        yield from _side_by_side(pack.params, code, scratch, write, counters)
    else:
        yield from _one_by_one(pack, code, scratch, size, write, t, counters, spread)


def _one_by_one(
    pack: Pack,
    code: Code,
    scratch: Sequence[Tensor],
    size: int,
    write: bool,
    t: int,
    counters: Mapping[str, tuple[int, int]],
    spread: Spread,
) -> Iterator[list[Tensor]]:
    """The blocks of one local parameter."""
    (param,), (position,) = pack.params, pack.positions
    dtype, total = param.compute_dtype, param.param.numel()
    computed = counters.keys() | code.statistics.keys()
    operands = {name: param.operand(name) for name in code.inputs if name not in computed}
    quantized = [name for name, value in operands.items() if isinstance(value, Quantized)]
    written = [name for name in quantized if name in code.written]
    flat = {name: value.reshape(-1) for name, value in operands.items() if isinstance(value, Tensor)}  # copy if strided
    staged = {
        name: torch.empty(size, dtype=dtype, device="cpu") for name, value in flat.items() if value.dtype != dtype
    }
    for low in range(0, total, size):
        high = min(low + size, total)
        stored = storage.read(param.state, quantized, low, high)
        values = {name: value.to(dtype) for name, value in stored.items()}  # the model may have become float64
        for name, whole in flat.items():
            block = whole[low:high]
            values[name] = staged[name][: high - low].copy_(block) if name in staged else block
        for name, counter in counters.items():
            values[name] = _normals(counter, [(param, low, high)], dtype)
        for name in code.statistics:
            values[name] = spread(name, position, torch.empty(high - low, dtype=dtype, device="cpu"), low)
        yield [*(values[name] for name in code.inputs), *(buffer[: high - low] for buffer in scratch)]
        if write:
            for name in staged:
                if name in code.written:
                    flat[name][low:high].copy_(values[name])
            storage.write(param.state, {name: values[name] for name in written}, t, low)
    for name in code.written if write else ():
        value = operands[name]
        if isinstance(value, Tensor) and not value.is_contiguous():
            value.copy_(flat[name].view(value.shape))


def _side_by_side(
    params: Sequence[LocalParameter],
    code: Code,
    scratch: Sequence[Tensor],
    write: bool,
    counters: Mapping[str, tuple[int, int]],
) -> Iterator[list[Tensor]]:
    """One block that holds several small tensors."""
    dtype, sizes = params[0].compute_dtype, [param.param.numel() for param in params]
    total = sum(sizes)
    tensors = {name: [param.operand(name) for param in params] for name in code.inputs if name not in counters}
    values = {name: torch.empty(total, dtype=dtype, device="cpu") for name in tensors}
    for name, sources in tensors.items():
        torch._foreach_copy_(torch.split(values[name], sizes), [tensor.reshape(-1) for tensor in sources])
    for name, counter in counters.items():
        values[name] = _normals(counter, [(param, 0, n) for param, n in zip(params, sizes, strict=True)], dtype)
    yield [*(values[name] for name in code.inputs), *(buffer[:total] for buffer in scratch)]
    for name in code.written if write else ():
        flat = torch.split(values[name], sizes)
        shaped = [new.view(tensor.shape) for new, tensor in zip(flat, tensors[name], strict=True)]
        torch._foreach_copy_(tensors[name], shaped)


def _normals(counter: tuple[int, int], spans: Sequence[tuple[LocalParameter, int, int]], dtype: torch.dtype) -> Tensor:
    """The normal numbers of some elements, given as local parameter, first element and end, one after another."""
    ranges = [(param.index_in_memory, low, high) for param, low, high in spans]
    return normals(*counter, ranges, "cpu", dtype)


def _new_buffers(dtype: torch.dtype, counts: tuple[int, int], size: int) -> tuple[Tensor, ...]:
    """Buffers that every block overwrites: `counts[0]` of the compute dtype and `counts[1]` of bools."""
    return (
        *(torch.empty(size, dtype=dtype, device="cpu") for _ in range(counts[0])),
        *(torch.empty(size, dtype=torch.bool, device="cpu") for _ in range(counts[1])),
    )


class _Scratch(threading.local):
    """The buffers of the thread that asks, since another one may be in the middle of a block."""

    def __init__(self) -> None:
        self.buffers = functools.lru_cache(maxsize=8)(_new_buffers)


_scratch = _Scratch()
