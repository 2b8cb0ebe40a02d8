"""Runs a step: sets the program and the numbers of each batch, and passes all batches to an engine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_optim import engines
from lightning_optim.core.batches import Batches, Parameters
from lightning_optim.core.guards import refuse_disagreement, refuse_unsummable
from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.placement import logical_shape
from lightning_optim.engines.step import Batch, Step
from lightning_optim.errors import OptionError
from lightning_optim.language.program import Program, namespace

# What schedules change in every step. No trait depends on these.
SCHEDULED = ("lr", "weight_decay")


class Runner:
    """Runs the programs of an optimizer over its parameters.

    Args:
        layout: The optimizer.
    """

    def __init__(self, layout: StateLayout) -> None:
        self.layout = layout
        self.cached: dict[str, Batches] = {}  # by the kind of program

    def clear_cache(self) -> None:
        """Sort all parameters into batches again in the next step."""
        self.cached.clear()

    def run(self, what: str, params: Parameters, extra: Mapping[str, Any] | None = None, idle: Parameters = ()) -> None:
        """Run one kind of program.

        Args:
            what: "update", which counts a step, or "predict".
            params: The parameters that take part, each with the index of its group.
            extra: What the program reads besides options, traits and scalars: inputs, and the options of stages.
            idle: Parameters without a gradient, on which only stages run.
        """
        layout, extra = self.layout, extra or {}
        capturable = layout.defaults["capturable"]
        options = [layout.options_of(group, capturable) for group in layout.param_groups]
        batches = self._batches(what, params, idle, options)
        if what == "update":
            batches.advance()
        self._fill(what, batches, options, extra)
        shared = layout.shared_slots()
        if any(
            batch.program.slots - slots - shared.keys()
            for batch, slots in zip(batches.batches, batches.slots, strict=True)
        ):
            self._create_missing(batches)
            shared = layout.shared_slots()
            batches = self._batches(what, params, idle, options)
            self._fill(what, batches, options, extra)
        if what == "update":
            batches.take_gradients()
        step = Step(batches.batches, shared, batches.reductions)
        programs = tuple(batch.program for batch in batches.batches)
        if programs not in batches.engines:
            for batch in batches.batches:
                self._check(batch)
            batches.engines[programs] = self._engine(programs, step)
        try:
            batches.engines[programs].run(step)
        finally:
            batches.drop_gradients()

    def _batches(
        self, what: str, params: Parameters, idle: Parameters, options: Sequence[Mapping[str, Any]]
    ) -> Batches:
        """The batches of the parameters: those of the step before, unless something has changed."""
        layout = self.layout
        most_dims = layout.most_dims()
        flags = (most_dims, len(params), [[v for k, v in own.items() if k not in SCHEDULED] for own in options])
        cached = self.cached.get(what)
        if cached is not None and cached.valid_for(
            itertools.chain((p for _, p in params), (p for _, p in idle)), flags
        ):
            return cached
        for i, p in (*params, *idle):
            if "step" not in layout.state[p]:
                layout.start_state(p, i)
        views = [namespace(own) for own in options]

        def traits(i: int, p: Tensor) -> dict[str, Any]:
            return layout.traits(views[i], logical_shape(p), p.dtype, most_dims)

        self.cached[what] = Batches(params, idle, layout.state, traits, layout.all_slots(), flags)
        return self.cached[what]

    def _fill(self, what: str, batches: Batches, options: Sequence[dict[str, Any]], extra: Mapping[str, Any]) -> None:
        """Set the program and the numbers of each batch. Under `capturable` the step counter is read on the device."""
        layout = self.layout
        for batch, slots in zip(batches.batches, batches.slots, strict=True):
            if batch.group is None:
                batch.h = {**extra, "present": tuple(sorted(slots & layout.slots.keys()))}
                batch.program = layout.program("stages", batch.h)
                continue
            own, t = options[batch.group], batch.t
            counter: Any = t
            if layout.defaults["capturable"]:
                counter = layout.state[batch.params[0].source]["step"].double()
                own = {name: x.to(counter) if isinstance(x, Tensor) else x for name, x in own.items()}
            scalars = layout.scalars(namespace(own), counter)
            number = counter if isinstance(counter, Tensor) else float(counter)
            batch.h = {**own, **batch.traits, **scalars, "t": number, **extra}
            batch.program = layout.program(what, batch.h)

    def _create_missing(self, batches: Batches) -> None:
        """Create the slots that a program needs and a parameter lacks."""
        layout = self.layout
        group_of = {p: i for i, p in layout.every_parameter()}
        for batch in batches.batches:
            for p in (param.source for param in batch.params):
                for name in sorted(batch.program.slots - layout.state[p].keys()):
                    layout.create_slot(name, p, group_of[p], batch.h)

    def _check(self, batch: Batch) -> None:
        """Refuse sums that a strategy makes impossible, and set global indices where normal numbers are needed."""
        refuse_unsummable(type(self.layout).__name__, batch.program, [param.source for param in batch.params])
        if batch.program.normals and batch.params[0].global_index is None:
            stage = next(stage for stage in self.layout.stages if stage.needs_normals)
            for param in batch.params:
                param.global_index = stage.global_index_of(param.source)

    def _engine(self, programs: Sequence[Program], step: Step) -> engines.Engine:
        layout = self.layout
        chosen = engines.choose(layout.defaults["engine"], programs, step.params)
        if layout.defaults["capturable"] and chosen.name != "triton":
            raise OptionError(
                f"{type(layout).__name__}: capturable=True needs the engine triton, and {chosen.name} runs here, "
                f"the parameters being on {step.params[0].param.device}. Leave it out."
            )
        refuse_disagreement(layout, chosen.name)
        return chosen
