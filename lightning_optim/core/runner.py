"""How a step is run: batches of parameters get their programs and numbers, and an engine gets them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_optim import engines
from lightning_optim.core.batches import Batch, Roster
from lightning_optim.distributed.shards import logical_shape
from lightning_optim.engines.step import Job, Step
from lightning_optim.errors import OptionError
from lightning_optim.language.program import Program

if TYPE_CHECKING:
    from lightning_optim.core.optimizer import Optimizer

# What schedules move; no trait of a tensor may depend on these.
NO_TRAIT = ("lr", "weight_decay")

Parameters = Sequence[tuple[int, Tensor]]


class Runner:
    """Runs the formulas of an optimizer over its parameters.

    Args:
        optimizer: Whose.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.rosters: dict[str, Roster] = {}

    def forget(self) -> None:
        """Look at everything anew in the next step."""
        self.rosters.clear()

    def run(self, what: str, params: Parameters, extra: Mapping[str, Any] | None = None, idle: Parameters = ()) -> None:
        """Run one formula.

        Args:
            what: "update", which counts a step, or "predict".
            params: The parameters that take part, each with the number of its group.
            extra: What the formula reads besides options and scalars: inputs, and the options of stages that act.
            idle: Parameters that have no gradient and that stages serve all the same.
        """
        optimizer, extra = self.optimizer, extra or {}
        capturable = optimizer.defaults["capturable"]
        options = [optimizer.options_of(group, capturable) for group in optimizer.param_groups]
        roster = self._roster(what, params, idle, options)
        if what == "update":
            roster.advance()
        jobs = [self._job(what, batch, options, extra) for batch in roster.batches]
        shared = {name for name, slot in optimizer.slots.items() if slot.per == "optimizer"}
        if any(job.program.slots - batch.slots - shared for job, batch in zip(jobs, roster.batches, strict=True)):
            self._complete(jobs, roster)
            roster = self._roster(what, params, idle, options)
            for job, batch in zip(jobs, roster.batches, strict=True):
                job.rows = batch.rows
        if what == "update":
            roster.take_gradients()
        programs = tuple(job.program for job in jobs)
        for program, batch in zip(programs, roster.batches, strict=True):
            batch.admit(type(optimizer).__name__, program)
            self._locate(program, batch)
        step = Step(jobs, optimizer.shared_slots(), roster.placement)
        if programs not in roster.engines:
            roster.engines[programs] = self._engine(programs, step)
        try:
            roster.engines[programs].run(step)
        finally:
            roster.drop_gradients()

    def _roster(self, what: str, params: Parameters, idle: Parameters, options: Sequence[Mapping[str, Any]]) -> Roster:
        """The parameters in batches: those of the step before, unless something moved."""
        optimizer = self.optimizer
        most_dims = optimizer.most_dims()
        flags = (most_dims, len(params), [[v for k, v in own.items() if k not in NO_TRAIT] for own in options])
        roster = self.rosters.get(what)
        if roster is None or not roster.holds(itertools.chain((p for _, p in params), (p for _, p in idle)), flags):
            for i, p in (*params, *idle):
                if "step" not in optimizer.state[p]:
                    optimizer.start_state(p, i)
            views = [SimpleNamespace(**own) for own in options]

            def traits(i: int, p: Tensor) -> dict[str, Any]:
                return optimizer.traits(views[i], logical_shape(p), p.dtype, most_dims)

            roster = Roster(params, idle, optimizer.state, traits, optimizer.all_slots(), flags)
            self.rosters[what] = roster
        return roster

    def _job(self, what: str, batch: Batch, options: Sequence[dict[str, Any]], extra: Mapping[str, Any]) -> Job:
        """The program and the numbers of a batch; under `capturable` the counter is known on the device alone."""
        optimizer = self.optimizer
        if batch.group is None:
            h = {**extra, "present": tuple(sorted(batch.slots & optimizer.slots.keys()))}
            return Job(optimizer.program("stages", h), h, 0, batch.rows)
        own = options[batch.group]
        t: Any = batch.t
        if optimizer.defaults["capturable"]:
            t = optimizer.state[batch.params[0]]["step"].double()
            own = {name: x.to(t) if isinstance(x, Tensor) else x for name, x in own.items()}
        scalars = optimizer.scalars(SimpleNamespace(**own), t)
        h = {**own, **batch.traits, **scalars, "t": t if isinstance(t, Tensor) else float(t), **extra}
        return Job(optimizer.program(what, h), h, batch.t, batch.rows)

    def _complete(self, jobs: Sequence[Job], roster: Roster) -> None:
        """Make the slots that a program needs and some parameter lacks."""
        optimizer = self.optimizer
        group_of = {p: i for i, p in optimizer.every_parameter()}
        for job, batch in zip(jobs, roster.batches, strict=True):
            for p in batch.params:
                for name in sorted(job.program.slots - optimizer.state[p].keys()):
                    optimizer.create_slot(name, p, group_of[p], job.h)

    def _locate(self, program: Program, batch: Batch) -> None:
        """Tell the rows where in their tensors they are, for a program that draws normal numbers."""
        if program.draws and batch.rows[0].site is None:
            stage = next(stage for stage in self.optimizer.stages if stage.draws)
            for row, p in zip(batch.rows, batch.params, strict=True):
                row.site = stage.site_of(p)

    def _engine(self, programs: Sequence[Program], step: Step) -> engines.Engine:
        optimizer = self.optimizer
        chosen = engines.choose(optimizer.defaults["engine"], programs, step.rows)
        if optimizer.defaults["capturable"] and chosen.name != "triton":
            raise OptionError(
                f"{type(optimizer).__name__}: capturable=True needs the engine triton, and {chosen.name} runs here, "
                f"the parameters being on {step.rows[0].param.device}. Leave it out."
            )
        return chosen
