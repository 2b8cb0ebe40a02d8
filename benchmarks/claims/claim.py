"""What a paper claims, and the experiment that looks whether it is so."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.claims.size import Size
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.workers import Run

if TYPE_CHECKING:
    from benchmarks.claims.finding import Finding
    from benchmarks.claims.results import Results


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: What tables and pictures call it.
        lr: The learning rate around which its grid lies.
        spec: What the run needs to know, in plain values: the spec of an optimizer, say.
        grid: Further options, each with the values that are tried together with each learning rate.
    """

    name: str
    lr: float = 1.0
    spec: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def cells(self) -> list[Candidate]:
        """A candidate for each combination of the options.

        Example:
            >>> [cell.name for cell in Arm("sgd", 0.1, grid={"weight_decay": (0.0, 0.01)}).cells()]
            ['sgd weight_decay=0.0', 'sgd weight_decay=0.01']
        """
        cells = []
        for values in itertools.product(*self.grid.values()):
            options = dict(zip(self.grid, values, strict=True))
            name = " ".join([self.name, *(f"{key}={value}" for key, value in options.items())])
            cells.append(Candidate(name, self.lr, {**self.spec, **options}))
        return cells


@dataclass(frozen=True)
class Part:
    """Arms that are run alike.

    Attributes:
        name: What results call it.
        run: Does one run: an instance of a frozen dataclass of a module, whose fields decide the numbers.
        arms: Who is compared.
        metric: What the run returns and the arms are chosen by.
        mode: "min" where lower is better, else "max".
        factors: The grid, as factors on the learning rate of each arm.
        seeds: The number of seeds that are measured.
        tuning: The number of other seeds on which each arm chooses its cell of the grid, after which `seeds` are run at
            that cell only. 0 runs the whole grid with all seeds.
        extend: The most learning rates by which the grid of an arm may grow, where its best lies at the edge.
        bytes: About the memory of one run.
    """

    name: str
    run: Run
    arms: Sequence[Arm]
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    factors: Sequence[float] = (1.0,)
    seeds: int = 5
    tuning: int = 0
    extend: int = 0
    bytes: float = 0.0

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the numbers of a run, besides arm, learning rate and seed."""
        run: Any = self.run
        return {"run": type(run).__name__, **dataclasses.asdict(run)}

    @property
    def key(self) -> str:
        """The name of the part's folder, another for other settings."""
        text = json.dumps([self.settings, self.metric, self.mode], sort_keys=True, default=str)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Claim:
    """What a paper claims.

    Attributes:
        name: A word for the command; the experiment's module and the page in docs/claims have the same name.
        title: The claim in one sentence.
        papers: Who claims it: authors and year, with the arXiv number where there is one.
        setting: Model, data, steps, seeds and grid in one sentence.
        parts: The parts at a size.
        judge: What the results say.
        draw: Draws the results into a new figure and returns it.
        gpu: At which size or setting an effect is to be looked for on a GPU, where two cores are too few; else empty.
    """

    name: str
    title: str
    papers: str
    setting: str
    parts: Callable[[Size], list[Part]]
    judge: Callable[[Results], list[Finding]]
    draw: Callable[[Results], Any]
    gpu: str = ""
