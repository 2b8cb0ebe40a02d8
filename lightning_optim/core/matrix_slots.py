"""Slots of matrices in files: there they are whole, or sharded like other state, and know nothing of owners.

In the optimizer the slots of a matrix lie at its owner. Under FSDP2 a `state_dict` holds them as DTensors that are cut
along their first axis; under DDP `consolidate_state_dict` brings them to the rank that writes. A load takes whole
tensors or DTensors, and each owner keeps what belongs to its matrices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.owners import Home
from lightning_optim.distributed.placement import is_dtensor, logical_shape, sharded_like
from lightning_optim.distributed.ranges import Move, Ranges, move
from lightning_optim.errors import OptionError
from lightning_optim.language.slot import Slot
from lightning_optim.language.view import View

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Key = tuple[Tensor, str]  # a parameter and the name of a slot


def of_file(layout: StateLayout, gathered: dict[Key, Tensor] | None) -> dict[Key, Tensor]:
    """The slots of matrices that a file holds in another form than this rank, as the file holds them.

    Under FSDP2 all ranks must call it.

    Args:
        layout: The optimizer.
        gathered: What `gather` has returned for this file; None where it was not called.

    Raises:
        RuntimeError: under DDP where the slots lie at their owners and were not gathered.
    """
    found: dict[Key, Tensor] = {}
    moves: dict[ProcessGroup, list[tuple[Key, torch.Size, Move]]] = {}
    for p, name, slot, view, home in _slots(layout):
        shape = slot.shape_of(p.shape, {}, view)
        if home is None:
            if is_dtensor(p):  # a mesh of one rank
                found[p, name] = sharded_like(p, layout.state[p][name], shape)
        elif home.held:
            rows = -(-shape[0] // len(home.held))
            inner = shape[1:].numel()
            ends = [min(rank * rows, shape[0]) * inner for rank in range(len(home.held) + 1)]
            wanted = [((low, high),) for low, high in itertools.pairwise(ends)]
            one = Move(layout.state[p][name].view(-1), _held(slot, view, home, len(home.held)), wanted)
            moves.setdefault(home.group, []).append(((p, name), shape, one))
        elif gathered is not None and (p, name) in gathered:
            found[p, name] = gathered[p, name]
        else:
            raise RuntimeError(
                f"{type(layout).__name__} keeps {name} at the ranks that compute the matrices. Call its "
                "consolidate_state_dict() on all ranks first, as Lightning and Fabric do, and state_dict() on rank 0."
            )
    for group, entries in moves.items():
        results = move([one for _, _, one in entries], group)
        for (key, shape, _), values in zip(entries, results, strict=True):
            found[key] = sharded_like(key[0], values.view(-1, *shape[1:]), shape)
    return found


def gather(layout: StateLayout, to: int) -> dict[Key, Tensor]:
    """The slots of matrices that replicas (DDP) share, whole, on one rank; nothing on others. All ranks must call it.

    Args:
        layout: The optimizer.
        to: The rank that gets them.

    Raises:
        OptionError: where that rank is none of those that share a parameter.
    """
    found: dict[Key, Tensor] = {}
    moves: dict[ProcessGroup, list[tuple[Key, torch.Size, Move]]] = {}
    for p, name, slot, view, home in _slots(layout):
        if home is None or home.held:
            continue
        shape, size = slot.shape_of(p.shape, {}, view), dist.get_world_size(home.group)
        sharing = dist.get_process_group_ranks(home.group)
        if to not in sharing:
            raise OptionError(
                f"consolidate_state_dict(to={to}) brings slots of matrices to rank {to}, and a parameter of shape "
                f"{tuple(p.shape)} is on the ranks {sharing}. Let `to` be the one of them that writes the file."
            )
        target = sharing.index(to)
        wanted: list[Ranges] = [((0, shape.numel()),) if rank == target else () for rank in range(size)]
        one = Move(layout.state[p][name].view(-1), _held(slot, view, home, size), wanted)
        moves.setdefault(home.group, []).append(((p, name), shape, one))
    for group, entries in moves.items():
        results = move([one for _, _, one in entries], group)
        if dist.get_rank(group) == dist.get_group_rank(group, to):
            found.update({key: x.view(shape) for (key, shape, _), x in zip(entries, results, strict=True)})
    return found


def own_part(layout: StateLayout, slot: Slot, i: int, p: Tensor, values: Tensor) -> Tensor:
    """What this rank keeps of a slot of matrices in a file. Where that is a DTensor, all ranks must call it."""
    whole: Any = values.full_tensor() if is_dtensor(values) else values
    view, home = layout.view_of(i, p), layout.home_of(p)
    if home is None or view is None:
        return whole.contiguous()  # type: ignore[no-any-return]
    ranges = view.ranges(slot.shape, home.matrices_of(home.rank))
    if ranges == view.ranges(slot.shape, range(len(view.rows))):
        return whole.contiguous()  # type: ignore[no-any-return]
    flat = whole.reshape(-1)
    return torch.cat([flat[low:high] for low, high in ranges]) if ranges else flat[:0].clone()


def without_misfits(layout: StateLayout, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state_dict without the slots of matrices of parameters that are other matrices here, which start anew.

    What is of no matrices at all, such as a basis of another size than its factor, stays and is refused later.

    Args:
        layout: The optimizer, with the options under which it goes on.
        state_dict: The state_dict.
    """
    if not layout.has_slots_of_matrices:
        return state_dict
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    state = dict(state_dict["state"])
    of_page = {name: slot for name, slot in layout.slots.items() if slot.per == "matrix"}
    for index, (i, p) in zip(order, layout.every_parameter(), strict=True):
        saved = state.get(index) or {}
        shapes = {name: getattr(saved[name], "shape", None) for name in of_page if name in saved}
        needed = {*layout.slots_of(i, p)}
        fits = all(name in needed and shape == layout.shape_of(of_page[name], i, p) for name, shape in shapes.items())
        if not fits and _are_of_matrices(of_page, shapes, logical_shape(p)):
            state[index] = {name: value for name, value in saved.items() if name not in of_page}
    return {**state_dict, "state": state}


def _are_of_matrices(of_page: Mapping[str, Slot], shapes: Mapping[str, Any], logical: torch.Size) -> bool:
    """Whether slots of these shapes may be those of the matrices of a tensor, under some options."""
    by_sides: dict[tuple[str | int, ...], Any] = {("rows", "columns"): logical}
    return all(
        isinstance(shape, torch.Size)
        and len(shape) <= max(len(of_page[name].shape) + 1, len(logical))
        and by_sides.setdefault(of_page[name].shape, shape) == shape
        for name, shape in shapes.items()
    )


def are_all_in(layout: StateLayout, saved: Mapping[str, Any], i: int, p: Tensor) -> bool:
    """Whether a file has of a parameter those slots of matrices that it needs, and no others."""
    of_page = {name for name, slot in layout.slots.items() if slot.per == "matrix"}
    always = {name for name in of_page if layout.slots[name].shape == ("rows", "columns")}  # of vectors too
    needed = {name for name in of_page & {*layout.slots_of(i, p)} if layout.slot(name, i, p).per == "matrix"}
    needed |= always & {*layout.slots_of(i, p)}
    return needed <= saved.keys() and of_page & saved.keys() <= needed | always


def _slots(layout: StateLayout) -> Iterator[tuple[Tensor, str, Slot, View, Home | None]]:
    """The slots of matrices of all parameters that have state, in an order that is the same on all ranks."""
    if not layout.has_slots_of_matrices:
        return
    for i, p in layout.initialized():
        view = layout.view_of(i, p)
        for name in layout.slots if view is not None else ():
            if layout.slots[name].per == "matrix" and name in layout.state.get(p, ()):
                assert view is not None
                yield p, name, layout.slots[name], view, layout.home_of(p)


def _held(slot: Slot, view: View, home: Home, size: int) -> list[Ranges]:
    return [view.ranges(slot.shape, home.matrices_of(rank)) for rank in range(size)]
