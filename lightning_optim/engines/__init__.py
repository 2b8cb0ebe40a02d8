"""Who runs an update, decided in one place.

`auto` takes the fastest engine that can serve; asking for an engine that cannot is an error that says why.
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
    """What runs a step. A module with these three names is an engine."""

    name: str

    def refusal(self, programs: Sequence[Program], params: Sequence[Tensor]) -> str:
        """Why it cannot serve, in one sentence; empty where it can."""
        ...

    def run(self, step: Step) -> None: ...


ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (triton, compiled, blocked, reference)
}  # the fastest first


def known(name: str) -> str:
    """The name itself; raises `OptionError` for an engine that does not exist."""
    if name not in ("auto", *ENGINES):
        raise OptionError(
            f"engine={name!r} is not known; it must be one of auto, {', '.join(ENGINES)}.{nearest(name, ENGINES)}"
        )
    return name


def choose(name: str, programs: Sequence[Program], params: Sequence[LocalParameter]) -> Engine:
    """The engine for a step; raises `OptionError` where the one that was asked for cannot serve it."""
    tensors = [param.param for param in params]
    if name == "auto":
        return ENGINES[_fastest(programs, tensors)[0]]
    refusal = ENGINES[name].refusal(programs, tensors)
    if refusal:
        raise OptionError(f"engine={name!r} cannot serve here: {refusal} Use engine='auto' or 'reference'.")
    return ENGINES[name]


def describe(name: str, programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """The engine that serves such programs and parameters, with the reason where it is not the fastest."""
    if name != "auto":
        return name
    fastest, refusal = _fastest(programs, params)
    return f"{fastest} ({refusal})" if refusal else fastest


def _fastest(programs: Sequence[Program], params: Sequence[Tensor]) -> tuple[str, str]:
    """The first engine that can serve parameters where they are, and why faster ones for that place cannot."""
    on_gpu = any(p.device.type == "cuda" for p in params)
    refusals: list[str] = []
    for engine in (triton,) if on_gpu else (compiled, blocked):
        refusal = engine.refusal(programs, params)
        if not refusal:
            return engine.name, " ".join(refusals)
        if refusal not in refusals:
            refusals.append(refusal)
    return reference.name, " ".join(refusals)
