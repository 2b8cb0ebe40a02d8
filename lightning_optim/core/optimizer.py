"""The base class of every optimizer: construction, parameter groups, stages, the step, and saving and loading.

A page (a module of `lightning_optim/optimizers/`) declares the mathematics. What every `torch.optim.Optimizer` must
do is implemented here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lightning_optim import engines
from lightning_optim.core import frozen, load, matrix_slots, routing, torch_files
from lightning_optim.core import state_dict as checkpoint
from lightning_optim.core.aliasing import refuse_overlap, refuse_repeats
from lightning_optim.core.attempt import Attempt
from lightning_optim.core.constructor import constructor, has_own_constructor, takes_word
from lightning_optim.core.evaluation import MODE, EvaluationMode
from lightning_optim.core.gradients import Look
from lightning_optim.core.guards import (
    refuse_nothing_to_quantize,
    refuse_parameters,
    refuse_stale_parameters,
    refuse_uncapturable,
)
from lightning_optim.core.loss import Loss
from lightning_optim.core.parameter_groups import read_group, read_params, refuse_mixed_names
from lightning_optim.core.runner import Runner
from lightning_optim.core.state_layout import WHOLE, StateLayout
from lightning_optim.core.wrapped import hand_on
from lightning_optim.distributed.placement import has_gradient, is_sharded
from lightning_optim.errors import OptionError
from lightning_optim.language.definition import Definition
from lightning_optim.language.options import check_options, read_options
from lightning_optim.language.slot import Slot
from lightning_optim.stages.stage import Stage

OPTIMIZERS: dict[str, type[Optimizer]] = {}


class Optimizer(EvaluationMode):
    """The base class of all optimizers. A subclass adds its options, its slots and one `update`.

    Args:
        params: Parameters, named parameters or parameter groups, as for `torch.optim`.
        maximize: Maximize the objective instead of minimizing it.
        cautious: Leave out the elements of a step that do not go against the gradient, and lengthen the others by as
            much as that leaves out of a tensor, at most 1000 times (Liang et al. 2024). It helps at small learning
            rates and costs a sum over each tensor.
        cautious_decay: Decay only the elements that the step does not make larger; for a decoupled weight decay.
        state_bits: Bits per value of optimizer state: 32, 16 or 8. 32 stores float32 (float64 for float64
            parameters), also for bfloat16 and float16 parameters. 16 stores bfloat16. 8 stores 8-bit codes for tensors
            of at least 4096 elements. Slots that must stay exact are stored in 32 bits in any case.
        state_format: The 8-bit format. "log" quantizes the logarithm of second moments with stochastic rounding, and
            first moments relative to their square root. "dynamic" is the dynamic tree code of bitsandbytes.
        engine: What runs the update. "auto" chooses the fastest engine that can; "reference" is plain torch.
        capturable: Make a step safe to capture in a CUDA graph: step counters live on the GPU, `lr` may be a tensor
            there, and what depends on them is computed there. A step outside a graph is slower then. State must
            exist before the capture, so run a few steps first.
        owners: Where an update needs whole matrices, whether one of DDP's ranks computes each of them and sends it to
            the others, or all ranks do. "auto" decides by cost, and all do on CPUs. FSDP always has owners.

    Raises:
        OptionError: for an option that is unknown, of a wrong type or out of range, for an empty parameter list, and
            for a parameter that is given twice or shares memory with another.
    """

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        """Read options and slots off a page, give it a constructor, and register it under its name."""
        super().__init_subclass__(**kwargs)
        if not issubclass(next(c for c in cls.__mro__[1:] if "step" in vars(c)), Optimizer):
            hand_on(cls, Optimizer)  # Lightning derives a class from each optimizer that it wraps, which is not a page
            return
        cls.name = name or cls.__name__.lower()
        cls.options = read_options(cls, Definition, () if cls.has_matrices() else ("owners",))
        cls.slots = {n: slot for c in reversed(cls.__mro__) for n, slot in vars(c).items() if isinstance(slot, Slot)}
        if not has_own_constructor(cls):
            cls.__init__ = constructor(cls, Optimizer.__doc__)  # type: ignore[method-assign]
        if takes_word(cls, name, OPTIMIZERS):
            OPTIMIZERS[cls.name] = cls

    # ------------------------------------------------------------------ construction

    def _begin(self, params: Any, options: dict[str, Any]) -> None:
        owner = type(self).__name__
        groups = read_params(owner, params)
        options = check_options(options, self.options, owner)
        self.check_all(options)
        refuse_nothing_to_quantize(owner, options, self.slots)
        whole = {name: options.pop(name) for name in WHOLE if name in options}
        engines.check_name(whole["engine"])
        self._prepare()
        if whole["capturable"]:
            refuse_uncapturable(self)
        torch.optim.Optimizer.__init__(self, groups, {name: options[name] for name in self.options if name in options})
        self.defaults.update(whole)
        refuse_overlap(owner, [p for _, p in self.every_parameter()])
        routing.check_shapes(self)

    def _prepare(self) -> None:
        """Create what is never saved: caches, and the inputs of the next step."""
        self._loss = Loss()
        self._prepare_layout()
        self._runner, self._look = Runner(self), Look(type(self).__name__)
        self._counters_agree = True
        self._for_file = False
        self._gathered: dict[matrix_slots.Key, Tensor] | None = None
        self._lent: torch_files.Lent = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: `params`, and options that differ from the defaults.

        Raises:
            OptionError: as the constructor does.
        """
        owner = type(self).__name__
        if isinstance(param_group, dict):  # without the state of another optimizer, whose group it was
            state = [name for name, slot in self.slots.items() if slot.per == "optimizer"]
            param_group = {key: value for key, value in param_group.items() if key not in state}
        group = read_group(owner, param_group, self.options, self.defaults.get("capturable", False))
        tensors = group["params"]
        refuse_repeats(owner, tensors, self.param_groups)
        refuse_mixed_names(owner, group, self.param_groups)
        refuse_parameters(owner, tensors)
        if "engine" in self.defaults:  # torch's constructor adds group after group; `_begin` looks at all of them
            refuse_overlap(owner, [*(p for _, p in self.every_parameter()), *tensors])
        if self.real_only and any(p.is_complex() for p in tensors):
            raise OptionError(f"{owner} cannot serve a complex parameter: {self.real_only}")
        options = {name: group.get(name, self.defaults[name]) for name in self.options if name not in WHOLE}
        self.check_all(options)
        refuse_nothing_to_quantize(owner, options, self.slots)
        self.complete(options)
        routing.check_group(self, {**group, **options})
        super().add_param_group({**group, **options})
        self._most_dims = None
        for name in WHOLE:
            self.param_groups[-1].pop(name, None)
        if self.evaluates():
            self.param_groups[-1][MODE] = self.is_training

    def __getstate__(self) -> dict[str, Any]:
        kept = ("stages", "model_order", "waiting", "reasons", "served", "positions", "total_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it, and a group that is added later would take it
        self._prepare()

    def __repr__(self) -> str:
        lines = super().__repr__().splitlines()
        params = [p for _, p in self.initialized()]
        engine = engines.describe(self.defaults["engine"], self.first_programs(), params, self._runner.refused)
        runs = [f"engine: {engine}", *(f"stage: {stage!r}" for stage in self.stages), *routing.report(self)]
        return "\n".join([*lines[:-1], *(f"    {line}" for line in runs), lines[-1]])

    # ------------------------------------------------------------------ stages and inputs

    def append(self, stage: Stage) -> None:
        """Add a stage, which runs in the same pass over memory as the update.

        Args:
            stage: The stage. Its slots are created at once, in the state of every parameter.

        Raises:
            OptionError: for a second stage of the same name, and under `capturable`.
        """
        if any(other.name == stage.name for other in self.stages):
            raise OptionError(f"{type(self).__name__} has a stage named {stage.name!r} already.")
        self.stages.append(stage)
        if self.defaults["capturable"]:
            try:
                refuse_uncapturable(self)
            except OptionError:
                self.stages.pop()
                raise
        self.stages.sort(key=lambda stage: stage.order)
        self._programs.clear()
        self._runner.clear_cache()
        for i, p in self.initialized():
            if "step" not in self.state[p]:  # loaders of sharded checkpoints fill the slots that exist, and no others
                self.start_state(p, i)
            for name in stage.slots_beside(self.slots_of(i, p)):
                self.create_slot(name, p, i, {})

    def remove(self, stage: Stage) -> None:
        """Remove a stage. Its slots stay in the state."""
        self.stages.remove(stage)
        self._programs.clear()
        self._runner.clear_cache()

    def set_loss(self, loss: Any, second_moment: Any = None) -> None:
        """Give the next step the loss of its batch, for an update that reads it (KOALA).

        Args:
            loss: Mean loss of this rank's batch, a number or a tensor of one element. It is averaged over ranks.
            second_moment: Mean of the squared losses of the samples. By default the square of the mean loss, which is
                a lower bound.
        """
        self._loss.set(loss, second_moment)

    def has_second_moment(self) -> bool:
        """Whether `set_loss` was given the second moment for the next step."""
        return self._loss.second_moment is not None

    # ------------------------------------------------------------------ the step

    @_disable_dynamo  # a compiled training step calls it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returns, or None.

        Raises:
            RuntimeError: for a sparse gradient, for a missing loss where the update reads it, and in evaluation mode.
            OptionError: where the engine that was asked for cannot serve. A step that failed has not been counted.
        """
        if torch.is_inference_mode_enabled():  # state that was made there could not be written outside
            with torch.inference_mode(False):
                return self.step(closure)
        if not self._counters_agree:
            checkpoint.agree_on_counters(self)
            self._counters_agree = True
        if closure is None and not self.state and torch_files.creates_state(self):
            for i, p in self.initialized():
                self.start_state(p, i)
            if self.predicts():  # torch's loader takes the keys of a group that it finds here, and no others
                self.param_groups[0].setdefault("predicted", False)
            return None
        if self.evaluates():
            self._begin_step()
        frozen.join(self)
        owner, every = type(self).__name__, self.every_parameter()
        seen = self._look.at(every) if closure is None else None
        to_predict = self.predicts() and not self.param_groups[0].get("predicted", False)
        late = not self.state and len(self.initialized()) < len(every)  # the first prediction moves nothing
        if to_predict and not late:
            self._predict_now()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            frozen.join(self)
            every = self.every_parameter()
            seen = self._look.at(every)
        if to_predict and late:
            self._predict_now()
        if active := (seen.params if seen else ()):  # otherwise no parameter moves, and stages do not count the step
            with Attempt(self._runner.has_moved, self._loss, *self.stages):
                inputs = self._loss.take(self, loss) if self.inputs else {}
                acting = {stage.name: stage.advance() for stage in self.stages}
                after = any(stage.acts_after and acting[stage.name] is not None for stage in self.stages)
                idle = [(i, p) for i, p in self.initialized() if not has_gradient(p)] if after else []
                self._runner.run("update", active, {**inputs, **acting}, idle, seen)
        elif not any(float(self.state.get(p, {}).get("step", 0)) for _, p in every):
            refuse_stale_parameters(owner, [p for _, p in every])
        if self.predicts():
            self.param_groups[0]["predicted"] = not active  # what no gradient has corrected yet is still valid
            # Without a closure the next forward pass comes before the next call, so its prediction is made here.
            if closure is None and active:
                self._predict_now()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        frozen.join(self)  # before their first gradients, which are clipped and unscaled with all others
        super().zero_grad(set_to_none)

    def _predict_now(self) -> None:
        """Move the parameters before their gradients are computed, and remember it whatever fails afterwards."""
        self._runner.run("predict", self.initialized())
        self.param_groups[0]["predicted"] = True

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, as plain tensors of the parameters' shapes.

        Quantized slots are dequantized, and quantized again on load, to the same codes. So the file loads under any
        `state_bits`, strategy and number of ranks, and into the optimizer of `torch.optim` with the same algorithm.
        Where any slot is quantized, all of it is a copy of this moment. Where none is, its tensors are those of the
        optimizer, as in torch: later steps change them, and `copy.deepcopy` keeps a moment.
        """
        gathered, self._gathered = self._gathered, None
        convert = lambda _, found: checkpoint.dequantize(self, found, gathered)  # noqa: E731
        hook = self.register_state_dict_post_hook(convert, prepend=True)
        for_file, self._for_file = self._for_file, False
        if for_file or any(is_sharded(p) for _, p in self.every_parameter()):
            self.start_idle()
        try:
            found = super().state_dict()
        finally:
            hook.remove()
        self._lent = torch_files.lent(found)
        return checkpoint.renumber(found, self.model_order) if for_file else found

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Number parameters in the order of the model, not of the parameter groups, in the next `state_dict`.

        Lightning and Fabric call this before they write a file with whole tensors. FSDP numbers parameters in the order
        of the model, also when it reads a file. Torch ignores the numbers. Slots of matrices that replicas share are
        brought to the rank `to`, so all ranks must call it.
        """
        if self.has_slots_of_matrices:
            self.start_idle()  # before, for `state_dict` finds nothing else at the owners
        self._gathered = matrix_slots.gather(self, to)
        self._for_file = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, or of the same algorithm in `torch.optim`.

        Options are taken from the checkpoint, except `state_bits` and `state_format`, which this optimizer keeps.
        Slots are stored in this optimizer's format. Slots that the checkpoint lacks start fresh, and slots that this
        class does not have are dropped, both with a warning.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            OptionError: a ValueError, for parameter groups, shapes, counters or options that do not fit, and for state
                that is not finite. Nothing has changed then.
        """
        with torch.inference_mode(False):  # as in `step`
            load.into(self, state_dict, super().load_state_dict, self._lent)
        self._load_mode(state_dict)
        self._counters_agree = False

    def reset(self) -> None:
        """Drop all state, so that the next step is a first step. (Adan's restart does this.)"""
        self.state.clear()
        self._runner.clear_cache()
        for name, slot in self.slots.items():
            if slot.per == "optimizer":
                self.param_groups[0].pop(name, None)


# LightningCLI lists the classes that derive from torch's, but for abstract ones.
for _base in (StateLayout, EvaluationMode, Optimizer):
    _base.__abstractmethods__ = frozenset({"update"})  # type: ignore[attr-defined]
