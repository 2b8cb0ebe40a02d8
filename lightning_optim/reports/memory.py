"""How many bytes an optimizer's state takes, slot by slot: what exists, or what a first step will make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim import storage
from lightning_optim.core.foreign_stages import pending_slots, stage_slots
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.placement import gradient_of, local
from lightning_optim.storage import Quantized

Kind = Literal["state", "stage", "parameter", "gradient"]
KINDS: tuple[Kind, ...] = ("parameter", "gradient", "state", "stage")
Names = Mapping[Tensor, str]


@dataclass(frozen=True)
class Entry:
    """The bytes of one slot of one parameter, on this rank.

    Attributes:
        group: Number of the group; -1 for what is in none.
        slot: The key in the optimizer's state, or "parameter" or "gradient".
        dtype: The type of its values, as a word.
        elements: Number of values.
        bytes: What they take.
        kind: "state" of the optimizer itself, of a "stage" that a callback added (an average, slow weights),
            "parameter" or "gradient".
        name: Of the parameter; empty where a slot is one for the whole optimizer.
    """

    group: int
    slot: str
    dtype: str
    elements: int
    bytes: int
    kind: Kind = "state"
    name: str = ""

    @property
    def bytes_32(self) -> int:
        """What the same values take in 32 bits each."""
        return 4 * self.elements

    @property
    def layer(self) -> str:
        """The module that the parameter belongs to."""
        return self.name.rpartition(".")[0] or self.name


def state_memory(optimizer: torch.optim.Optimizer, names: Names | None = None) -> list[Entry]:
    """The state that exists now, counted from the memory behind its tensors.

    What several slots share counts once, where it is met first. Tensors inside of containers and of tensor subclasses
    count, numbers of Python do not.

    Args:
        optimizer: Any.
        names: Names of its parameters; by default the group and the place in it.
    """
    names, count = _named(optimizer, names), _Count(stage_slots(optimizer))
    found = []
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            found += [count.entry(i, slot, value, names[p]) for slot, value in state.items()]
        if isinstance(optimizer, Optimizer):
            found += [count.entry(i, slot, group[slot]) for slot in optimizer.slots if slot in group]
    return [entry for entry in found if entry is not None]


def predicted_memory(optimizer: torch.optim.Optimizer, names: Names | None = None) -> list[Entry]:
    """The state that the first step will make, without running it.

    For our optimizers it is read off the update. For others a copy takes one step on tensors without memory; where
    such a step is not possible the list is empty.
    """
    names, count = _named(optimizer, names), _Count(stage_slots(optimizer))
    found: list[Entry | None] = []
    if not isinstance(optimizer, Optimizer):
        found += [count.entry(i, slot, value, names[p]) for i, slot, value, p in _one_step_on_meta(optimizer)]
        return [entry for entry in found if entry is not None]
    shared: set[str] = set()  # slots of the whole optimizer, once whatever the number of parameters
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            part = local(p)
            existing = optimizer.state.get(p, {})
            moves = p.requires_grad or optimizer.stages  # a frozen one gets state only where a stage runs over it
            slots = dict.fromkeys(("step", *optimizer.slots_of(i, p), *existing) if moves else existing)
            shared |= {slot for slot in slots if slot in optimizer.slots and optimizer.slots[slot].per == "optimizer"}
            for slot in slots:
                if slot not in shared:
                    value = _expected(optimizer, i, p, part, slot, existing)
                    found.append(count.entry(i, slot, value, names[p]))
    found += [count.entry(0, slot, torch.empty((), dtype=torch.float64, device="meta")) for slot in shared]
    return [entry for entry in found if entry is not None]


def model_memory(optimizer: torch.optim.Optimizer, names: Names | None = None, predicted: bool = False) -> list[Entry]:
    """The parameters of an optimizer and their gradients: those that there are, or those that a step will need."""
    names = _named(optimizer, names)
    found = []
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            found.append(_plain(i, "parameter", p, names[p]))
            grad = (p if p.requires_grad else None) if predicted else gradient_of(p)
            if grad is not None:
                found.append(_plain(i, "gradient", grad, names[p]))
    return found


def frozen_memory(optimizers: Iterable[torch.optim.Optimizer], names: Names) -> list[Entry]:
    """The named parameters that no optimizer has."""
    moved = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [_plain(-1, "parameter", p, name) for p, name in names.items() if p not in moved]


def summed(entries: Iterable[Entry], *keys: str) -> dict[tuple[Any, ...], Entry]:
    """The entries added up by some of their attributes, in the order in which they come."""
    sums: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        key = tuple(getattr(entry, name) for name in keys)
        if key in sums:
            entry = replace(entry, elements=entry.elements + sums[key].elements, bytes=entry.bytes + sums[key].bytes)
        sums[key] = entry
    return sums


class _Count:
    """Counts memory once, whoever shows it."""

    def __init__(self, of_stages: set[str]) -> None:
        self._of_stages = of_stages
        self._seen: set[tuple[torch.device, int]] = set()

    def entry(self, group: int, slot: str, value: Any, name: str = "") -> Entry | None:
        """What a slot takes; None where it holds no tensor."""
        tensors = list(_tensors(value))
        if not tensors:
            return None
        if isinstance(value, Quantized):
            word, elements = f"8 bits ({value.format.name})", value.numel()
        else:
            first = local(value) if isinstance(value, Tensor) else tensors[0]
            word = str(first.dtype).removeprefix("torch.") if type(first) is Tensor else type(first).__name__
            elements = first.numel() if isinstance(value, Tensor) else sum(x.numel() for x in tensors)
        kind: Kind = "stage" if slot in self._of_stages else "state"
        return Entry(group, slot, word, elements, sum(map(self._bytes, tensors)), kind, name)

    def _bytes(self, tensor: Tensor) -> int:
        memory = tensor.untyped_storage()
        own = not tensor.dim()  # our counters lie side by side in one memory, and each parameter has its own
        key = (tensor.device, 0 if tensor.is_meta else tensor.data_ptr() if own else memory.data_ptr())
        if key in self._seen:
            return 0
        if key[1]:
            self._seen.add(key)
        return tensor.element_size() if own else memory.nbytes()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors with memory of their own in what an optimizer keeps."""
    if isinstance(value, Quantized):
        yield from (value.codes, value.scales)
    elif isinstance(value, Tensor):
        part = local(value)
        if hasattr(part, "__tensor_flatten__"):  # a subclass that is made of others: quantised state of other libraries
            for name in part.__tensor_flatten__()[0]:
                yield from _tensors(getattr(part, name))
        else:
            yield part
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _plain(group: int, kind: Literal["parameter", "gradient"], tensor: Tensor, name: str) -> Entry:
    """A parameter or a gradient, by its values: where FSDP1 lays several in one tensor, each is its part of it."""
    part = local(tensor)
    word = str(part.dtype).removeprefix("torch.")
    return Entry(group, kind, word, part.numel(), part.numel() * part.element_size(), kind, name)


def _named(optimizer: torch.optim.Optimizer, names: Names | None) -> Names:
    if names is not None:
        return names
    return {p: f"{i}.{j}" for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])}


def _expected(optimizer: Optimizer, i: int, p: Tensor, part: Tensor, name: str, existing: Any) -> Tensor | Quantized:
    """Something without memory like the slot that a parameter will have."""
    if name in existing:
        value: Tensor | Quantized = existing[name]
        return value if isinstance(value, Quantized) else local(value)
    if name == "step":
        return torch.empty((), dtype=torch.float32, device="meta")
    slot, group = optimizer.all_slots()[name], optimizer.param_groups[i]
    if storage.is_quantized(p, group["state_bits"], slot):
        return optimizer.quantized_slot(slot, i, p, torch.empty_like(part, device="meta"))
    dtype = storage.dtype(p.dtype, optimizer.param_groups[i]["state_bits"], slot)
    shape = slot.shape(part.shape, optimizer.traits_of(i, p))
    return torch.empty(shape, dtype=dtype, device="meta")


def _one_step_on_meta(optimizer: torch.optim.Optimizer) -> list[tuple[int, str, Tensor, Tensor]]:
    """The state of a copy after a step, and what stages keep until the first one: group, slot, value, parameter."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        params = [torch.empty_like(local(p), device="meta").requires_grad_() for p in group["params"]]
        for p, own in zip(params, group["params"], strict=True):
            p.grad = torch.empty_like(p) if own.requires_grad else None
        groups.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": params})
    try:
        twin = type(optimizer)(groups, **{k: v for k, v in optimizer.defaults.items() if k in ("lr",)})
        twin.step()
    except Exception:  # a peer's optimizer may want anything; then there is nothing to say before its first step
        return []
    found: list[tuple[int, str, Tensor, Tensor]] = []
    for i, (group, original) in enumerate(zip(twin.param_groups, optimizer.param_groups, strict=True)):
        for p, q in zip(group["params"], original["params"], strict=True):
            slots = {**twin.state.get(p, {}), **pending_slots(optimizer, q)}
            found += [(i, slot, value, q) for slot, value in slots.items()]
    return found


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
