"""A folder with the runs of a race, so that it can be stopped and continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_optim.errors import OptionError, first_line, shown
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome

SETTINGS, RUNS = "settings.json", "runs.jsonl"
KIND = "lightning-optim compare"
Key = tuple[str, float, int]  # of a run: the candidate's name, the learning rate, the seed


class Store:
    """The runs of a race in a folder: one line of JSON each, written when the run is over.

    Args:
        folder: The folder, which is made when a run is over. None keeps the runs in memory.
        settings: What decides the numbers of a run besides candidate, learning rate and seed, in plain values.

    Raises:
        OptionError: for a folder that holds something else, or runs under other settings.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self._settings = json.loads(json.dumps(dict(settings), default=str))
        self._lines: list[dict[str, Any]] = []
        self._begun = False
        if self.folder is not None:
            self._check(self.folder)

    def known(self, candidates: Mapping[str, Candidate]) -> dict[Key, Outcome]:
        """The runs of these candidates, by candidate, learning rate and seed; crashed ones are to be repeated."""
        found = {}
        for line in self._lines:
            candidate = candidates.get(line["candidate"])
            if candidate is not None and _plain(candidate.spec) == line.get("spec"):
                found[candidate.name, float(line["lr"]), int(line["seed"])] = Outcome.from_json(line)
        return {key: outcome for key, outcome in found.items() if outcome.status != "crashed"}

    def add(self, candidate: Candidate, lr: float, seed: int, outcome: Outcome) -> None:
        """Keep a run that is over."""
        key = {"candidate": candidate.name, "spec": _plain(candidate.spec), "lr": lr, "seed": seed}
        line = {**key, **outcome.as_json()}
        self._lines.append(line)
        if self.folder is not None:
            try:
                self._begin(self.folder)
                with (self.folder / RUNS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk, too
                raise _unusable(self.folder, error) from error

    def _begin(self, folder: Path) -> None:
        """Make the folder, with the settings; nothing is written before a run is over."""
        if self._begun:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / SETTINGS, json.dumps({"kind": KIND, **self._settings}, indent=1) + "\n")
        self._begun = True

    def _check(self, folder: Path) -> None:
        """Read what is there, and refuse what does not belong to this race."""
        try:
            held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            held = []
        except OSError as error:
            raise _unusable(folder, error) from error
        if not held:
            return
        if SETTINGS not in held:
            some = f"{', '.join(held[:3])}{', ...' if held[3:] else ''}"
            raise OptionError(
                f"the folder {folder} holds something else ({some}), and no race. Give another one with --out."
            )
        try:
            before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            kind = before.pop("kind")
        except (OSError, ValueError, AttributeError, KeyError):
            before, kind = {}, None
        if kind != KIND:
            raise OptionError(f"{folder / SETTINGS} is not of a race. Give another folder with --out.")
        try:
            self._lines = list(_read_lines(folder / RUNS))
        except (OSError, UnicodeDecodeError) as error:
            raise _unusable(folder, error) from error
        if self._lines and (differing := list(_differences(before, self._settings))):
            name, old, new = differing[0]
            more = f", and {len(differing) - 1} other settings differ" if len(differing) > 1 else ""
            raise OptionError(
                f"the folder {folder} holds runs with {name}={shown(old)}, and here it is {shown(new)}{more}. Give the "
                "same settings to continue, or another folder with --out."
            )


def _unusable(folder: Path, error: Exception) -> OptionError:
    return OptionError(f"the folder {folder} cannot be used: {first_line(error)}")


def count_runs(folder: Path) -> int:
    """The number of runs in a folder."""
    return len(list(_read_lines(folder / RUNS)))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The runs of a file. A last line that was cut off, as by a full disk, is not there; its run is repeated."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and {"candidate", "lr", "seed"} <= found.keys():
            yield found
    if text and not text.endswith("\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two settings differ, as (name, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
