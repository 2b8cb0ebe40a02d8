"""The engines, and the choice of one of them for a step.

`engine="auto"` chooses the fastest engine that can serve a step, and goes on to the next one where it turns out that a
kernel cannot be had. An engine that was chosen by name and cannot serve is an error that gives the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lightning_optim.engines import blocked, compiled, reference, triton
from lightning_optim.engines.step import LocalParameter, Step
from lightning_optim.errors import EngineError, OptionError, nearest
from lightning_optim.language.program import Program


class Engine(Protocol):
    """A module with these four names is an engine."""

    name: str

    def refusal(self, programs: Sequence[Program], params: Sequence[Tensor]) -> str:
        """Why it cannot serve, in one sentence; empty where it can."""
        ...

    def prepare(self, step: Step) -> None:
        """Get what a step needs beforehand, so that another engine can still run it.

        Raises:
            EngineError: where a kernel cannot be had.
        """
        ...

    def run(self, step: Step) -> None:
        """Run a step: write parameters and slots in place.

        Raises:
            EngineError: where a kernel cannot be had. `step.begun` says whether anything has changed by then.
        """
        ...


ENGINES: dict[str, Engine] = {  # in descending order of speed
    triton.name: triton,
    compiled.name: compiled,
    blocked.name: blocked,
    reference.name: reference,
}


def check_name(name: str) -> str:
    """The name of an engine, or "auto", as it was given.

    Raises:
        OptionError: where no engine has this name.
    """
    if name not in ("auto", *ENGINES):
        raise OptionError(
            f"engine={name!r} is not known; it must be one of auto, {', '.join(ENGINES)}.{nearest(name, ENGINES)}"
        )
    return name


Refused = dict[str, str]  # why an engine could not have a kernel, by its name
_told: set[str] = set()


def choose(
    name: str, programs: Sequence[Program], params: Sequence[LocalParameter], refused: Mapping[str, str] | None = None
) -> Engine:
    """The engine that runs a step.

    Args:
        name: "auto", or the name of an engine.
        programs: The programs of the step.
        params: Its local parameters.
        refused: Engines that could not have a kernel before, and are not chosen again.

    Raises:
        OptionError: where the engine of that name cannot serve the step.
    """
    tensors = [param.param for param in params]
    if name == "auto":
        return ENGINES[_fastest(programs, tensors, refused or {})[0]]
    refusal = ENGINES[name].refusal(programs, tensors)
    if refusal:
        raise _cannot_serve(name, refusal)
    return ENGINES[name]


def prepare(step: Step, engine: Engine, name: str, refused: Refused) -> Engine:
    """The engine that was chosen for a step, with all its kernels, or the next one where that cannot have them.

    Args and errors are those of `run`.
    """
    return _go_on(lambda chosen: chosen.prepare(step), step, engine, name, refused)


def run(step: Step, engine: Engine, name: str, refused: Refused) -> Engine:
    """Run a step on the engine that was chosen for it, or on the next one where that cannot have a kernel.

    Args:
        step: The step.
        engine: The engine that `choose` has returned.
        name: What was asked for: "auto", or the name of an engine.
        refused: Receives the engines that could not have a kernel, and why. They are not chosen again.

    Returns:
        The engine that has run the step.

    Raises:
        OptionError: where the engine was asked for by its name. Nothing has changed then.
        EngineError: where a kernel is missing in the middle of a step.
    """
    return _go_on(lambda chosen: chosen.run(step), step, engine, name, refused)


def _go_on(act: Callable[[Engine], None], step: Step, engine: Engine, name: str, refused: Refused) -> Engine:
    """The first engine, from one on, that does not lack a kernel."""
    while True:
        try:
            act(engine)
        except EngineError as error:
            if step.begun:
                raise
            if name != "auto":
                raise _cannot_serve(name, str(error)) from error
            refused[engine.name] = str(error)
        else:
            return engine
        _tell(engine.name, refused[engine.name])
        engine = choose(name, [batch.program for batch in step.batches], step.params, refused)


def _cannot_serve(name: str, refusal: str) -> OptionError:
    return OptionError(f"engine={name!r} cannot serve here: {refusal} Use engine='auto' or 'reference'.")


def _tell(name: str, refusal: str) -> None:
    """Say once why another engine runs than the one that was expected."""
    if refusal not in _told:
        _told.add(refusal)
        warnings.warn(f"another engine than {name!r} runs the step, since {refusal}", stacklevel=2)


def describe(
    name: str, programs: Sequence[Program], params: Sequence[Tensor], refused: Mapping[str, str] | None = None
) -> str:
    """The name of the engine that would run a step, with the reason where it is not the fastest."""
    if name != "auto":
        return name
    fastest, refusal = _fastest(programs, params, refused or {})
    return f"{fastest} ({refusal})" if refusal else fastest


def _fastest(programs: Sequence[Program], params: Sequence[Tensor], refused: Mapping[str, str]) -> tuple[str, str]:
    """The fastest engine that can serve on the device of the parameters, and why faster ones cannot."""
    on_gpu = any(p.device.type == "cuda" for p in params)
    refusals: list[str] = []
    for engine in (triton,) if on_gpu else (compiled, blocked):
        refusal = refused.get(engine.name) or engine.refusal(programs, params)
        if not refusal:
            return engine.name, " ".join(refusals)
        if refusal not in refusals:
            refusals.append(refusal)
    return reference.name, " ".join(refusals)
