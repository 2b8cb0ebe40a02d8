"""Brings matrices together at their owners, and their results back to where their elements live.

One message goes there and one comes back for each process group and dtype, however many tensors there are. Each rank
packs, for each owner in rank order and each matrix of that owner, its own part in row-major order, so all sizes follow
from shapes. Rounds bound the memory of large models: in each of them an owner gets matrices of a bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_optim.distributed.owners import Home

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROUND = 1 << 28  # bytes that one rank receives at once


@dataclass(frozen=True, eq=False)
class Part:
    """What this process holds of one matrix, or of several that are arguments of one function.

    Attributes:
        home: The home of the tensor.
        owner: The rank that computes this matrix.
        low: The global index of the first element of the matrix.
        high: The global index of the end of the matrix.
        dtype: The dtype in which its elements travel.
        values: The flat local tensors of which the matrix is a range, one for each argument.
        result: The flat local tensor into which the result goes.
        tag: Whatever the caller needs to compute it.
    """

    home: Home
    owner: int
    low: int
    high: int
    dtype: torch.dtype
    values: tuple[Tensor, ...]
    result: Tensor
    tag: Any

    def of(self, rank: int) -> slice:
        """The elements of this matrix in what a rank holds of the flat tensor."""
        if not self.home.held:
            return slice(self.low, self.high)
        held = self.home.held[rank]
        return slice(held.before(self.low), held.before(self.high))

    def numel_of(self, rank: int) -> int:
        """The number of elements of this matrix that a rank holds."""
        own = self.of(rank)
        return own.stop - own.start  # type: ignore[no-any-return]

    def matrix(self, numel: int | None = None) -> Tensor:
        """An empty flat tensor on its device, of the size of the matrix or another one."""
        return self.result.new_empty(self.high - self.low if numel is None else numel, dtype=self.dtype)

    def within(self, rank: int) -> slice | Tensor:
        """The positions in the flat matrix of the elements that a rank holds."""
        return self.home.held[rank].within(self.low, self.high, self.result.device)


Matrices = list[tuple[Part, tuple[Tensor, ...]]]  # what an owner computes: a part, and its whole flat arguments


def exchange(parts: Sequence[Part], compute: Callable[[Matrices], None]) -> None:
    """Compute matrices at their owners.

    Args:
        parts: The parts, in an order that is the same on all ranks.
        compute: Computes matrices of which this process is the owner, and writes each result over the first argument.

    Raises:
        RuntimeError: where another rank could not compute its matrices. Nothing has been written to results then.
    """
    kinds: dict[tuple[ProcessGroup, bool, torch.dtype], list[Part]] = {}
    for part in parts:
        kinds.setdefault((part.home.group, not part.home.held, part.dtype), []).append(part)
    for (group, replicated, _), of_kind in kinds.items():
        most = ROUND // dist.get_world_size(group) if replicated else ROUND  # replicas receive from all owners
        for of_round in rounds(of_kind, most):
            (_among_replicas if replicated else _among_shards)(of_round, compute)


def rounds(parts: Sequence[Part], most: int) -> list[list[Part]]:
    """The parts in rounds, in each of which no owner has more than this number of bytes, or one matrix."""
    found: list[list[Part]] = []
    filled: dict[int, tuple[int, int]] = {}  # of each owner: its round, and the bytes in it
    for part in parts:
        size = (part.high - part.low) * len(part.values) * part.dtype.itemsize
        index, before = filled.get(part.owner, (0, 0))
        if before and before + size > most:
            index, before = index + 1, 0
        filled[part.owner] = index, before + size
        found += [[] for _ in range(index + 1 - len(found))]
        found[index].append(part)
    return found


def _among_shards(parts: Sequence[Part], compute: Callable[[Matrices], None]) -> None:
    """One message there and one back: each rank holds a shard of each tensor."""
    own, of_owner = parts[0].home.rank, _by_owner(parts)
    mine = of_owner[own]
    packed = [[value[part.of(own)] for part in of_rank for value in part.values] for of_rank in of_owner]
    sizes = [[part.numel_of(rank) for part in mine for _ in part.values] for rank in range(len(of_owner))]
    received = _all_to_all(packed, sizes, parts[0])
    matrices = [(part, tuple(part.matrix() for _ in part.values)) for part in mine]
    for rank in range(len(of_owner)):
        indices = [(part.within(rank), flat) for part, flats in matrices for flat in flats]
        for (within, flat), values in zip(indices, received[rank], strict=True):
            flat[within] = values
    del packed, received
    error = _attempt(compute, matrices)
    flag = _flag(error, parts[0])
    packed = [[*(flats[0][part.within(rank)] for part, flats in matrices), flag] for rank in range(len(of_owner))]
    results = _all_to_all(packed, [[*(part.numel_of(own) for part in of_rank), 1] for of_rank in of_owner], parts[0])
    _raise(error, [message[-1] for message in results])
    for of_rank, message in zip(of_owner, results, strict=True):
        for part, values in zip(of_rank, message[:-1], strict=True):
            part.result[part.of(own)] = values


def _among_replicas(parts: Sequence[Part], compute: Callable[[Matrices], None]) -> None:
    """One message: each rank holds all arguments, computes its matrices and sends the results to all others."""
    own, of_owner = parts[0].home.rank, _by_owner(parts)
    mine = [(x, tuple(value[x.of(own)].to(x.dtype, copy=True) for value in x.values)) for x in of_owner[own]]
    error = _attempt(compute, mine)
    sizes = [[*(part.high - part.low for part in of_rank), 1] for of_rank in of_owner]
    room = max(map(sum, sizes))  # messages of this call are of equal size
    packed = torch.cat([*(flats[0] for _, flats in mine), _flag(error, parts[0])])
    received = packed.new_empty(len(of_owner) * room)
    dist.all_gather_into_tensor(received, nn.functional.pad(packed, (0, room - len(packed))), group=parts[0].home.group)
    results = _split(received, [[*of_rank, room - sum(of_rank)] for of_rank in sizes])
    _raise(error, [message[-2] for message in results])
    for of_rank, message in zip(of_owner, results, strict=True):
        for part, values in zip(of_rank, message[:-2], strict=True):
            part.result[part.low : part.high] = values


def _by_owner(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of each rank of the group as an owner."""
    found: list[list[Part]] = [[] for _ in range(dist.get_world_size(parts[0].home.group))]
    for part in parts:
        found[part.owner].append(part)
    return found


def _all_to_all(packed: Sequence[Sequence[Tensor]], sizes: Sequence[list[int]], part: Part) -> list[Sequence[Tensor]]:
    """Send tensors to each rank, and return what each rank has sent.

    Args:
        packed: The flat tensors for each rank.
        sizes: The numbers of elements of the tensors that each rank sends here.
        part: A part of the exchange.
    """
    flat = [x for of_rank in packed for x in of_rank]
    sent = torch.cat(flat).to(part.dtype) if flat else part.matrix(0)
    received = part.matrix(sum(map(sum, sizes)))
    sent_sizes = [sum(x.numel() for x in of_rank) for of_rank in packed]
    dist.all_to_all_single(received, sent, list(map(sum, sizes)), sent_sizes, group=part.home.group)
    return _split(received, sizes)


def _split(received: Tensor, sizes: Sequence[list[int]]) -> list[Sequence[Tensor]]:
    """What each rank has sent, tensor by tensor."""
    messages = torch.split(received, list(map(sum, sizes)))
    return [torch.split(message, of_rank) for message, of_rank in zip(messages, sizes, strict=True)]


def _attempt(compute: Callable[[Matrices], None], matrices: Matrices) -> Exception | None:
    """Compute matrices; an error is kept until the other ranks, which wait for the results, know of it."""
    try:
        compute(matrices)
    except Exception as error:
        return error
    return None


def _flag(error: Exception | None, part: Part) -> Tensor:
    """Whether this rank has failed, as the last element of its messages."""
    return part.matrix(1).fill_(float(error is not None))


def _raise(error: Exception | None, flags: Sequence[Tensor]) -> None:
    if error is not None:
        raise error
    # Reading them, the host waits for a GPU; else a rank would write what the one that failed has not computed.
    failed = [rank for rank, flag in enumerate(torch.cat(list(flags)).tolist()) if flag]
    if failed:
        raise RuntimeError(
            f"a function of whole matrices has failed on rank {failed[0]} of those that share its parameters, which "
            "says why. No parameter has been written in this step."
        )
