"""The one place that knows process groups: where a tensor lives, and what is summed over which ranks."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.errors import OptionError
from lightning_optim.language.math import By, Over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from lightning_optim.language.program import Program


T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """The part of a logical tensor that this process holds.

    The part is a box: of the tensor itself, or (FSDP1) of the tensor laid out flat. So `view` is the shape in which it
    is one, and `offsets` and `sizes` say which box.

    Attributes:
        shape: The shape of the logical tensor, as in the model that was not sharded.
        view: `shape`, or `(shape.numel(),)`.
        offsets: Where the box begins on each axis of `view`.
        sizes: How far it goes on each axis; 0 where this process holds no element.
        cuts: Along which axis of `view`, and over which process group, the tensor is divided. Replicas (hybrid
            sharding) are in none of these groups. Empty where this process holds the whole tensor.
        fused: Whether this is a part of FSDP1's flat parameter (`use_orig_params=False`), in which several tensors lie
            one after the other and are no longer known; `shape` is then that of the flat parameter.
        skewed: Whether the part is no box after all (tensor parallel and FSDP2 along one axis): `offsets` mean nothing.
    """

    shape: torch.Size
    view: torch.Size
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    cuts: tuple[tuple[int, ProcessGroup], ...] = ()
    fused: bool = False
    skewed: bool = False

    @classmethod
    def whole(cls, shape: torch.Size) -> Piece:
        """A tensor of which this process holds everything."""
        return cls(shape, shape, (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements of the logical tensor."""
        return self.shape.numel()

    @property
    def groups(self) -> tuple[ProcessGroup, ...]:
        """The process groups over which partial sums are added up, one after the other."""
        return tuple(group for _, group in self.cuts)

    def groups_along(self, axis: int) -> tuple[ProcessGroup, ...]:
        """Those of them over which one axis of the tensor is divided."""
        return tuple(group for cut, group in self.cuts if cut == axis % len(self.view))

    @property
    def flat(self) -> bool:
        """Whether the part has lost its axes: FSDP1 cuts through rows."""
        return self.fused or len(self.view) != len(self.shape)

    def indices(self, device: torch.device | str = "cpu") -> Tensor:
        """The places of the local elements in the logical tensor, row by row: int64, in the order of the local part.

        They do not depend on the number of ranks, so a counter-based random number drawn from them is the same
        under every strategy.

        Raises:
            OptionError: where the places are not known (`fused`, `skewed`).
        """
        self._check_places()
        found = torch.zeros(1, dtype=torch.int64, device=device)
        for total, offset, size in zip(self.view, self.offsets, self.sizes, strict=True):
            along = torch.arange(offset, offset + size, dtype=torch.int64, device=device)
            found = (found[:, None] * total + along).reshape(-1)
        return found

    def runs(self) -> tuple[int, int, int]:
        """The same places in three numbers: `run` elements from `first` on, then `run` elements `stride` further on.

        Returns:
            first, run and stride; run equals stride where the part is without a gap, and where it is empty.

        Raises:
            OptionError: where the places are not known, or are of no such form (cut along three axes, or along two of
                which neither is the first).
        """
        self._check_places()
        cut = [axis for axis, (size, total) in enumerate(zip(self.sizes, self.view, strict=True)) if size != total]
        if not cut or 0 in self.sizes:
            return 0, 1, 1
        strides = [self.view[axis + 1 :].numel() for axis in range(len(self.view))]
        first = sum(offset * stride for offset, stride in zip(self.offsets, strides, strict=True))
        if len(cut) > 2 or (len(cut) == 2 and any(size != 1 for size in self.sizes[: cut[0]])):
            raise OptionError(
                f"A tensor of shape {tuple(self.shape)} is cut along the axes {cut}; at most two can be served."
            )
        inner = strides[cut[-1]]
        run, stride = self.sizes[cut[-1]] * inner, self.view[cut[-1]] * inner
        one = all(size == 1 for size in self.sizes[: cut[-1]])
        return first, run, run if one else stride

    def _check_places(self) -> None:
        if self.fused:
            raise OptionError(
                "FSDP1 with use_orig_params=False shows flat parameters, in which tensors are not known. Set "
                "FSDPStrategy(use_orig_params=True), or use ModelParallelStrategy (FSDP2)."
            )
        if self.skewed:
            raise OptionError(
                f"A tensor of shape {tuple(self.shape)} is divided twice along one axis (tensor parallel and FSDP2), "
                "and which elements are here is not known. Divide it along different axes."
            )


def piece_of(p: Tensor) -> Piece:
    """Which part of its logical tensor a parameter is, whoever divided it.

    Raises:
        RuntimeError: where FSDP1 flattened the parameter and its flat parameter is not found.
    """
    if is_dtensor(p):
        return _box(p)  # kept nowhere: torch swaps parameters only where no weak reference points at them
    return _flattened(p).piece if is_flattened(p) else Piece.whole(p.shape)


def logical_shape(p: Tensor) -> torch.Size:
    """The shape that a parameter has in the model that was not sharded."""
    return _flattened(p).piece.shape if is_flattened(p) else p.shape


def gradient_of(p: Tensor) -> Tensor | None:
    """The gradient of a parameter; empty where this process holds no element of a parameter that has one.

    FSDP1 sets None there. But whoever holds no element takes part all the same, or ranks would not agree on what
    is summed. In a unit that ran, every trainable parameter has a gradient: so others of the unit tell.
    """
    if p.grad is not None or p.numel() or not (p.requires_grad and is_flattened(p)):
        return p.grad
    entry = _flattened(p)
    handle = entry.handle()
    if not entry.piece.cuts or handle is None:
        return None
    held = [q for q in handle.flat_param._params if q.requires_grad and q.numel()]
    has = any(q.grad is not None for q in held) if held else handle.flat_param.grad is not None
    return torch.zeros_like(p) if has else None


def is_flattened(p: Tensor) -> bool:
    """Whether FSDP1 has made a parameter part of a flat one, or it is such a flat parameter itself."""
    return getattr(p, "_fsdp_flattened", False)


def _box(p: DTensor) -> Piece:
    """The part of a tensor on a mesh, cut as `torch.chunk` cuts, one axis of the mesh after the other."""
    mesh = p.device_mesh
    place = mesh.get_coordinate() or [0] * mesh.ndim
    offsets, sizes = [0] * p.dim(), list(p.shape)
    cuts = []
    for i, placement in enumerate(p.placements):
        if placement.is_replicate():  # what is not: Shard, and a strided form of it which denies being one
            continue
        axis = placement.dim % p.dim()  # type: ignore[attr-defined]
        if mesh.size(i) > 1:
            cuts.append((axis, mesh.get_group(i)))
        share = -(-sizes[axis] // mesh.size(i))
        low = min(place[i] * share, sizes[axis])
        sizes[axis] = min(share, sizes[axis] - low)
        offsets[axis] += low
    axes = [axis for axis, _ in cuts]
    part = tuple(p.to_local().shape)
    skewed = part != tuple(sizes) or (len(set(axes)) < len(axes) and not all(x.is_shard() for x in p.placements))
    return Piece(p.shape, p.shape, tuple(offsets), part, tuple(cuts), skewed=skewed)


@dataclass(frozen=True)
class _Flattened:
    """What is known of a parameter that FSDP1 flattened: its piece, and who keeps the flat parameter."""

    piece: Piece
    handle: weakref.ref[Any]


_flat = WeakTensorKeyDictionary()


def _flattened(p: Tensor) -> _Flattened:
    """What FSDP1 knows of a parameter.

    A parameter says that it was flattened and not by whom, and the module that knows is not at hand where a user
    writes `LAMB(self.parameters())`. So the keepers of flat parameters are looked for among all objects alive, once
    for a model (0.2 s). What is read of them is what FSDP1's own checkpoints read.
    """
    if p not in _flat:
        from torch.distributed.fsdp._flat_param import FlatParamHandle

        for thing in gc.get_objects():
            if issubclass(type(thing), FlatParamHandle):  # isinstance would ask proxies for their class; some warn
                _learn(thing)
    if p not in _flat:
        raise RuntimeError(
            f"FSDP1 flattened a parameter of shape {tuple(p.shape)}, and its flat parameter is not found. Was the "
            "model copied or wrapped again after the optimizer was built, or gc.freeze() called? Build the optimizer "
            "in configure_optimizers."
        )
    return _flat[p]  # type: ignore[no-any-return]


def _learn(handle: Any) -> None:
    """Note the pieces of one flat parameter of FSDP1."""
    flat, keeper = handle.flat_param, weakref.ref(handle)
    group = (0, handle.process_group)
    if not handle._use_orig_params:
        numel = torch.Size([sum(flat._numels)])
        cuts, rank = ((group,), handle.rank) if handle.uses_sharded_strategy else ((), 0)
        piece = Piece(numel, numel, (rank * flat.numel(),), (flat.numel(),), cuts, fused=True)
        _flat[flat] = _Flattened(piece, keeper)
        return
    for p, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
        piece = Piece.whole(shape)
        if handle.uses_sharded_strategy:
            start, size = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
            piece = Piece(shape, torch.Size([shape.numel()]), (start,), (size,), (group,))
        _flat[p] = _Flattened(piece, keeper)


def is_fused(p: Tensor) -> bool:
    """Whether a parameter is one of FSDP1's flat ones, in which several tensors lie that are no longer known."""
    return is_flattened(p) and piece_of(p).fused


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is spread over a mesh of devices.

    Whoever made such a tensor has imported its module, which takes a second, so there is no need to do it here.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_divided(tensor: Tensor) -> bool:
    """Whether a strategy laid hands on the tensor, so that `piece_of` has something to say."""
    return is_dtensor(tensor) or is_flattened(tensor)


def refuse_orphans(owner: str, params: Sequence[Tensor]) -> None:
    """Refuse to train nothing: FSDP2 puts new parameters into a model, and an older optimizer holds the old ones.

    Args:
        owner: For the message.
        params: Parameters of which none has a gradient, nor ever had one.

    Raises:
        RuntimeError: where this process has a model that FSDP2 sharded, and none of the parameters is of such a model.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not hasattr(module, "FSDPModule") or any(is_divided(p) for p in params):
        return
    if any(issubclass(type(thing), module.FSDPModule) for thing in gc.get_objects()):
        raise RuntimeError(
            f"{owner} would train nothing: none of its {len(params)} parameters has a gradient, and FSDP2 has put "
            "sharded parameters into the model since it was built. Build it after fully_shard: in "
            "configure_optimizers, from self.parameters()."
        )


def refuse_unsummable(owner: str, program: Program, params: Iterable[Tensor]) -> None:
    """Refuse what would silently be wrong: what needs tensors, or their axes, where FSDP1 has dissolved them.

    Raises:
        RuntimeError: for sums over a tensor where several are fused, and for means along an axis of a flat piece.
    """
    of_tensors = any(symbol.args[1] == "tensor" for symbol in program.reductions)
    if program.elementwise and not of_tensors:
        return
    for p in params:
        if not is_flattened(p):
            continue
        piece = piece_of(p)
        if piece.fused:
            raise RuntimeError(
                f"{owner} needs a {' and a '.join(program.needs)}, and FSDP1 with use_orig_params=False shows flat "
                "parameters, in which tensors are not known. Set FSDPStrategy(use_orig_params=True), or use "
                "ModelParallelStrategy (FSDP2)."
            )
        if piece.flat and not program.elementwise:
            raise RuntimeError(
                f"{owner} needs row and column means, and FSDP1 cuts tensors without regard to rows, nor can its "
                "checkpoints hold row and column statistics. Use ModelParallelStrategy (FSDP2) or DDP; for adafactor, "
                "factored=False does without."
            )


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def like(values: Tensor, p: Tensor) -> Tensor:
    """Flat values of the part of `p` that this process holds, as a tensor of the shape and placement of `p`."""
    if not is_dtensor(p):
        return values.view(p.shape)
    from torch.distributed.tensor import DTensor

    part = values.view(p.to_local().shape)
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def statistic_of(p: Tensor, axis: int, value: float, dtype: torch.dtype) -> Tensor:
    """A tensor like `p` but of size 1 along an axis, divided as `p` is along the other axes."""
    shape = torch.Size([*p.shape[:axis], 1, *p.shape[axis + 1 :]])
    if not is_dtensor(p):
        return p.new_full(shape, value, dtype=dtype)
    from torch.distributed.tensor import DTensor, Replicate

    part = p.to_local()
    held = part.new_full((*part.shape[:axis], 1, *part.shape[axis + 1 :]), value, dtype=dtype)
    along = [not x.is_replicate() and x.dim % p.dim() == axis for x in p.placements]  # type: ignore[attr-defined]
    placements = [Replicate() if cut else x for x, cut in zip(p.placements, along, strict=True)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(held, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def drop_gathered(model: Any) -> None:
    """Let the next forward pass gather parameters again, since somebody changed the shards.

    After a forward pass without a backward pass FSDP keeps the whole parameters of the outermost unit, and would use
    them once more.
    """
    fully_sharded = sys.modules.get("torch.distributed.fsdp")
    if fully_sharded is None or not isinstance(model, torch.nn.Module):
        return
    for module in model.modules():
        if isinstance(module, fully_sharded.FSDPModule):
            module.reshard()
        elif isinstance(module, fully_sharded.FullyShardedDataParallel):
            handle = module._handle
            if handle is not None and handle.uses_sharded_strategy:
                handle.reshard(True)


class Placement:
    """Where the tensors of an optimizer live, and so how partial results of reductions combine.

    Plain tensors and DDP replicas hold every element on each rank and have equal gradients, so their sums are
    complete as they are. Parts are summed over the groups that divide their tensor, all tensors in one message.

    Args:
        params: The parameters of the optimizer.
    """

    def __init__(self, params: Sequence[Tensor] = ()) -> None:
        divided = [p for p in params if is_divided(p)]
        self.groups = list(dict.fromkeys(group for p in divided for group in piece_of(p).groups))
        self.device = divided[0].device if divided else torch.device("cpu")

    def combine(
        self, partials: Sequence[float | Tensor], groups: Sequence[tuple[ProcessGroup, ...]], over: Over, by: By
    ) -> list[Tensor]:
        """The result for each tensor, from what this process computed for each tensor.

        Args:
            partials: One number per tensor.
            groups: For each, the groups that hold the other parts; empty where the number is complete as it is.
            over: Each tensor by itself, or all of them together.
            by: Sum or maximum.
        """
        values = torch.stack([torch.as_tensor(partial, dtype=torch.float64).cpu() for partial in partials])
        return list(self.combine_vector(values, groups, over, by))

    def combine_vector(self, values: Tensor, groups: Sequence[tuple[ProcessGroup, ...]], over: Over, by: By) -> Tensor:
        """As `combine`, for one float64 vector with a number per tensor; it stays on its device."""
        for group in self.groups:
            divided = torch.tensor([group in own for own in groups])
            if divided.any():
                summed = self._reduced(values, by, group)
                if divided.all():
                    values = summed
                    continue
                mask = divided.pin_memory() if values.is_cuda else divided  # for another copy the host would wait
                values = torch.where(mask.to(values.device, non_blocking=True), summed, values)
        if over == "all":
            return (values.sum() if by == "sum" else values.max()).expand(len(values))
        return values

    def combine_parts(self, parts: Sequence[Tensor], groups: Sequence[tuple[ProcessGroup, ...]]) -> list[Tensor]:
        """Sums of tensors over the groups of each, in one message for each group."""
        found = list(parts)
        for group in self.groups:
            mine = [i for i, own in enumerate(groups) if group in own]
            if mine:
                summed = self._reduced(torch.cat([found[i].reshape(-1) for i in mine]), "sum", group)
                for i, part in zip(mine, torch.split(summed, [found[i].numel() for i in mine]), strict=True):
                    found[i] = part.view(found[i].shape)
        return found

    def _reduced(self, values: Tensor, by: By, group: ProcessGroup) -> Tensor:
        """What a process group makes of a vector, where the group's messages run and back."""
        there = values.to(self.device, copy=True)
        dist.all_reduce(there, op=dist.ReduceOp.SUM if by == "sum" else dist.ReduceOp.MAX, group=group)
        return there.to(values.device)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a small tensor over all data-parallel ranks; the tensor itself in a single process.

    Ranks see different batches, so what an update reads of the loss must be averaged, or replicas drift apart.
    """
    if _alone or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    there = values.to("cuda" if dist.get_backend() == "nccl" else values.device, copy=True)
    dist.all_reduce(there)
    return there.to(values.device) / dist.get_world_size()


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; all of them ask."""
    return any(gathered(flag))


_alone: list[None] = []  # as many as there are `alone` around


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let means over ranks be this rank's own inside: the others take no part in what it computes there."""
    _alone.append(None)
    try:
        yield
    finally:
        _alone.pop()


def gathered(value: T) -> list[T]:
    """What each rank has, in their order; any small object that pickles."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def drop_gradients(params: Iterable[Tensor]) -> None:
    """Take the gradients away, so that every rank of a group finds none, `gradient_of` included."""
    for p in params:
        p.grad = None
        if not p.numel() and is_flattened(p):  # of a unit of which nothing is here FSDP1 keeps a gradient all the same
            handle = _flattened(p).handle()
            if handle is not None:
                handle.flat_param.grad = None
