"""Results in files: what a run found, a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.claims.claim import Claim
from benchmarks.claims.results import TUNING, Measured, Results
from benchmarks.claims.size import Size
from benchmarks.records import Record
from lightning_optim.errors import OptionError
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.store import write_text


def as_plain(results: Results) -> Record:
    """Results in plain values, without how long each run took, and curves of measured runs with five digits."""

    def kept(seed: int, outcome: Outcome) -> Record:
        told = outcome.curves if seed < TUNING else {}
        curves = {name: (steps, [float(f"{y:.5g}") for y in values]) for name, (steps, values) in told.items()}
        return replace(outcome, seconds=0.0, facts={}, curves=curves).as_json()

    return {
        name: {
            "settings": json.loads(json.dumps(found.part.settings)),
            "runs": [
                {"cell": key[0], "lr": key[1], "seed": key[2], **kept(key[2], outcome)}
                for key, outcome in sorted(found.runs.items())
            ],
        }
        for name, found in results.items()
    }


def from_plain(record: Mapping[str, Any], claim: Claim, size: Size) -> Results:
    """Results from a file.

    Raises:
        OptionError: if the file is of other parts than the claim has now.
    """
    results = {}
    for part in claim.parts(size):
        held = record["parts"].get(part.name)
        if held is None or held["settings"] != json.loads(json.dumps(part.settings)):
            raise OptionError(
                f"the results of {claim.name} are of other settings than its experiment has now. Run it again."
            )
        known = {run["cell"] for run in held["runs"]}
        if unknown := next((arm.name for arm in part.arms if not {cell.name for cell in arm.cells()} <= known), None):
            raise OptionError(f"the results of {claim.name} have no runs of {unknown}. Run it again.")
        runs = {(run["cell"], float(run["lr"]), int(run["seed"])): Outcome.from_json(run) for run in held["runs"]}
        results[part.name] = Measured(part, runs)
    return results


def write(path: Path, record: Record) -> None:
    """Write a result, whole or not at all, with a line for each run."""
    parts = []
    for name, part in record["parts"].items():
        runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in part["runs"])
        settings = json.dumps(part["settings"])
        parts.append(f'{json.dumps(name)}: {{"settings": {settings}, "runs": [\n{runs}\n]}}')
    about, body = json.dumps(record["about"]), ",\n".join(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f'{{"about": {about},\n"parts": {{\n{body}\n}}}}\n')
