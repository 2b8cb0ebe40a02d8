"""Lists of parameters as one vector, however they are sharded: inner products, and random vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.distributed.global_index import GlobalIndex
from lightning_optim.distributed.philox import normals
from lightning_optim.distributed.placement import like, local, shard_of
from lightning_optim.distributed.reductions import Reductions

CHUNK = 2**16  # elements that are converted to float64 at a time, at least


class Vectors:
    """The space of vectors with one element for each element of some parameters.

    A vector is a flat tensor of the elements that this process holds: the shards of the parameters one after the other.
    What is replicated (plain tensors, DDP) is whole on each rank. The order is that of the parameters, except that
    those that are split over the same process groups stand together.

    Args:
        params: The parameters: plain tensors, DTensors, or what FSDP1 made of them.

    Attributes:
        params: The parameters.
        dimension: Number of elements of all whole parameters.
        local: Number of elements of a vector on this process.
        dtype: Of vectors: float64 if a parameter has it, otherwise float32.
        device: Of vectors: that of the first parameter.
        ranges: Ranges of elements: the process groups over which each is split, and its bounds.
        replicated: The range of the elements of vectors that belong to plain tensors.

    Example:
        >>> space = Vectors([torch.ones(2, 3), torch.ones(4)])
        >>> v = space.random(seed=0)
        >>> v.shape, [tuple(x.shape) for x in space.tensors(v)]
        (torch.Size([10]), [(2, 3), (4,)])
        >>> torch.allclose(space.dots(v[None], v), v.double().square().sum())
        True
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self._shards = [shard_of(p) for p in self.params]
        wide = any(p.dtype == torch.float64 for p in self.params)
        self.dtype = torch.float64 if wide else torch.float32
        self.device = local(self.params[0]).device
        self.dimension = sum(shard.numel for shard in self._shards)
        self._reductions = Reductions(self.params)
        kinds = list(dict.fromkeys([(), *(shard.process_groups for shard in self._shards)]))
        self._order = sorted(range(len(self.params)), key=lambda i: kinds.index(self._shards[i].process_groups))
        self._sizes = [local(self.params[i]).numel() for i in self._order]
        self.local = sum(self._sizes)
        self.ranges = []
        low = 0
        for groups, members in itertools.groupby(self._order, key=lambda i: self._shards[i].process_groups):
            high = low + sum(local(self.params[i]).numel() for i in members)
            self.ranges.append((groups, low, high))
            low = high
        self.replicated = slice(0, next((high for groups, _, high in self.ranges if not groups), 0))

    def zeros(self, *sizes: int) -> Tensor:
        """A zero vector, or a tensor (sizes, local) of several."""
        return torch.zeros(*sizes, self.local, dtype=self.dtype, device=self.device)

    def flat(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The vector of one tensor for each parameter: shaped and sharded like it, or its shard, or None for zeros."""
        found = self.zeros()
        parts = torch.split(found, self._sizes)
        for i, part in zip(self._order, parts, strict=True):
            given = tensors[i]
            if given is not None:
                shard = local(given).detach()
                part.copy_((shard.to_dense() if shard.is_sparse else shard).reshape(-1))
        return found

    def shards(self, vector: Tensor) -> list[Tensor]:
        """The elements of a vector that belong to each parameter, shaped like its local tensor, on its device.

        They share the memory of the vector where device and dtype allow.
        """
        parts = dict(zip(self._order, torch.split(vector, self._sizes), strict=True))
        kept = [local(p) for p in self.params]
        return [parts[i].view(p.shape).to(p.device, p.dtype) for i, p in enumerate(kept)]

    def tensors(self, vector: Tensor) -> list[Tensor]:
        """A vector as one tensor for each parameter, shaped and placed like it."""
        return [like(x, p) for x, p in zip(self.shards(vector), self.params, strict=True)]

    def dots(self, vectors: Tensor, v: Tensor) -> Tensor:
        """Inner products of several vectors with one, computed in float64, in one message.

        It is one message for each way in which parameters are split over ranks; most models know one way.

        Args:
            vectors: (k, local).
            v: (local,).

        Returns:
            (k,) float64 on the CPU, the same on every rank.
        """
        partials = [_dots(vectors[:, low:high], v[low:high]) for _, low, high in self.ranges]
        summed = self._reductions.reduce_tensors(partials, [groups for groups, _, _ in self.ranges])
        return torch.stack(summed).sum(0).cpu()

    def norm(self, v: Tensor) -> float:
        """The Euclidean norm of a vector over all ranks."""
        return float(self.dots(v[None], v)[0].sqrt())

    def random(self, seed: int, number: int = 0, signs: bool = False) -> Tensor:
        """A random vector: standard normal numbers, or +1 and -1 with equal probability.

        An element depends on the seed, on the number of the vector, on the position of its parameter in the list and on
        its index in the whole parameter, so it is the same under every strategy and no generator is touched.

        Args:
            seed: The seed, below 2^64.
            number: Which vector of this seed, below 2^32.
            signs: Whether elements are +1 and -1.

        Raises:
            OptionError: where FSDP1 shows flat parameters (`use_orig_params=False`).
        """
        parts = []
        for i, size in zip(self._order, self._sizes, strict=True):
            parts.append((GlobalIndex(i, *self._shards[i].runs()), 0, size))
        found = normals(seed, number, parts, self.device, self.dtype)
        return found.sign_() if signs else found


def _dots(vectors: Tensor, v: Tensor) -> Tensor:
    """Inner products of local elements, (k,) float64. What is converted at a time is as large as one vector."""
    found = torch.zeros(len(vectors), dtype=torch.float64, device=v.device)
    size = len(v) if v.dtype == torch.float64 else max(CHUNK, len(v)) // max(1, len(vectors))
    for low in range(0, len(v), max(1, size)):
        step = slice(low, low + size)
        found += vectors[:, step].double() @ v[step].double()
    return found
