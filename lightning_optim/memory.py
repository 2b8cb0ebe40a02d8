"""How many bytes an optimizer's state takes, by group and slot: what exists, or what a first step will make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.distributed import local
from lightning_optim.optimizer import Optimizer
from lightning_optim.stages.attach import waiting
from lightning_optim.storage import Coded


@dataclass(frozen=True)
class Entry:
    """The bytes of one slot in one parameter group, on this rank.

    Attributes:
        group: Number of the group.
        slot: The key in the optimizer's state.
        dtype: The type of its values, as a word.
        elements: Number of values.
        bytes: What they take.
    """

    group: int
    slot: str
    dtype: str
    elements: int
    bytes: int

    @property
    def bytes_32(self) -> int:
        """What the same values take in 32 bits each."""
        return 4 * self.elements


def state_memory(optimizer: torch.optim.Optimizer) -> list[Entry]:
    """The state that exists now, counted from its tensors."""
    found: list[tuple[int, str, Tensor | Coded]] = []
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            found += [(i, slot, local(value)) for slot, value in state.items() if isinstance(value, Tensor)]
            found += [(i, slot, value) for slot, value in state.items() if isinstance(value, Coded)]
        if isinstance(optimizer, Optimizer):
            found += [(i, slot, group[slot]) for slot in optimizer.slots if isinstance(group.get(slot), Tensor)]
    return _summed(found)


def predicted_memory(optimizer: torch.optim.Optimizer) -> list[Entry]:
    """The state that the first step will make, without running it.

    For our optimizers it is read off the update. For others a copy takes one step on tensors without memory; where
    such a step is not possible the list is empty.
    """
    found: list[tuple[int, str, Tensor | Coded]] = []
    if not isinstance(optimizer, Optimizer):
        return _summed(_one_step_on_meta(optimizer))
    shared: set[str] = set()  # slots of the whole optimizer, once whatever the number of parameters
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            part = local(p)
            existing = optimizer.state.get(p, {})
            names = dict.fromkeys(("step", *optimizer.slots_of(i, p), *existing))
            shared |= {name for name in names if name in optimizer.slots and optimizer.slots[name].per == "optimizer"}
            own = [name for name in names if name not in shared]
            found += [(i, slot, _expected(optimizer, i, p, part, slot, existing)) for slot in own]
    found += [(0, slot, torch.empty((), dtype=torch.float64, device="meta")) for slot in shared]
    return _summed(found)


def _expected(optimizer: Optimizer, i: int, p: Tensor, part: Tensor, name: str, existing: Any) -> Tensor | Coded:
    """Something without memory like the slot that a parameter will have."""
    if name in existing:
        value: Tensor | Coded = existing[name]
        return value if isinstance(value, Coded) else local(value)
    if name == "step":
        return torch.empty((), dtype=torch.float32, device="meta")
    slot, group = optimizer.all_slots()[name], optimizer.param_groups[i]
    if storage.is_coded(p, group["state_bits"], slot):
        return optimizer.codes_of(slot, i, p, torch.empty_like(part, device="meta"))
    dtype = storage.dtype(p.dtype, optimizer.param_groups[i]["state_bits"], slot)
    shape = slot.shape(part.shape, optimizer.traits_of(i, p))
    return torch.empty(shape, dtype=dtype, device="meta")


def _one_step_on_meta(optimizer: torch.optim.Optimizer) -> list[tuple[int, str, Tensor | Coded]]:
    """The state of a copy after a step, and what stages keep until the first one."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        params = [torch.empty_like(local(p), device="meta").requires_grad_() for p in group["params"]]
        for p in params:
            p.grad = torch.empty_like(p)
        groups.append({**group, "params": params})
    try:
        twin = type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in ("lr",)})
        twin.step()
    except Exception:  # a peer's optimizer may want anything; then there is nothing to say before its first step
        return []
    found: list[tuple[int, str, Tensor | Coded]] = []
    for i, (group, own) in enumerate(zip(twin.param_groups, optimizer.param_groups, strict=True)):
        for p, q in zip(group["params"], own["params"], strict=True):
            slots = {**twin.state.get(p, {}), **waiting(optimizer, q)}
            found += [(i, slot, local(value)) for slot, value in slots.items() if isinstance(value, Tensor)]
    return found


def _summed(found: Iterable[tuple[int, str, Tensor | Coded]]) -> list[Entry]:
    sums: dict[tuple[int, str, str], tuple[int, int]] = {}
    for i, slot, value in found:
        word = value.format.name if isinstance(value, Coded) else str(value.dtype).removeprefix("torch.")
        key = (i, slot, f"8 bits ({word})" if isinstance(value, Coded) else word)
        elements, size = sums.get(key, (0, 0))
        sums[key] = (elements + value.numel(), size + value.nbytes)
    return [Entry(*key, *value) for key, value in sums.items()]


def human(size: float) -> str:
    """Bytes in a readable unit.

    Example:
        >>> human(2_500_000), human(900)
        ('2.50 MB', '900 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"
