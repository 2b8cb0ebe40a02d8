"""The state of an optimizer: which slots a parameter has, in which format, and how they are created.

All of it follows from the program: a slot exists if the update, traced under the options of a parameter group, reads or
writes it.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim import storage
from lightning_optim.core.first_values import first_value
from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.owners import Home, Owners
from lightning_optim.distributed.placement import is_sharded, local, logical_shape
from lightning_optim.distributed.plain import is_wrapper, laid_out_like, memory_order
from lightning_optim.language.definition import Definition
from lightning_optim.language.math import squarable
from lightning_optim.language.options import Option, floats
from lightning_optim.language.program import Program, namespace
from lightning_optim.language.programs import Programs
from lightning_optim.language.slot import Slot
from lightning_optim.language.values import Options
from lightning_optim.language.view import View
from lightning_optim.stages.stage import Stage

# Options of the whole optimizer, which a parameter group cannot change.
WHOLE = ("engine", "capturable", "owners")
# Options for how state is stored, not for how to train: loading a checkpoint does not change them.
STORAGE_OPTIONS = ("state_bits", "state_format")
NUMBERS = (float, float | None)
# The parameter as it is trained, while it holds the weights to evaluate; else the slot is absent.
RAW = Slot(exact=True, copies=True)
Served = tuple[torch.Size, View | None, frozenset[str], frozenset[str]]


class StateLayout(Definition, torch.optim.Optimizer):
    """The programs and the slots of an optimizer.

    Attributes:
        name: The name in a config.
        options: The options of the page by name.
        slots: The slots of the page by name.
        stages: The stages that callbacks have attached.
        compared: Whether the first step has compared it with the optimizers of other ranks.
        told: Whether the first step has looked for what is missing in a Trainer.
        model_order: The index of each parameter in `module.parameters()`; empty where it is unknown.
        positions: The same by parameter, also of those that wait.
        reasons: By parameter its name and why it is no matrix, where the module is known (`core.routing`).
        served: By parameter what its state was made for (`served_as`); empty for pages without slots of matrices.
        waiting: The parameters that were frozen when it was made, and join when they are trained.
        total_steps: The number of steps of the run; infinite where it is not known, or not yet.
    """

    name: ClassVar[str]
    options: ClassVar[dict[str, Option]]
    slots: ClassVar[dict[str, Slot]]

    def _prepare_layout(self) -> None:
        """Create what is not saved. Stages and the order of the model are kept."""
        self.stages: list[Stage] = getattr(self, "stages", [])
        self.model_order: list[int] = getattr(self, "model_order", [])
        self.positions: dict[Tensor, int] = getattr(self, "positions", {})
        self.waiting: list[Any] = getattr(self, "waiting", [])
        self.total_steps: float = getattr(self, "total_steps", math.inf)
        self.reasons: dict[Tensor, tuple[str, str]] = getattr(self, "reasons", {})
        self.served: dict[Tensor, Served] = getattr(self, "served", {})
        self.compared: bool = getattr(self, "compared", False)
        self.told: bool = getattr(self, "told", False)
        self._programs: dict[str, Programs] = {}
        self._slots_by_options: dict[Any, tuple[str, ...]] = {}
        self._most_dims: int | None = None
        self._owners = Owners()
        self._parameters: tuple[list[list[Tensor]], list[tuple[int, Tensor]]] = [], []

    # ------------------------------------------------------------------ parameters and options

    def every_parameter(self) -> list[tuple[int, Tensor]]:
        """All parameters in order, each with the index of its group."""
        groups = [group["params"] for group in self.param_groups]
        kept, pairs = self._parameters
        same = list(map(len, groups)) == list(map(len, kept))
        if not (same and all(map(operator.is_, itertools.chain(*groups), itertools.chain(*kept)))):
            pairs = [(i, p) for i, group in enumerate(groups) for p in group]
            self._parameters = [*map(list, groups)], pairs  # thousands of new tuples would wake the garbage collector
        return pairs

    def initialized(self) -> list[tuple[int, Tensor]]:
        """All parameters but those of lazy modules that have seen no batch yet."""
        every = self.every_parameter()
        return [pair for pair in every if not is_lazy(pair[1])] if any(is_lazy(p) for _, p in every) else every

    def options_of(self, group: dict[str, Any], keep_tensors: bool = False) -> dict[str, Any]:
        """The options of a parameter group that the update sees, as floats where they are numbers.

        Args:
            group: The parameter group, into which a user or a schedule may have written anything.
            keep_tensors: Keep tensors on the device of the parameters, such as `lr` under `capturable`.

        Raises:
            OptionError: for a value of another type than the option's, and for NaN and infinity.
        """
        found = {}
        for name, option in self.options.items():
            if name in WHOLE or name in STORAGE_OPTIONS:
                continue
            value = found[name] = group[name]
            if value is option.default or (type(value) is float and option.type in NUMBERS and math.isfinite(value)):
                continue  # as it nearly always is
            first = group["params"][:1]
            on_device = keep_tensors and isinstance(value, Tensor) and bool(first)
            if not (isinstance(value, Tensor) and on_device and value.device == local(first[0]).device):
                found[name] = floats(option.converted(value, type(self).__name__))
        found.update({name: self.total_steps for name in self.lengths if found[name] == "total"})
        return found

    def traits_of(self, i: int, p: Tensor) -> dict[str, Any]:
        """The traits of a parameter in group `i`."""
        return self.traits_under(namespace(self.options_of(self.param_groups[i])), p)

    def traits_under(self, h: Options, p: Tensor) -> dict[str, Any]:
        """The traits of a parameter under options. Where there are slots of matrices, they say whether it has some."""
        shape = logical_shape(p)
        found = self.traits(h, shape, p.dtype, self.most_dims())
        return {**found, "is_matrix": self.matrices(h, shape) is not None} if self.has_slots_of_matrices else found

    def view_of(self, i: int, p: Tensor) -> View | None:
        """The matrices that a parameter in group `i` is."""
        return self.matrices(namespace(self.options_of(self.param_groups[i])), logical_shape(p))

    def follow_owners(self) -> None:
        """Find owners for matrices that have none. Under FSDP1 this takes a message, so all ranks must call it."""
        members = [(p, self.view_of(i, p)) for i, p in self.initialized()]
        self._owners.follow(members, self.defaults.get("owners", "auto"))

    def home_of(self, p: Tensor) -> Home | None:
        """Which ranks compute the matrices of a parameter; None where each process does so by itself."""
        return self._owners.home(p)

    @property
    def has_slots_of_matrices(self) -> bool:
        """Whether the page has slots of matrices."""
        return any(slot.per == "matrix" for slot in self.slots.values())

    def served_as(self, i: int, p: Tensor) -> Served:
        """The shape of a parameter, the matrices whose slots it has, their names, and those of its means of squares."""
        names, view = self.slots_of(i, p), self.view_of(i, p)
        of_matrix = frozenset(name for name in names if view is not None and self.slots[name].per == "matrix")
        squares = frozenset(name for name in names if self.slots[name].mean_square_by)
        return logical_shape(p), view if of_matrix else None, of_matrix, squares

    def most_dims(self) -> int:
        """The largest number of axes of any parameter."""
        if self._most_dims is None:
            found = self.initialized()
            most = max((len(logical_shape(p)) for _, p in found), default=0)
            if len(found) < len(self.every_parameter()):
                return most
            self._most_dims = most
        return self._most_dims

    # ------------------------------------------------------------------ programs

    def program(self, what: str, h: Mapping[str, Any]) -> Program:
        """The program of "update" (with all stages), "stages" (alone), "predict", "evaluate" or "resume" for `h`."""
        if what not in self._programs:
            update = getattr(self, {"stages": "_only_stages"}.get(what, f"_{what}"))
            self._programs[what] = Programs(update, self.all_slots())
        return self._programs[what](h)

    def _update(self, p: Any, g: Any, s: Any, h: Any) -> Any:
        g = squarable(g)  # one gradient of 1e20 would make a second moment infinite for ever
        for stage in self.stages:
            options = getattr(h, stage.name, None)
            if options is not None:
                g = stage.before(g, s, options, h)
        return self._after(self.update(p, -g if h.maximize else g, s, h), s, h)

    def _after(self, p: Any, s: Any, h: Any) -> Any:
        for stage in self.stages:
            options = getattr(h, stage.name, None)
            if options is not None:
                p = stage.update(p, s, options)
        return p

    def _only_stages(self, p: Any, g: Any, s: Any, h: Any) -> Any:
        for name in h.present:
            getattr(s, name)  # so that `name in s` holds for the stages, as after an update
        return self._after(p, s, h)

    def _predict(self, p: Any, g: Any, s: Any, h: Any) -> Any:
        return self.predict(p, s, h)

    def _evaluate(self, p: Any, g: Any, s: Any, h: Any) -> Any:
        return self._read_only("evaluate", self.evaluate(p, s, h), s)

    def _resume(self, p: Any, g: Any, s: Any, h: Any) -> Any:
        return self._read_only("resume", self.resume(p, s, h), s)

    def _read_only(self, what: str, p: Any, s: Any) -> Any:
        """The parameter, where a function of the page has written nothing else."""
        if s.written:
            raise TypeError(f"{type(self).__name__}.{what} writes {', '.join(s.written)}, and may only read slots.")
        return p

    def first_programs(self) -> list[Program]:
        """The programs of a first step, one for each parameter group, without running anything."""
        found = []
        for i, group in enumerate(self.param_groups):
            for p in [p for p in group["params"] if not is_lazy(p)][:1]:
                options = self.options_of(group)
                scalars = {**self.scalars(namespace(options), 1), **dict.fromkeys(self.inputs, 0.0)}
                found.append(self.program("update", {**options, **self.traits_of(i, p), **scalars}))
        return found

    # ------------------------------------------------------------------ which slots

    def all_slots(self) -> dict[str, Slot]:
        """The slots of the page and of the stages, by name, and `raw` where other weights are evaluated.

        Stages have a `raw` of their own, which a swap fills; that of an evaluation begins as the parameter.
        """
        of_stages = {name: slot for stage in self.stages for name, slot in stage.slots.items()}
        return {**self.slots, **of_stages, **({"raw": RAW} if self.evaluates() else {})}

    def slots_of(self, i: int, p: Tensor) -> tuple[str, ...]:
        """Names of the slots of the page that a parameter in group `i` has, in any step."""
        options, traits = self.options_of(self.param_groups[i]), self.traits_of(i, p)
        key = (*options.values(), *traits.values())
        if key not in self._slots_by_options:
            self._slots_by_options[key] = self._touched(options, traits)
        return self._slots_by_options[key]

    def _touched(self, options: dict[str, Any], traits: dict[str, Any]) -> tuple[str, ...]:
        """Names of the slots that some step under these options and traits reads or writes."""
        first = self.scalars(namespace(options), 1)
        flags = [name for name, value in first.items() if isinstance(value, bool)]
        touched: set[str] = set()
        for choice in itertools.product((False, True), repeat=len(flags)):
            scalars = {**first, **dict(zip(flags, choice, strict=True)), **dict.fromkeys(self.inputs, 0.0)}
            h = {**options, **traits, **scalars}
            touched |= self.program("update", h).slots
            touched |= self.program("predict", h).slots if self.predicts() else set()
        return tuple(name for name in self.slots if name in touched)

    def slot(self, name: str, i: int, p: Tensor) -> Slot:
        """The slot of a parameter in group `i`: of its matrices, or with a value per element where it is none."""
        slot = self.all_slots()[name]
        return slot.of(self.view_of(i, p)) if slot.per == "matrix" else slot

    def shape_of(self, slot: Slot, i: int, p: Tensor) -> torch.Size:
        """The shape of a slot of the whole parameter `p` in group `i`, as in a file."""
        view = self.view_of(i, p) if slot.per == "matrix" else None
        return slot.shape_of(logical_shape(p), self.traits_of(i, p), view)

    def slots_of_stages(self, i: int, p: Tensor) -> tuple[str, ...]:
        """Names of the slots of stages that a parameter in group `i` has."""
        return tuple(name for stage in self.stages for name in stage.slots_beside(self.slots_of(i, p)))

    def shared_slots(self) -> dict[str, Tensor]:
        """The slots of the whole optimizer by name. They are stored in the first parameter group."""
        first = self.param_groups[0]
        return {name: first[name] for name, slot in self.slots.items() if slot.per == "optimizer" and name in first}

    # ------------------------------------------------------------------ creating them

    def start_state(self, p: Tensor, i: int) -> None:
        """Create the step counter and the slots of a parameter."""
        device = local(p).device if self.defaults["capturable"] else "cpu"
        self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=device)
        if self.has_slots_of_matrices:
            self.served[p] = self.served_as(i, p)
        h = {**self.options_of(self.param_groups[i]), **self.traits_of(i, p)}
        for name in (*self.slots_of(i, p), *self.slots_of_stages(i, p)):
            self.create_slot(name, p, i, h)

    def start_idle(self) -> None:
        """Create the state of parameters that had no gradient yet: FSDP2 loads no file that lacks one."""
        for i, p in self.initialized() if self.state else ():
            if p.requires_grad and not self.state.get(p):
                self.start_state(p, i)

    def create_slot(self, name: str, p: Tensor, i: int, h: Mapping[str, Any]) -> None:
        """Create one slot of a parameter in group `i`, under the options and traits `h`."""
        slot, group = self.slot(name, i, p), self.param_groups[i]
        if storage.is_quantized(p, group["state_bits"], slot):
            self.state[p][name] = self.quantized_slot(slot, i, p, local(p))
            return
        if slot.per == "matrix":
            self.state[p][name] = self.slot_of_matrices(slot, i, p, local(p).device)
            return
        value = first_value(slot, p, self.slot_dtype(slot, p, i), h)
        if slot.per == "optimizer":
            self.param_groups[0].setdefault(name, value)
        else:
            self.state[p][name] = value

    def slot_of_matrices(self, slot: Slot, i: int, p: Tensor, device: torch.device | str) -> Tensor:
        """The first value of a slot of the matrices of `p` in group `i` that are computed here, on a device."""
        shape, view = self.shape_of(slot, i, p), self.view_of(i, p)
        if not (is_flattened(p) or self._owners.knows(p, view)):  # FSDP1, which is refused later, would need a message
            self.follow_owners()
        home = self.home_of(p)
        if view is not None and home is not None and {*home.owners} != {home.rank}:
            ranges = view.ranges(slot.shape, home.matrices_of(home.rank))
            shape = torch.Size([sum(high - low for low, high in ranges)])
        return torch.full(shape, slot.start(None), dtype=self.slot_dtype(slot, p, i), device=device)

    def follow_layout(self, p: Tensor) -> None:
        """Store the slots of a parameter in its memory order, which may have changed since they were made."""
        if is_sharded(p) or is_wrapper(p):
            return
        state, order = self.state[p], memory_order(p)
        stale = [name for name, x in state.items() if isinstance(x, storage.Quantized) and x.order != order]
        if stale:
            values = {name: value.contiguous() for name, value in storage.read_shaped(state, stale).items()}
            for name in stale:
                old = state[name]
                state[name] = storage.Quantized.empty(old.shape, old.format, old.codes.device, order)
            storage.write_shaped(state, values, int(state["step"]))
        for name, x in state.items():
            if isinstance(x, Tensor) and name in self.all_slots() and self.all_slots()[name].per != "matrix":
                state[name] = laid_out_like(x, p)

    def quantized_slot(self, slot: Slot, i: int, p: Tensor, shard: Tensor) -> storage.Quantized:
        """A quantized slot of zeros for `p` in group `i`, in the shape of its local tensor `shard`."""
        partner = slot.root_of if slot.root_of in self.slots_of(i, p) else None
        return storage.empty(shard, slot, partner, self.param_groups[i]["state_format"])

    def slot_dtype(self, slot: Slot, p: Tensor, i: int) -> torch.dtype:
        """The dtype of a slot of `p` in group `i` that is not quantized."""
        return storage.dtype(p.dtype, self.param_groups[i]["state_bits"], slot)
