"""What an optimizer hands to an engine: batches of local parameters, each with its program and its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_optim.distributed.global_index import GlobalIndex, exchange_of
from lightning_optim.distributed.owners import Home
from lightning_optim.distributed.placement import gradient_of, is_dtensor, is_sharded, local, shard_of
from lightning_optim.distributed.plain import bare, memory_order
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.distributed.shard import Shard
from lightning_optim.engines.facts import Facts
from lightning_optim.language.program import Program
from lightning_optim.language.slot import Slot
from lightning_optim.language.view import View
from lightning_optim.storage import Quantized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

HALF = (torch.float16, torch.bfloat16)


@dataclass(slots=True, eq=False)
class LocalParameter:
    """What this process holds of a parameter, of its gradient and of its slots, as engines see it.

    Attributes:
        source: The parameter itself.
        param: Its local tensor, with at least one axis. A complex tensor is its real view, with a last axis of size 2.
        grad: The gradient in the shape of `param`. None where only stages run.
        state: The slots by name: tensors of the shape of `param`, of its shape with one axis of size 1, or of shape ();
            or quantized.
        numel: The number of real elements of the whole tensor, of which this process may hold a shard.
        shard: The shard that this process holds; None where the parameter is not sharded.
        global_index: The global indices of the elements; None where no normal numbers are needed.
        order: The axes of `param` in their order in memory, where it is dense and that is not their own order.
        view: The matrices that the whole tensor is, where its update uses functions of them.
        home: Which ranks compute these matrices; None where each process that holds the tensor does so by itself.
        buffers: In a step the arguments and results of these functions, by the names of `Program.buffers`.
        of_matrices: What the matrices that are computed here have of each slot of matrices, by its name and their
            index: views of the memory in `state`.
        pending: New values of these, by the name of the slot and the index of the matrix. They are written with the
            other slots, when all functions of whole matrices of the step are computed.
    """

    source: Tensor
    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    numel: int
    shard: Shard | None = None
    global_index: GlobalIndex | None = None
    order: tuple[int, ...] | None = None
    view: View | None = None
    home: Home | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    of_matrices: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    pending: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        p: Tensor,
        state: dict[str, Any],
        slots: Mapping[str, Slot],
        view: View | None = None,
        home: Home | None = None,
    ) -> LocalParameter:
        """The local parameter of `p`, without a gradient.

        Args:
            p: The parameter.
            state: Its slots by name, quantized or not.
            slots: The declarations of these slots, by name.
            view: The matrices that the whole tensor is.
            home: Which ranks compute these.

        Raises:
            RuntimeError: where a slot is on another device or has another shape than the parameter.
        """
        param = bare(local(p))
        slots = {name: slot.of(view) for name, slot in slots.items()}
        state = {name: value if isinstance(value, Quantized) else local(value) for name, value in state.items()}
        _refuse_other_device(param, state, slots)
        _refuse_other_shape(param, state, slots)
        if param.is_complex():  # real and imaginary parts are elements of their own
            param = torch.view_as_real(param)
            state = {name: torch.view_as_real(x) if x.is_complex() else x for name, x in state.items()}
        if param.dim() == 0:  # torch promotes types differently where a tensor has no axis
            param = param.view(1)
            state = {name: x.view(1) if slots[name].per == "element" else x for name, x in state.items()}
        shard = shard_of(p) if is_sharded(p) else None
        numel = p.numel() if shard is None else shard.numel
        order = None if is_dtensor(p) else memory_order(param)
        owned: dict[str, dict[int, Tensor]] = {}
        if view is not None:
            here = range(len(view.rows)) if home is None else home.matrices_of(home.rank)
            owned = {name: view.slots(x, slots[name].shape, here) for name, x in state.items() if slots[name].shape}
        numel *= 2 if p.is_complex() else 1
        return cls(p, param, None, state, numel, shard, order=order, view=view, home=home, of_matrices=owned)

    @property
    def process_groups(self) -> tuple[ProcessGroup, ...]:
        """The process groups over which the parameter is sharded."""
        return () if self.shard is None else self.shard.process_groups

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype in which the update computes: float32 for half precision, else the dtype of the parameter."""
        return torch.float32 if self.param.dtype in HALF else self.param.dtype

    def operand(self, name: str) -> Any:
        """The parameter ("p"), its gradient ("g"), a buffer, or a slot, which may be quantized.

        A tensor is a view whose axes are in the order of the parameter's memory, so that walks over memory see it
        contiguous if it lies as the parameter does.
        """
        found: Any = self.param if name == "p" else self.grad if name == "g" else self.buffers.get(name)
        found = self.state[name] if found is None else found
        return found if self.order is None or isinstance(found, Quantized) else found.permute(self.order)

    def make_buffer(self, name: str) -> None:
        """Make a buffer of the compute dtype in the shape of the local tensor, which lies in memory as that does."""
        shape, order = self.param.shape, self.order or range(self.param.dim())
        memory = self.param.new_empty([shape[axis] for axis in order], dtype=self.compute_dtype, requires_grad=False)
        self.buffers[name] = memory.permute([order.index(axis) for axis in range(len(shape))])

    def write_slots_of_matrices(self) -> None:
        """Write the new values of the slots of its matrices."""
        for (name, i), value in self.pending.items():
            self.of_matrices[name][i].copy_(value)

    @property
    def index_in_memory(self) -> GlobalIndex:
        """The global indices of the elements in the order of the parameter's memory."""
        assert self.global_index is not None
        if self.order is None:
            return self.global_index
        exchange = exchange_of(self.order, self.param.shape)
        assert exchange is not None  # engines have refused others
        return replace(self.global_index, exchange=exchange)


@dataclass(slots=True, eq=False)
class Batch:
    """Local parameters that run one program with the same options, scalars and step counter.

    A batch is kept from step to step until one of its tensors is replaced. `program`, `h` and `t` are set in each step.

    Attributes:
        params: The local parameters.
        group: The index of their parameter group; None for parameters without a gradient, on which only stages run.
        traits: Their traits, by name.
        program: The program that runs on them.
        h: The options of the group and the scalars of the step, by name.
        flags: What in `h` has selected the program (`flags_of`); None in it takes a closer look in each step.
        t: The number of this step, on which stochastic rounding depends; 1 in the first one.
        counter: Their step counter: the number of the last step that did not fail.
        grads: In a step the gradients, where they are not simply those of the sources of `params`.
        gradients: What launches depend on of the gradients of a step. None where only stages run, where each parameter
            has been given its own, and where a gradient has no address.
        cache: Whatever an engine keeps for these parameters from step to step.
    """

    params: list[LocalParameter] = field(default_factory=list)
    group: int | None = None
    traits: dict[str, Any] = field(default_factory=dict)
    program: Program = field(init=False)
    h: dict[str, Any] = field(init=False)
    flags: tuple[Any, ...] = ()
    t: int = 0
    counter: int = 0
    grads: Sequence[Tensor] = ()
    gradients: Facts | None = None
    cache: dict[Any, Any] = field(default_factory=dict)

    def hand_out(self) -> None:
        """Give each parameter its gradient. Kernels need only addresses."""
        if self.gradients is None and not self.grads:
            return
        grads: Sequence[Any] = self.grads or [gradient_of(param.source) for param in self.params]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad if grad.shape == param.param.shape else grad.view(param.param.shape)

    def drop(self) -> None:
        """Drop references to gradients and buffers, whose memory may be needed before the next step."""
        self.grads = ()
        if not self.params or (self.params[0].grad is None and self.params[0].view is None):
            return
        for param in self.params:
            param.grad = None
            param.buffers.clear()
            param.pending.clear()

    @classmethod
    def of(cls, program: Program, h: dict[str, Any], t: int = 0, params: Iterable[LocalParameter] = ()) -> Batch:
        """A batch for one step."""
        batch = cls(list(params), t=t)
        batch.program, batch.h = program, h
        return batch

    @property
    def slots(self) -> frozenset[str]:
        """Names of the slots that all its parameters have."""
        return frozenset.intersection(*(frozenset(param.state) for param in self.params))


@dataclass(slots=True)
class Step:
    """All that an engine runs in one step of an optimizer.

    Attributes:
        batches: The batches.
        shared: The slots of the whole optimizer by name, each of shape () in float64. Engines write them in place.
        reductions: Combines partial sums over the ranks that hold shards of a tensor.
        exchanged: Whether ranks have combined sums. They would wait for each other if one of them began again.
        written: The local parameters that have been written. If a step fails, these have been counted, and no others.
    """

    batches: list[Batch]
    shared: dict[str, Tensor]
    reductions: Reductions
    exchanged: bool = False
    written: list[LocalParameter] = field(default_factory=list)

    def hand_out_gradients(self) -> None:
        """Give each parameter its gradient, where an engine computes with tensors."""
        for batch in self.batches:
            batch.hand_out()

    @property
    def begun(self) -> bool:
        """Whether anything has happened that cannot be done again on another engine."""
        return self.exchanged or bool(self.written)

    @property
    def params(self) -> list[LocalParameter]:
        """The parameters of all batches."""
        return [param for batch in self.batches for param in batch.params]


def _refuse_other_device(param: Tensor, state: dict[str, Any], slots: Mapping[str, Slot]) -> None:
    """Refuse state on another device: engines that use addresses would read memory of something else."""
    for name, value in state.items():
        device = (value.codes if isinstance(value, Quantized) else value).device
        if device != param.device and slots[name].per in ("element", "matrix"):
            raise RuntimeError(
                f"{name} of a parameter of shape {tuple(param.shape)} is on {device}, and the parameter on "
                f"{param.device}. Move the model before its optimizer is made, or load the state again."
            )


def _refuse_other_shape(param: Tensor, state: dict[str, Any], slots: Mapping[str, Slot]) -> None:
    """Refuse state of another size: engines that use addresses would read and write beyond its end."""
    for name, slot in slots.items():
        if slot.per != "element" or slot.without is not None or name not in state:
            continue
        if state[name].shape != param.shape:
            raise RuntimeError(
                f"{name} has the shape {tuple(state[name].shape)}, and its parameter {tuple(param.shape)}. Did the "
                "parameter change after the first step? Make the optimizer anew, or call its reset()."
            )
