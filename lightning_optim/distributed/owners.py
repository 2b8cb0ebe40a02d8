"""Which rank computes which matrices: each matrix of a sharded or replicated tensor has an owner.

Owners follow from shapes and the number of ranks, so all ranks agree without a message, and a file need not know them.
They are decided over all matrices of an optimizer and stay, whichever tensors have gradients in a step.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.distributed.agreement import data_parallel
from lightning_optim.distributed.placement import is_dtensor, is_sharded, shard_of, shards_of_all
from lightning_optim.distributed.shard import Shard
from lightning_optim.language.view import View

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Choice = Literal["auto"] | bool  # whether replicas share the work

# Replicas (DDP) share the work where products take longer than sending their results: operations and bytes per second
# of a rank. Orders of magnitude of a current GPU and its links. The choice matters only far away from equality.
OPERATIONS, BANDWIDTH = 2e14, 1e11


@dataclass(frozen=True)
class Indices:
    """The global indices of the elements that one rank holds of a tensor, as `Shard.runs` gives them.

    Attributes:
        first: The global index of its first element.
        run: How many of its elements are consecutive in the tensor.
        stride: The distance between the starts of two runs in the tensor.
        numel: The number of its elements.
    """

    first: int
    run: int
    stride: int
    numel: int

    def before(self, index: int) -> int:
        """The number of its elements that lie before a global index."""
        runs, rest = divmod(max(index - self.first, 0), self.stride)
        return min(self.numel, runs * self.run + min(rest, self.run))

    def within(self, low: int, high: int, device: torch.device) -> slice | Tensor:
        """The positions of its elements in the range `low` to `high` of the flat tensor, counted from `low`."""
        first, last = self.before(low), self.before(high)
        if self.run == self.stride or self.numel <= self.run:
            return slice(self.first + first - low, self.first + last - low) if first < last else slice(0, 0)
        local = torch.arange(first, last, dtype=torch.int64, device=device)
        return self.first - low + local // self.run * self.stride + local % self.run


@dataclass(frozen=True, eq=False)
class Home:
    """Who computes the matrices of a parameter.

    Attributes:
        group: The ranks that share the work.
        position: The position of the parameter in the optimizer.
        number: How many parameters found a home in `group` before: the same on all of its ranks, of which some may have
            more parameters.
        owners: The rank in `group` that computes each matrix.
        held: What each rank of `group` holds of the tensor; empty where each of them holds all of it (DDP).
    """

    group: ProcessGroup
    position: int
    number: int
    owners: tuple[int, ...]
    held: tuple[Indices, ...] = ()

    @property
    def rank(self) -> int:
        """The rank of this process in the group."""
        return dist.get_rank(self.group)

    def matrices_of(self, rank: int) -> tuple[int, ...]:
        """The indices of the matrices that a rank of the group computes."""
        return tuple(i for i, owner in enumerate(self.owners) if owner == rank)


def cost(rows: int, columns: int) -> float:
    """Operations to orthogonalise a matrix by five steps of Newton-Schulz, which grow as those of other methods do."""
    small, large = sorted((rows, columns))
    return 20.0 * small * small * large + 10.0 * small**3


class Owners:
    """The owners of all matrices of an optimizer.

    A matrix goes to the rank that has the least to compute so far, the most expensive one first. Matrices that come
    later, when a frozen layer is trained, move no others.
    """

    def __init__(self) -> None:
        self.homes: dict[Tensor, Home | None] = {}
        self._views: dict[Tensor, View] = {}
        self._loads: dict[ProcessGroup, list[tuple[float, int, int]]] = {}  # cost, elements, rank: a heap
        self._numbers: dict[ProcessGroup, Iterator[int]] = {}

    def home(self, p: Tensor) -> Home | None:
        """The home of a parameter; None where each process that holds it computes its matrices by itself."""
        return self.homes.get(p)

    def knows(self, p: Tensor, view: View | None) -> bool:
        """Whether `follow` would do nothing for a parameter with this view."""
        alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        return alone or view is None or self._views.get(p) == view

    def follow(self, params: Sequence[tuple[Tensor, View | None]], choice: Choice = "auto") -> None:
        """Find homes for matrices that have none yet. Under FSDP1 this takes a message, so all ranks must call it.

        Args:
            params: All parameters of the optimizer, each with its view.
            choice: Whether replicas share the work.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        new = [(i, p, view) for i, (p, view) in enumerate(params) if view and self._views.get(p) != view]
        if not new:
            return
        replicas = _replicas(params, choice)
        groups: dict[ProcessGroup, list[tuple[int, Tensor, View]]] = {}
        for i, p, view in new:
            self._views[p], self.homes[p] = view, None
            group = _group_of(p) if is_sharded(p) else replicas
            if group is not None:
                groups.setdefault(group, []).append((i, p, view))
        for group, members in groups.items():
            held = _held([p for _, p, _ in members], group)
            owners = self._assign([view for _, _, view in members], group)
            numbers = self._numbers.setdefault(group, itertools.count())
            for (i, p, _), of_p, own in zip(members, held, owners, strict=True):
                self.homes[p] = Home(group, i, next(numbers), own, of_p)

    def _assign(self, views: Sequence[View], group: ProcessGroup) -> list[tuple[int, ...]]:
        """The owner of each matrix of each view."""
        if group not in self._loads:
            self._loads[group] = [(0.0, 0, rank) for rank in range(dist.get_world_size(group))]
        return assign(views, self._loads[group])


def assign(views: Sequence[View], loads: list[tuple[float, int, int]]) -> list[tuple[int, ...]]:
    """The rank that computes each matrix of each view.

    Args:
        views: The views of tensors, in their order in the optimizer.
        loads: What each rank has to do already, as a heap of cost, elements and rank. It is updated.

    Example:
        >>> assign([View((8, 8), 8), View((16,), 16)], [(0.0, 0, 0), (0.0, 0, 1)])
        [(1, 1), (0,)]
    """
    matrices = [(i, j, rows, view.columns) for i, view in enumerate(views) for j, rows in enumerate(view.rows)]
    found = [[0] * len(view.rows) for view in views]
    for i, j, rows, columns in sorted(matrices, key=lambda x: -cost(*x[2:])):
        work, elements, rank = loads[0]
        heapq.heapreplace(loads, (work + cost(rows, columns), elements + rows * columns, rank))
        found[i][j] = rank
    return [tuple(owners) for owners in found]


def _group_of(p: Tensor) -> ProcessGroup | None:
    """The process group over which a parameter is sharded; None where it is not, or where that cannot be served."""
    shard = shard_of(p)
    return shard.splits[0][1] if len(shard.splits) == 1 and not (shard.strided or shard.is_flat_parameter) else None


def _held(params: Sequence[Tensor], group: ProcessGroup) -> list[tuple[Indices, ...]]:
    """What each rank of a process group holds of some parameters."""
    flat = [p for p in params if is_sharded(p) and not is_dtensor(p)]
    asked: dict[Tensor, tuple[Indices, ...]] = {}
    if flat:  # FSDP1 tells each rank about its own part alone
        parts = [(*shard_of(p).offsets, *shard_of(p).sizes) for p in flat]
        own = torch.tensor(parts, dtype=torch.int64, device=flat[0].device)
        every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, own, group=group)
        for p, ranges in zip(flat, torch.stack(every, 1).tolist(), strict=True):
            asked[p] = tuple(Indices(first, 1, 1, numel) for first, numel in ranges)
    return [asked[p] if p in asked else tuple(map(_indices, shards_of_all(p, group))) for p in params]


def _indices(shard: Shard) -> Indices:
    return Indices(*shard.runs(), torch.Size(shard.sizes).numel())


def _replicas(params: Sequence[tuple[Tensor, View | None]], choice: Choice) -> ProcessGroup | None:
    """The ranks of a DDP module that share the work on plain parameters; None where each does all of it.

    By default they do where the model says that it is faster, and only where they certainly hold the same: the
    optimizer has all parameters of the module, and its gradients are averaged in DDP's own way.
    """
    plain = [(p, view) for p, view in params if view and not is_sharded(p)]
    module = data_parallel([p for p, _ in plain]) if plain and choice else None
    if module is None:
        return None
    group: ProcessGroup = module.process_group
    if choice is True:
        return group
    held = {id(p) for p, _ in params}
    alike = all(id(p) in held for p in module.parameters() if p.requires_grad) and not vars(module).get("_comm_hooks")
    work = sum(cost(rows, view.columns) for _, view in plain for rows in view.rows)
    size = sum(p.numel() * p.element_size() for p, _ in plain)
    pays = plain[0][0].device.type == "cuda" and sharing_pays(work, size, dist.get_world_size(group))
    return group if alike and pays else None


def sharing_pays(work: float, size: int, ranks: int) -> bool:
    """Whether replicas are faster if each computes a part of the matrices and sends its results to all others.

    Args:
        work: Operations for all matrices.
        size: Bytes of all matrices.
        ranks: The number of replicas.

    Example:
        >>> sharing_pays(60 * cost(4096, 4096), 2 * 60 * 4096**2, 8), sharing_pays(60 * cost(64, 64), 60 * 64**2, 8)
        (True, False)
    """
    seconds = work / OPERATIONS
    return seconds / ranks + size * (ranks - 1) / ranks / BANDWIDTH < seconds
