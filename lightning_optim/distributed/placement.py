"""Where a parameter lives: in one process, replicated (DDP), in a flat parameter (FSDP1), or as a DTensor (FSDP2)."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.fsdp1 import flattened, is_flattened
from lightning_optim.distributed.shard import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def shard_of(p: Tensor) -> Shard:
    """The shard of a parameter that this process holds, under any strategy.

    Raises:
        RuntimeError: where FSDP1 flattened the parameter and its flat parameter is not found.
    """
    if is_dtensor(p):
        return _shard_of_dtensor(p)  # not cached: torch swaps parameters only if no weak reference points at them
    return flattened(p).shard if is_flattened(p) else Shard.whole(p.shape)


def logical_shape(p: Tensor) -> torch.Size:
    """The shape of the whole parameter, as in the model before it was sharded."""
    return flattened(p).shard.shape if is_flattened(p) else p.shape


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is a DTensor.

    If it is, its module is imported already. Importing it here would take a second.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP1 or FSDP2 manages the tensor, so that `shard_of` is not simply the whole tensor."""
    return is_dtensor(tensor) or is_flattened(tensor)


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def values_of(gradient: Tensor) -> Tensor:
    """The local elements of a gradient; of a sparse one those that are there, each once."""
    found = local(gradient)
    return found.coalesce().values() if found.is_sparse else found


def like(values: Tensor, p: Tensor) -> Tensor:
    """The flat local `values` of a parameter as a tensor of its shape and placements."""
    if not is_dtensor(p):
        return values.view(p.shape)
    from torch.distributed.tensor import DTensor

    shard = values.view(p.to_local().shape)
    return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def full_with_axes_reduced(p: Tensor, axes: Collection[int], value: float, dtype: torch.dtype) -> Tensor:
    """A tensor filled with `value`, shaped and sharded like `p`, except that some axes have size 1."""
    shape = torch.Size([1 if axis in axes else size for axis, size in enumerate(p.shape)])
    if not is_dtensor(p):
        return p.new_full(shape, value, dtype=dtype)
    from torch.distributed.tensor import DTensor, Replicate

    part = p.to_local()
    sizes = [1 if axis in axes else size for axis, size in enumerate(part.shape)]
    shard = part.new_full(sizes, value, dtype=dtype)
    along = [not x.is_replicate() and x.dim % p.dim() in axes for x in p.placements]  # type: ignore[attr-defined]
    placements = [Replicate() if split else x for split, x in zip(along, p.placements, strict=True)]
    stride = torch.empty(shape, dtype=dtype, device="meta").stride()
    return DTensor.from_local(shard, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def sharded_like(p: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Rows of a tensor of any shape as a DTensor on the device mesh of `p`, split along the first axis where `p` is.

    Args:
        p: A DTensor.
        values: The rows of this process, split as `torch.chunk` splits.
        shape: The shape of the whole tensor.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as ShardOf

    assert is_dtensor(p)
    placements = [Replicate() if x.is_replicate() else ShardOf(0) for x in p.placements]
    stride = torch.empty(shape, dtype=values.dtype, device="meta").stride()
    return DTensor.from_local(values, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def gradient_of(p: Tensor) -> Tensor | None:
    """The gradient of a parameter; an empty tensor where this process holds no element of one that has a gradient.

    FSDP1 leaves None there. But a process without elements takes part in all-reduces all the same. All trainable
    parameters of an FSDP unit get gradients together, so the other parameters of the unit tell.
    """
    if p.grad is not None or is_lazy(p) or p.numel() or not (p.requires_grad and is_flattened(p)):
        return p.grad
    entry = flattened(p)
    handle = entry.handle()
    if not entry.shard.splits or handle is None:
        return None
    held = [q for q in handle.flat_param._params if q.requires_grad and q.numel()]
    has = any(q.grad is not None for q in held) if held else handle.flat_param.grad is not None
    return torch.zeros_like(p) if has else None


def has_gradient(p: Tensor) -> bool:
    """Whether a parameter takes part in a step, on this process or, where it holds no element, on others."""
    return p.grad is not None or (not is_lazy(p) and not p.numel() and gradient_of(p) is not None)


def drop_gradients(params: Iterable[Tensor]) -> None:
    """Set gradients to None, so that every rank finds none; `gradient_of` included."""
    for p in params:
        p.grad = None
        if not p.numel() and is_flattened(p):  # FSDP1 keeps a gradient of a unit of which this process has nothing
            handle = flattened(p).handle()
            if handle is not None:
                handle.flat_param.grad = None


def reshard(model: Any) -> None:
    """Let the next forward pass all-gather parameters again, after their shards were changed.

    After a forward pass without a backward pass FSDP keeps the gathered parameters of the root unit, and would use
    them once more.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(model, torch.nn.Module):
        return
    module: Any
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
        elif isinstance(module, fsdp.FullyShardedDataParallel):
            handle = module._handle
            if handle is None or not handle.uses_sharded_strategy:
                continue
            if hasattr(handle.flat_param, "_local_shard"):  # which it has from its first forward pass on
                handle.reshard(True)


def _shard_of_dtensor(p: DTensor) -> Shard:
    """The shard of a DTensor, split as `torch.chunk` splits, one dimension of the device mesh after the other."""
    mesh = p.device_mesh
    cuts = _cuts(p)
    splits = tuple((axis, mesh.get_group(i)) for i, axis in cuts if mesh.size(i) > 1)
    offsets, sizes = block(p, mesh.get_coordinate() or [0] * mesh.ndim)
    axes = [axis for axis, _ in splits]
    shape = tuple(p.to_local().shape)
    strided = shape != sizes or (len(set(axes)) < len(axes) and not all(x.is_shard() for x in p.placements))
    return Shard(p.shape, p.shape, offsets, shape, splits, strided=strided)


def shards_of_all(p: Tensor, group: ProcessGroup) -> tuple[Shard, ...]:
    """The shards that the ranks of a process group hold of a DTensor, in rank order; none of another tensor.

    Args:
        p: The parameter.
        group: The process group that splits it.
    """
    if not is_dtensor(p):
        return ()
    mesh = p.device_mesh
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    along = next(i for i, _ in _cuts(p) if mesh.size(i) > 1 and mesh.get_group(i) is group)
    ranks = mesh.mesh[tuple(slice(None) if i == along else at for i, at in enumerate(coordinate))].tolist()
    found = []
    for rank in torch.distributed.get_process_group_ranks(group):
        there = [ranks.index(rank) if i == along else at for i, at in enumerate(coordinate)]
        found.append(Shard(p.shape, p.shape, *block(p, there)))
    return tuple(found)


def _cuts(p: DTensor) -> list[tuple[int, int]]:
    """The dimensions of the device mesh that split a DTensor, each with the axis that it splits."""
    # What is not replicated is Shard, or a strided form of it that denies being one.
    split = [(i, x) for i, x in enumerate(p.placements) if not x.is_replicate()]
    return [(i, x.dim % p.dim()) for i, x in split]  # type: ignore[attr-defined]


def block(p: DTensor, coordinate: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First indices and sizes of the block of a DTensor at a place in its device mesh."""
    offsets, sizes = [0] * p.dim(), list(p.shape)
    for i, axis in _cuts(p):
        chunk = -(-sizes[axis] // p.device_mesh.size(i))
        low = min(coordinate[i] * chunk, sizes[axis])
        sizes[axis] = min(chunk, sizes[axis] - low)
        offsets[axis] += low
    return tuple(offsets), tuple(sizes)
