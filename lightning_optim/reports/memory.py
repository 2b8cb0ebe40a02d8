"""The bytes of an optimizer's state by slot: of the state that exists, or of what the first step will create."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim import storage
from lightning_optim.core.foreign_stages import pending_slots, slots_beside, stage_slots
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.placement import gradient_of, local
from lightning_optim.storage import Quantized

Kind = Literal["state", "stage", "temporary", "parameter", "gradient", "buffer", "communication", "exchange"]
Names = Mapping[Tensor, str]


@dataclass(frozen=True)
class Entry:
    """The bytes of one slot of one parameter, on this rank.

    Attributes:
        group: Index of the parameter group; -1 for a parameter that no optimizer has.
        slot: The key in the optimizer's state, or the kind, or what is sent.
        dtype: The dtype or format of the values.
        elements: Number of values.
        bytes: Bytes that they take.
        kind: "state" of the optimizer, of a "stage" that a callback added (an average, slow weights), "temporary" while
            other weights are in the model, "parameter", "gradient", "buffer" of the module, "communication" of
            gradients and parameters between ranks, or "exchange" of whole matrices in a step.
        name: Name of the parameter; empty for a slot of the whole optimizer.
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
        """The bytes that the values would take in 32 bits."""
        return 4 * self.elements

    @property
    def layer(self) -> str:
        """The name of the module that owns the parameter."""
        return self.name.rpartition(".")[0] or self.name


def state_memory(optimizer: torch.optim.Optimizer, names: Names | None = None) -> list[Entry]:
    """The state that exists now, counted by the memory behind its tensors.

    Memory that several slots share is counted once, at the first of them. Tensors in containers and in tensor
    subclasses count, Python numbers do not.

    Args:
        optimizer: Any optimizer.
        names: Names of its parameters. Default: the indices of the group and of the parameter in it, as "0.1".

    Example:
        >>> from lightning_optim import AdamW
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer = AdamW([weight])
        >>> optimizer.step()
        >>> [(entry.slot, entry.dtype, entry.bytes) for entry in state_memory(optimizer)]
        [('step', 'float32', 4), ('exp_avg', 'float32', 24), ('exp_avg_sq', 'float32', 24)]
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
    """The state that will exist after the first step, which is not run.

    For our optimizers it follows from the update. For others a copy of the optimizer takes a step on the meta device,
    or with one tensor at a time on the CPU; if it cannot, the list is empty. It is empty too where a lazy module has
    not seen a batch yet.

    Args:
        optimizer: Any optimizer.
        names: Names of its parameters, as for `state_memory`.
    """
    names, count = _named(optimizer, names), _Count(stage_slots(optimizer))
    found: list[Entry | None] = []
    if any(is_lazy(p) for group in optimizer.param_groups for p in group["params"]):
        return []
    if not isinstance(optimizer, Optimizer):
        found += [count.entry(i, slot, value, names[p]) for i, slot, value, p in _after_one_step(optimizer)]
        return [entry for entry in found if entry is not None]
    shared: set[str] = set()  # slots of the whole optimizer, which count once
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            shard = local(p)
            existing = optimizer.state.get(p, {})
            moves = p.requires_grad or optimizer.stages  # a frozen one has state only if there is a stage
            slots = dict.fromkeys(("step", *optimizer.slots_of(i, p), *existing) if moves else existing)
            shared |= {slot for slot in slots if slot in optimizer.slots and optimizer.slots[slot].per == "optimizer"}
            for slot in slots:
                if slot not in shared:
                    value = _expected(optimizer, i, p, shard, slot, existing)
                    found.append(count.entry(i, slot, value, names[p]))
    found += [count.entry(0, slot, torch.empty((), dtype=torch.float64, device="meta")) for slot in shared]
    return [entry for entry in found if entry is not None]


def model_memory(optimizer: torch.optim.Optimizer, names: Names | None = None, predicted: bool = False) -> list[Entry]:
    """The parameters of an optimizer and their gradients, or with `predicted` the gradients that a step needs."""
    names = _named(optimizer, names)
    found = []
    for i, group in enumerate(optimizer.param_groups):
        for p in (p for p in group["params"] if not is_lazy(p)):
            found.append(_plain(i, "parameter", p, names[p]))
            grad = (p if p.requires_grad else None) if predicted else gradient_of(p)
            if grad is not None:
                found.append(_plain(i, "gradient", grad, names[p]))
    return found


def frozen_memory(optimizers: Iterable[torch.optim.Optimizer], names: Names) -> list[Entry]:
    """The named parameters that are in no optimizer."""
    moved = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return [_plain(-1, "parameter", p, name) for p, name in names.items() if p not in moved and not is_lazy(p)]


def summed(entries: Iterable[Entry], *keys: str) -> dict[tuple[Any, ...], Entry]:
    """The sums of entries that agree in the given attributes, in the order of first occurrence."""
    sums: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        key = tuple(getattr(entry, name) for name in keys)
        if key in sums:
            entry = replace(entry, elements=entry.elements + sums[key].elements, bytes=entry.bytes + sums[key].bytes)
        sums[key] = entry
    return sums


class _Count:
    """Counts the bytes of tensors, and memory that they share once."""

    def __init__(self, of_stages: set[str]) -> None:
        self._of_stages = of_stages
        self._seen: set[tuple[torch.device, int]] = set()

    def entry(self, group: int, slot: str, value: Any, name: str = "") -> Entry | None:
        """The entry of a slot; None if it has no tensor."""
        tensors = list(_tensors(value))
        if not tensors:
            return None
        if isinstance(value, Quantized):
            word, elements = f"8 bits ({value.format.name})", value.numel()
        else:
            first = local(value) if isinstance(value, Tensor) else tensors[0]
            word = str(first.dtype).removeprefix("torch.") if type(first) is Tensor else type(first).__name__
            elements = first.numel() if isinstance(value, Tensor) else sum(x.numel() for x in tensors)
        kind: Kind = "temporary" if slot == "raw" else "stage" if slot in self._of_stages else "state"
        return Entry(group, slot, word, elements, sum(map(self._bytes, tensors)), kind, name)

    def _bytes(self, tensor: Tensor) -> int:
        memory = tensor.untyped_storage()
        own = not tensor.dim()  # step counters share one storage, and each counts for its parameter
        key = (tensor.device, 0 if tensor.is_meta else tensor.data_ptr() if own else memory.data_ptr())
        if key in self._seen:
            return 0
        if key[1]:
            self._seen.add(key)
        return tensor.element_size() if own else memory.nbytes()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a value of an optimizer's state."""
    if isinstance(value, Quantized):
        yield from (value.codes, value.scales)
    elif isinstance(value, Tensor):
        shard: Any = local(value)
        if hasattr(shard, "__tensor_flatten__"):  # a wrapper subclass, as of quantized state in other libraries
            for name in shard.__tensor_flatten__()[0]:
                yield from _tensors(getattr(shard, name))
        else:
            yield shard
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _plain(group: int, kind: Literal["parameter", "gradient"], tensor: Tensor, name: str) -> Entry:
    """A parameter or a gradient, by its number of values: under FSDP1 it is a view of a flat tensor."""
    shard = local(tensor)
    word = str(shard.dtype).removeprefix("torch.")
    return Entry(group, kind, word, shard.numel(), shard.numel() * shard.element_size(), kind, name)


def _named(optimizer: torch.optim.Optimizer, names: Names | None) -> Names:
    if names is not None:
        return names
    return {p: f"{i}.{j}" for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])}


def _expected(optimizer: Optimizer, i: int, p: Tensor, shard: Tensor, name: str, existing: Any) -> Tensor | Quantized:
    """The future slot of a parameter, on the meta device."""
    if name in existing:
        value: Tensor | Quantized = existing[name]
        return value if isinstance(value, Quantized) else local(value)
    if name == "step":
        return torch.empty((), dtype=torch.float32, device="meta")
    slot, group = optimizer.slot(name, i, p), optimizer.param_groups[i]
    if storage.is_quantized(p, group["state_bits"], slot):
        return optimizer.quantized_slot(slot, i, p, torch.empty_like(shard, device="meta"))
    if slot.per == "matrix":
        return optimizer.slot_of_matrices(slot, i, p, "meta")
    dtype = storage.dtype(p.dtype, optimizer.param_groups[i]["state_bits"], slot)
    shape = slot.shape_of(shard.shape, optimizer.traits_of(i, p))
    return torch.empty(shape, dtype=dtype, device="meta")


def _after_one_step(optimizer: torch.optim.Optimizer) -> list[tuple[int, str, Any, Tensor]]:
    """The state after a first step, with slots of stages, as (group, slot, value, parameter); empty if unknown."""
    try:
        states = _states_on(optimizer, "meta", optimizer.param_groups)
    except Exception:  # optimizers of other libraries may raise anything; some ask for values
        try:
            states = _states_one_by_one(optimizer)
        except Exception:
            return []
    found: list[tuple[int, str, Any, Tensor]] = []
    params = [(i, p) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
    for (i, p), state in zip(params, states, strict=True):
        like = torch.empty_like(local(p), device="meta")
        slots = {**state, **pending_slots(optimizer, p), **slots_beside(optimizer, like, state)}
        found += [(i, slot, value, p) for slot, value in slots.items()]
    return found


def _states_on(optimizer: torch.optim.Optimizer, device: str, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The state of each parameter of a copy of an optimizer after a step on zeros."""
    copies: list[dict[str, Any]] = []
    sparse = isinstance(optimizer, torch.optim.SparseAdam)
    for group in groups:
        params = [torch.zeros_like(local(p), device=device).requires_grad_() for p in group["params"]]
        for p, own in zip(params, group["params"], strict=True):
            zeros = torch.zeros_like(p).to_sparse(1) if sparse else torch.zeros_like(p)
            p.grad = zeros if own.requires_grad else None
        copies.append({**{k: v for k, v in group.items() if k != "param_names"}, "params": params})
    known = inspect.signature(type(optimizer)).parameters
    clone = type(optimizer)(copies, **{k: v for k, v in optimizer.defaults.items() if k in known})
    clone.step()
    return [clone.state.get(p, {}) for group in clone.param_groups for p in group["params"]]


def _states_one_by_one(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The same on the CPU, where only one tensor of each shape is there at a time."""
    seen: dict[Any, dict[str, Any]] = {}
    found = []
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            key = (i, local(p).shape, p.dtype, p.requires_grad)
            if key not in seen:
                (state,) = _states_on(optimizer, "cpu", [{**group, "params": [p]}])
                seen[key] = {slot: _without_values(value) for slot, value in state.items()}
            found.append({slot: _own_counter(value) for slot, value in seen[key].items()})
    return found


def _without_values(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if type(value) is Tensor and value.dim() else value


def _own_counter(value: Any) -> Any:
    """A counter of steps for a parameter of its own; memory that is shared counts once."""
    return value.clone() if type(value) is Tensor and not value.dim() else value


def human(size: float) -> str:
    """A number of bytes in a readable unit.

    Example:
        >>> human(2_500_000), human(900)
        ('2.50 MB', '900 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"
