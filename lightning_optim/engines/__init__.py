"""Who runs an update, decided in one place.

`auto` takes the fastest engine that can serve; asking for an engine that cannot is an error that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lightning_optim.engines import blocked, reference
from lightning_optim.engines.job import Row, Step
from lightning_optim.errors import OptionError, nearest
from lightning_optim.trace import Program


class Engine(Protocol):
    """What runs a step. A module with these two names is an engine."""

    name: str

    def run(self, step: Step) -> None: ...


ENGINES: dict[str, Engine] = {engine.name: engine for engine in (blocked, reference)}


def known(name: str) -> str:
    """The name itself; raises `OptionError` for an engine that does not exist."""
    if name not in ("auto", *ENGINES):
        raise OptionError(
            f"engine={name!r} is not known; it must be one of auto, {', '.join(ENGINES)}.{nearest(name, ENGINES)}"
        )
    return name


def choose(name: str, programs: Sequence[Program], rows: Sequence[Row]) -> Engine:
    """The engine for a step; raises `OptionError` where the one that was asked for cannot serve it."""
    refusal = blocked.refusal(programs, [row.param for row in rows])
    if name == blocked.name and refusal:
        raise OptionError(f"engine='blocked' cannot serve here: {refusal} Use engine='auto' or 'reference'.")
    return ENGINES[name] if name in ENGINES else ENGINES["reference" if refusal else "blocked"]


def describe(name: str, programs: Sequence[Program], params: Sequence[Tensor]) -> str:
    """The engine that serves such programs and parameters, with the reason where it is not the fastest."""
    refusal = blocked.refusal(programs, params)
    if name == "auto":
        return f"reference ({refusal})" if refusal else "blocked"
    return name
