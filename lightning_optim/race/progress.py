"""How far a race is: a bar with the time left in a terminal, a line for each run in a pipe."""

from __future__ import annotations

import time
from typing import Any, Protocol

from lightning_optim.race.outcome import Outcome
from lightning_optim.race.workers import Task


class Progress(Protocol):
    """What a race tells while it runs."""

    def begin(self, total: int) -> None:
        """So many runs are planned."""

    def share(self, task: Task, share: float) -> None:
        """A run has come so far."""

    def ended(self, task: Task, outcome: Outcome | None, total: int, stored: bool = False) -> None:
        """A run is over, or was there already, or was left out; with those that were added there are now `total`."""

    def close(self) -> None:
        """The race is over."""


class Silent:
    """Says nothing."""

    def begin(self, total: int) -> None: ...

    def share(self, task: Task, share: float) -> None: ...

    def ended(self, task: Task, outcome: Outcome | None, total: int, stored: bool = False) -> None: ...

    def close(self) -> None: ...


class Bar:
    """A bar over all runs on stderr, or where that is no terminal a line for each run.

    Args:
        console: A console of rich.
        greeting: What is said when the first run begins.
    """

    def __init__(self, console: Any, greeting: str = "") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._console, self._greeting = console, greeting
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        )
        self._shares: dict[Task, float] = {}
        self._over = self._stored = self._total = 0  # runs: now, from before, in all
        self._begun = time.monotonic()

    def begin(self, total: int) -> None:
        if self._greeting:
            self._console.print(self._greeting, highlight=False, markup=False, soft_wrap=True)
        self._total, self._begun = total, time.monotonic()
        self._row = self._bar.add_task("runs", total=total, left="")
        self._bar.start()

    def share(self, task: Task, share: float) -> None:
        self._shares[task] = share
        self._bar.update(self._row, description=_name(task), completed=self._completed(), left=self._left())

    def ended(self, task: Task, outcome: Outcome | None, total: int, stored: bool = False) -> None:
        self._shares.pop(task, None)
        self._stored, self._over, self._total = self._stored + stored, self._over + (not stored), total
        self._bar.update(self._row, completed=self._completed(), total=total, left=self._left())
        if not stored and self._over == 1 and self._stored:
            self._console.print(f"{self._stored} runs are there already.", highlight=False)
        in_pipe = not self._console.is_terminal
        if outcome is None or stored or not (in_pipe or outcome.status == "crashed"):
            return
        how = outcome.status if outcome.status == "finished" else f"{outcome.status}: {outcome.reason}"
        line = f"{self._stored + self._over} of {total}: {_name(task)} {how}{' ' + self._left() if in_pipe else ''}"
        self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()

    def _completed(self) -> float:
        return self._stored + self._over + sum(self._shares.values())

    def _left(self) -> str:
        """The time left, at the speed so far."""
        spent, gone = time.monotonic() - self._begun, self._completed() - self._stored
        if gone < 0.05:
            return ""
        seconds = round(spent / gone * (self._total - self._completed()))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return f"({hours}:{minutes:02}:{seconds % 60:02} left)" if hours else f"({minutes}:{seconds % 60:02} left)"


def _name(task: Task) -> str:
    return f"{task.candidate.name} lr {task.lr:g} seed {task.seed}"
