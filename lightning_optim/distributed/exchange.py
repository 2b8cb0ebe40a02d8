"""Brings matrices together at their owners, and their results back to where their elements live.

One message goes there and one comes back for each process group and dtype, however many tensors there are. Each rank
packs, for each owner in rank order and each matrix of that owner, its own part in row-major order, so all sizes follow
from shapes. Rounds bound the memory of large models: in each of them an owner gets matrices of a bounded size.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_optim.distributed.owners import Home

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

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


def exchange(
    parts: Sequence[Part], compute: Callable[[Matrices], None], error: Exception | None = None
) -> Exception | None:
    """Compute matrices at their owners.

    Whatever has failed here, the other ranks wait for this one. So it takes part to the end, and the messages with
    results say so. Where there are several process groups, all matrices of a round are computed before any result is
    sent, so that each group hears of what has failed in another one.

    Args:
        parts: The parts. Those of a tensor are in an order that is the same on all ranks.
        compute: Computes matrices of which this process is the owner, and writes each result over the first argument.
        error: What has failed on this rank before.

    Returns:
        What has failed, here or on another rank; results mean nothing then. None where nothing has.
    """
    kinds: dict[tuple[ProcessGroup, bool, torch.dtype], list[Part]] = {}
    for part in sorted(parts, key=lambda part: part.home.position):
        kinds.setdefault((part.home.group, not part.home.held, part.dtype), []).append(part)
    found = []
    for (group, replicated, _), of_kind in kinds.items():
        of_kind.sort(key=lambda part: part.home.number)
        most = ROUND // dist.get_world_size(group) if replicated else ROUND  # replicas receive from all owners
        found.append([(_Replicas if replicated else _Shards)(of_round) for of_round in rounds(of_kind, most)])
    for together in itertools.zip_longest(*found):
        of_round = [one for one in together if one is not None]
        matrices = [matrix for one in of_round for matrix in one.gather()]
        error = error or attempt(compute, matrices)
        for one in of_round:
            error = one.spread(error)
    return error


def attempt(compute: Callable[[T], None], given: T) -> Exception | None:
    """Call a function; an error is kept until the other ranks, which wait for results of this one, know of it."""
    try:
        compute(given)
    except Exception as error:
        return error
    return None


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


class _Shards:
    """One round among ranks that each hold a shard of each tensor: one message there and one back.

    Args:
        parts: The parts of the round, of one process group and dtype.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.first, self.of_owner = parts[0], _by_owner(parts)
        self.own = parts[0].home.rank
        self.matrices: Matrices = []

    def gather(self) -> Matrices:
        """Bring matrices together, and return those of this rank."""
        mine, ranks = self.of_owner[self.own], range(len(self.of_owner))
        packed = [[x[part.of(self.own)] for part in of_rank for x in part.values] for of_rank in self.of_owner]
        sizes = [[part.numel_of(rank) for part in mine for _ in part.values] for rank in ranks]
        received = _all_to_all(packed, sizes, self.first)
        self.matrices = [(part, tuple(part.matrix() for _ in part.values)) for part in mine]
        for rank in ranks:
            places = [(part.within(rank), flat) for part, flats in self.matrices for flat in flats]
            for (within, flat), values in zip(places, received[rank], strict=True):
                flat[within] = values
        return self.matrices

    def spread(self, error: Exception | None) -> Exception | None:
        """Send results, or that something has failed; return what has failed on any rank."""
        flag, own = _flag(error, self.first, self.of_owner), self.own
        ranks = range(len(self.of_owner))
        packed = [[*(flats[0][part.within(rank)] for part, flats in self.matrices), flag] for rank in ranks]
        sizes = [[*(part.numel_of(own) for part in of_rank), 1] for of_rank in self.of_owner]
        results = _all_to_all(packed, sizes, self.first)
        self.matrices = []
        for of_rank, message in zip(self.of_owner, results, strict=True):
            for part, values in zip(of_rank, message[:-1], strict=True):
                part.result[part.of(own)] = values
        return error or _told(flag, [message[-1] for message in results])


class _Replicas:
    """One round among ranks that each hold all arguments: one message, with the results of each owner.

    Args:
        parts: The parts of the round, of one process group and dtype.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.first, self.of_owner = parts[0], _by_owner(parts)
        self.matrices: Matrices = []

    def gather(self) -> Matrices:
        """The matrices of this rank."""
        mine = self.of_owner[self.first.home.rank]
        self.matrices = [(x, tuple(value[x.of(0)].to(x.dtype, copy=True) for value in x.values)) for x in mine]
        return self.matrices

    def spread(self, error: Exception | None) -> Exception | None:
        """Send results, or that something has failed; return what has failed on any rank."""
        sizes = [[1, *(part.high - part.low for part in of_rank)] for of_rank in self.of_owner]
        room = max(map(sum, sizes))  # messages of this call are of equal size
        flag = _flag(error, self.first, self.of_owner)
        packed = torch.cat([flag, *(flats[0] for _, flats in self.matrices)])
        self.matrices = []
        received = packed.new_empty(len(sizes) * room)
        padded = nn.functional.pad(packed, (0, room - len(packed)))
        dist.all_gather_into_tensor(received, padded, group=self.first.home.group)
        results = _split(received, [[*of_rank, room - sum(of_rank)] for of_rank in sizes])
        for of_rank, message in zip(self.of_owner, results, strict=True):
            for part, values in zip(of_rank, message[1:-1], strict=True):
                part.result[part.low : part.high] = values
        return error or _told(flag, [message[0] for message in results])


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


def _flag(error: Exception | None, part: Part, of_owner: Sequence[Sequence[Part]]) -> Tensor:
    """One element of the messages of a rank: 0 where it has failed, else what is equal where all have the same parts.

    The whole numbers up to 256 are exact in all dtypes.
    """
    places = [(one.home.number, one.low) for of_rank in of_owner for one in of_rank]
    return part.matrix(1).fill_(0.0 if error is not None else 1.0 + zlib.crc32(repr(places).encode()) % 255)


def _told(own: Tensor, flags: Sequence[Tensor]) -> Exception | None:
    """What the flags of all ranks say."""
    # Reading them, the host waits for a GPU; else a rank would write what the one that failed has not computed.
    mine, *every = torch.cat([own, *flags]).tolist()
    if 0.0 in every:
        return RuntimeError(
            f"a function of whole matrices has failed on rank {every.index(0.0)} of those that share its parameters, "
            "which says why. No parameter has been written in this step."
        )
    other = next((rank for rank, flag in enumerate(every) if flag != mine), None)
    if other is not None:
        return RuntimeError(
            f"rank {other} of those that share these parameters has gradients of other matrices than this one. All "
            "must have gradients of the same parameters. No parameter has been written in this step."
        )
    return None
