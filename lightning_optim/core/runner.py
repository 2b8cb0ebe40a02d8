"""Runs a step: sets the program and the numbers of each batch, and passes all batches to an engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_optim import engines
from lightning_optim.core.attempt import Created
from lightning_optim.core.batches import Batches
from lightning_optim.core.gradients import Parameters, Seen, refuse_unfit
from lightning_optim.core.guards import (
    refuse_disagreement,
    refuse_flat,
    refuse_matrices,
    refuse_several_devices,
    refuse_unknown_length,
    refuse_unsummable,
)
from lightning_optim.core.state_layout import STORAGE_OPTIONS, WHOLE, StateLayout
from lightning_optim.core.watch import is_same
from lightning_optim.distributed.placement import logical_shape
from lightning_optim.engines import native
from lightning_optim.engines.captures import CHANGED, REBUILT, capturing, kept
from lightning_optim.engines.step import Batch, LocalParameter, Step
from lightning_optim.errors import OptionError
from lightning_optim.language.program import Program, namespace
from lightning_optim.language.programs import flags_of
from lightning_optim.language.values import Options
from lightning_optim.language.view import View

# What schedules change in every step. No trait depends on these.
SCHEDULED = ("lr", "weight_decay")
CONSTANT = (float, int, bool, str)


class Runner:
    """Runs the programs of an optimizer over its parameters.

    Args:
        layout: The optimizer.
    """

    def __init__(self, layout: StateLayout) -> None:
        self.layout = layout
        self.cached: dict[str, Batches] = {}  # by the kind of program
        self.refused: engines.Refused = {}
        self.created, self.moved = Created(), False
        self.kept: list[Any] = []  # what the replays of captured steps read
        # Of each group: as they are written into it, as they are used, as an update sees them, what selects programs.
        self.options: list[tuple[Sequence[Any], dict[str, Any], Options, list[Any] | None]] = []
        self.flags: tuple[Any, ...] = ()  # what of them sorts parameters into batches, and the options it belongs to
        self.names = [name for name in layout.options if name not in (*WHOLE, *STORAGE_OPTIONS)]

    def clear_cache(self) -> None:
        """Sort all parameters into batches again in the next step."""
        self.cached.clear()

    def run(
        self,
        what: str,
        params: Parameters,
        extra: Mapping[str, Any] | None = None,
        idle: Parameters = (),
        seen: Seen | None = None,
    ) -> None:
        """Run one kind of program.

        Args:
            what: "update", which counts a step, "predict", or "evaluate" and "resume", which ranks need not call alike.
            params: The parameters that take part, each with the index of its group.
            extra: What the program reads besides options, traits and scalars: inputs, and the options of stages.
            idle: Parameters without a gradient, on which only stages run.
            seen: The gradients, where the program reads them.
        """
        layout, extra = self.layout, extra or {}
        self.created, self.moved = Created(), False
        options = self._options()
        layout.check_groups(options)
        refuse_unknown_length(layout)
        batches: Batches | None = None
        written: list[LocalParameter] = []
        try:
            batches = self._prepared(what, params, idle, options, extra, seen)
            step = Step(batches.batches, layout.shared_slots(), batches.reductions, written=written)
            self._run(batches, step, compare=what in ("update", "predict"))
        except BaseException:
            self._take_back(what, batches, written)
            raise
        finally:
            if batches is not None:
                batches.drop_gradients()
        assert batches is not None
        if what == "update":
            batches.advance()
            native.count(len(batches.watch.tensors))
        if layout.defaults["capturable"] and capturing():
            self.kept += [batches, *kept(batches.batches)]

    def has_moved(self) -> bool:
        """Whether the last call of `run`, which failed, has written a parameter."""
        return self.moved

    def _options(self) -> list[dict[str, Any]]:
        """The options of each group: the same dict as in the step before where nothing has been written into it."""
        layout = self.layout
        kept, self.options = self.options, []
        for i, group in enumerate(layout.param_groups):
            written = [layout.total_steps, *map(group.__getitem__, self.names)]
            if i < len(kept) and is_same(written, kept[i][0]):
                self.options.append(kept[i])
                continue
            found = layout.options_of(group, layout.defaults["capturable"])
            written = written if all(map(_is_constant, written)) else []
            self.options.append((written, found, namespace(found), flags_of(found)))
        return [found for _, found, *_ in self.options]

    def _flags_of(self, options: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
        """What of the options batches depend on: the same object where the options are."""
        most_dims, kept = self.layout.most_dims(), self.flags
        if not (kept and kept[0] == most_dims and is_same(options, kept[2])):
            flags = [[value for name, value in own.items() if name not in SCHEDULED] for own in options]
            self.flags = (most_dims, flags, options)
        return self.flags[:2]

    def _prepared(
        self,
        what: str,
        params: Parameters,
        idle: Parameters,
        options: Sequence[dict[str, Any]],
        extra: Mapping[str, Any],
        seen: Seen | None,
    ) -> Batches:
        """The batches, with program, numbers and gradients of this step, and with all slots that it needs."""
        batches = self._batches(what, params, idle, options, seen)
        self._fill(what, batches, extra)
        if self._lacks_slots(batches):
            self._create_missing(batches)
            batches = self._batches(what, params, idle, options, seen)
            self._fill(what, batches, extra)
        if seen is not None:
            batches.take_gradients(seen)
        return batches

    def _lacks_slots(self, batches: Batches) -> bool:
        """Whether a program needs a slot that is not there, asked where a program has changed."""
        needed = [batch.program for batch in batches.batches], [*self.layout.shared_slots()]
        if batches.complete == needed:
            return False
        found = zip(batches.batches, batches.slots, strict=True)
        if any(batch.program.slots - slots - {*needed[1]} for batch, slots in found):
            return True
        batches.complete = needed
        return False

    def _run(self, batches: Batches, step: Step, compare: bool) -> None:
        layout = self.layout
        programs = tuple(batch.program for batch in batches.batches)
        if programs not in batches.engines:
            if layout.defaults["capturable"] and capturing():
                raise RuntimeError(REBUILT.format(CHANGED))
            for batch in batches.batches:
                self._check(batch)
            batches.engines[programs] = self._engine(programs, step)
        if compare and not layout.compared:
            refuse_disagreement(self.layout, batches.engines[programs].name)
        name = "triton" if layout.defaults["capturable"] else layout.defaults["engine"]
        batches.engines[programs] = engines.run(step, batches.engines[programs], name, self.refused)

    def _take_back(self, what: str, batches: Batches | None, written: Sequence[LocalParameter]) -> None:
        """Count a step that failed for what it has written. If that is nothing, remove what it has created."""
        self.moved = bool(written)
        if not written:
            self.created.remove()
        elif what == "update" and batches is not None:
            batches.advance_only(written)
        self.clear_cache()

    def _batches(
        self, what: str, params: Parameters, idle: Parameters, options: Sequence[dict[str, Any]], seen: Seen | None
    ) -> Batches:
        """The batches of the parameters: those of the step before, unless something has changed."""
        layout, flags = self.layout, self._flags_of(options)
        cached = self.cached.get(what)
        if cached is not None and cached.valid_for(params, idle, layout.state, flags):
            return cached
        if layout.defaults["capturable"] and capturing():
            raise RuntimeError(REBUILT.format(CHANGED))
        if layout.defaults["capturable"]:
            refuse_several_devices(type(layout).__name__, (p for _, p in (*params, *idle)))
        if seen is not None:
            refuse_unfit(type(layout).__name__, seen)
        layout.follow_owners()
        self._begin_anew(params)
        for i, p in (*params, *idle):
            if "step" not in layout.state.get(p, ()):
                self._note(p)
                layout.start_state(p, i)
            layout.follow_layout(p)
        spaces = [space for _, _, space, _ in self.options]

        def traits(i: int, p: Tensor) -> dict[str, Any]:
            return layout.traits_under(spaces[i], p)

        def view(i: int, p: Tensor) -> View | None:
            return layout.matrices(spaces[i], logical_shape(p))

        self.cached[what] = Batches(params, idle, layout.state, traits, view, layout.home_of, layout.all_slots(), flags)
        return self.cached[what]

    def _fill(self, what: str, batches: Batches, extra: Mapping[str, Any]) -> None:
        """Set the program and the numbers of each batch. Under `capturable` the step counter is read on the device."""
        layout = self.layout
        for batch, slots in zip(batches.batches, batches.slots, strict=True):
            if batch.group is None:
                batch.h = {**extra, "present": tuple(sorted(slots & layout.slots.keys()))}
                batch.program = layout.program("stages", batch.h)
                continue
            _, own, space, own_flags = self.options[batch.group]
            step = int(what == "update")  # a step is counted when it has not failed
            counter: Any = batch.counter + step
            batch.t = batch.counter + step
            if layout.defaults["capturable"]:
                counter = layout.state[batch.params[0].source]["step"].double() + step
                own = {name: x.to(counter) if isinstance(x, Tensor) else x for name, x in own.items()}
                space = namespace(own)
            scalars = layout.scalars(space, counter)
            number = counter if isinstance(counter, Tensor) else float(counter)
            batch.h = {**own, **batch.traits, **scalars, "t": number, **extra}
            flags = own_flags, flags_of({**scalars, **extra})
            if None in flags or batch.flags != flags:
                batch.flags, batch.program = flags, layout.program(what, batch.h)

    def _create_missing(self, batches: Batches) -> None:
        """Create the slots that a program needs and a parameter lacks."""
        layout = self.layout
        group_of = {p: i for i, p in layout.every_parameter()}
        for batch in batches.batches:
            for p in (param.source for param in batch.params):
                for name in sorted(batch.program.slots - layout.state[p].keys()):
                    self._note(p)
                    layout.create_slot(name, p, group_of[p], batch.h)

    def _begin_anew(self, params: Parameters) -> None:
        """Drop the state of parameters that other code has made other matrices since, in their groups.

        Bases and a second moment belong to the axes for which they were made, and a second moment that begins under an
        old counter would be taken for a whole one.
        """
        layout = self.layout
        if not layout.has_slots_of_matrices:
            return
        changed = []
        for i, p in params:
            now = layout.served_as(i, p)
            was = layout.served.setdefault(p, now) if "step" in layout.state.get(p, ()) else now
            if was[0] == now[0] and (was[1:3] != now[1:3] or now[3] - was[3]):  # another shape is refused later
                self._note(p)
                layout.state[p].clear()
                changed.append([*logical_shape(p)])
        if changed:
            warnings.warn(
                f"{type(layout).__name__}: options of parameter groups were changed to other matrices or another rule "
                f"for {len(changed)} parameter{'s' * (len(changed) > 1)}, the first of shape {changed[0]}. Their state "
                "starts anew, with their counters.",
                stacklevel=2,
            )

    def _note(self, p: Tensor) -> None:
        """Remember which slots there are, before some of a parameter are created."""
        layout = self.layout
        for state in (layout.state, layout.param_groups[0], *([layout.state[p]] if p in layout.state else ())):
            self.created.note(state)

    def _check(self, batch: Batch) -> None:
        """Refuse sums that a strategy makes impossible, and set global indices where normal numbers are needed."""
        sources = [param.source for param in batch.params]
        refuse_unsummable(type(self.layout).__name__, batch.program, sources)
        refuse_matrices(self.layout, batch.program, sources)
        refuse_flat(self.layout, batch.group, sources)
        if batch.program.normals and batch.params[0].global_index is None:
            stage = next(stage for stage in self.layout.stages if stage.needs_normals)
            for param in batch.params:
                param.global_index = stage.global_index_of(param.source)

    def _engine(self, programs: Sequence[Program], step: Step) -> engines.Engine:
        layout = self.layout
        name = layout.defaults["engine"]
        chosen = engines.choose(name, programs, step.params, self.refused)
        chosen = engines.prepare(step, chosen, name, self.refused)
        if layout.defaults["capturable"] and chosen.name != "triton":
            found = self.refused.get("triton") or engines.triton.refusal(programs, [x.param for x in step.params])
            raise OptionError(
                f"{type(layout).__name__}: capturable=True needs the engine triton, and {chosen.name} runs here"
                f"{': ' + found if found else ', for it was asked for.'} Leave it out."
            )
        return chosen


def _is_constant(value: Any) -> bool:
    """Whether a value of an option cannot change in place, as a list and a tensor can."""
    return all(map(_is_constant, value)) if type(value) is tuple else value is None or type(value) in CONSTANT
