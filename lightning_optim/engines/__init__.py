"""The engines, and the choice of one of them for a step.

`engine="auto"` chooses the fastest engine that can serve a step. An engine that was chosen by name and cannot serve is
an error that gives the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lightning_optim.engines import blocked, compiled, reference, triton
from lightning_optim.engines.step import LocalParameter, Step
from lightning_optim.errors import OptionError, nearest
from lightning_optim.language.program import Program


class Engine(Protocol):
    """A module with these three names is an engine."""

    name: str

    def refusal(self, programs: Sequence[Program], params: Sequence[Tensor]) -> str:
        """Why it cannot serve, in one sentence; empty where it can."""
        ...

    def run(self, step: Step) -> None:
        """Run a step: write parameters and slots in place."""
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


def choose(name: str, programs: Sequence[Program], params: Sequence[LocalParameter]) -> Engine:
    """The engine that runs a step.

    Args:
        name: "auto", or the name of an engine.
        programs: The programs of the step.
        params: Its local parameters.

    Raises:
        OptionError: where the engine of that name cannot serve the step.
    """
    tensors = [param.param for param in params]
    if name == "auto":
        return ENGINES[_fastest(programs, tensors)[0]]
    refusal = ENGINES[name].refusal(programs, tensors)
    if refusal:
        raise OptionError(f"engine={name!r} cannot serve here: {refusal} Use engine='auto' or 'reference'.")
    return ENGINES[name]


def describe(name: str, programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """The name of the engine that would run a step, with the reason where it is not the fastest."""
    if name != "auto":
        return name
    fastest, refusal = _fastest(programs, params)
    return f"{fastest} ({refusal})" if refusal else fastest


def _fastest(programs: Sequence[Program], params: Sequence[Tensor]) -> tuple[str, str]:
    """The fastest engine that can serve on the device of the parameters, and why faster ones cannot."""
    on_gpu = any(p.device.type == "cuda" for p in params)
    refusals: list[str] = []
    for engine in (triton,) if on_gpu else (compiled, blocked):
        refusal = engine.refusal(programs, params)
        if not refusal:
            return engine.name, " ".join(refusals)
        if refusal not in refusals:
            refusals.append(refusal)
    return reference.name, " ".join(refusals)
