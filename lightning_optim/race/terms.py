"""The terms of a race, the same for all candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_optim.errors import OptionError, is_whole, shown
from lightning_optim.race import grid
from lightning_optim.race.race import check_seeds


@dataclass(frozen=True)
class Terms:
    """What is raced over.

    Attributes:
        lr: AdamW's learning rate, on which those of candidates are based; by default that of the config, else 1e-3.
        factors: The grid: factors on a candidate's learning rate.
        seeds: Their number, or the seeds.
        first_seed: The first of a number of seeds.
        epochs: Epochs of a run, instead of those of the config.
        steps: Steps of a run, instead of those of the config.
        metric: What decides; by default the validation loss if there is one, else the training loss.
        mode: "min" or "max"; by default by the name of the metric.
        extend: The most learning rates by which a grid may grow where the best lies at its edge.

    Raises:
        OptionError: for a number of seeds, epochs or steps that is none, and for both epochs and steps.

    Example:
        >>> Terms(seeds=2, first_seed=5).seeds_of_runs(), Terms(steps=100).budget()
        ([5, 6], {'max_steps': 100, 'max_epochs': -1})
    """

    lr: float | None = None
    factors: Sequence[float] = grid.FACTORS
    seeds: int | Sequence[int] = 3
    first_seed: int = 0
    epochs: int | None = None
    steps: int | None = None
    metric: str | None = None
    mode: str | None = None
    extend: int = 2

    def __post_init__(self) -> None:
        if self.epochs is not None and self.steps is not None:
            raise OptionError(f"epochs={shown(self.epochs)} and steps={shown(self.steps)} are both given. Give one.")
        for name, value in (("epochs", self.epochs), ("steps", self.steps)):
            if value is not None and not is_whole(value):
                raise OptionError(f"{name}={shown(value)} must be a whole number, at least 1.")
        self.seeds_of_runs()

    def seeds_of_runs(self) -> list[int]:
        """The seeds."""
        if isinstance(self.seeds, list | tuple | range):
            return check_seeds(self.seeds)
        if not is_whole(self.seeds):
            raise OptionError(f"seeds={shown(self.seeds)} must be a number of seeds, at least 1, or a list of seeds.")
        return check_seeds(range(self.first_seed, self.first_seed + int(self.seeds)))

    def budget(self) -> dict[str, int]:
        """What the Trainer is to change for the length of a run."""
        if self.epochs is not None:
            return {"max_epochs": self.epochs, "max_steps": -1}
        return {} if self.steps is None else {"max_steps": self.steps, "max_epochs": -1}

    def length(self, taken: int) -> str:
        """How long a run is, in words.

        Args:
            taken: The steps that runs took.
        """
        if self.epochs is not None:
            return f"{self.epochs} epoch{'s' if self.epochs > 1 else ''}, {taken} steps"
        return f"{self.steps} steps" if self.steps is not None else f"that of the config, {taken} steps"
